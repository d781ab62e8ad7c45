"""The small models' training: packing asks as deployment does, training resumes to the byte, folders load anywhere."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vistok.world import make, sample
from vistok.zoo import ModelNotFound, load, load_processor, locate
from vistok.zoo.asking import ask, encode, is_right
from vistok.zoo.packing import IGNORE, pack, packed_mask
from vistok.zoo.tokenizer import build_tokenizer
from vistok.zoo.training import Recipe, Stage, WorldBatches, language_loss, train

RECIPES = ("vistok_tiny", "vistok_tiny_qwen")


def recipe_of(module: str) -> Recipe:
    return import_module(f"vistok.zoo.recipes.{module}").RECIPE


@pytest.mark.parametrize("picture", list(sample("all", 40, seed=3)), ids=lambda p: f"{p.task}-{p.seed % 1000}")
def test_every_text_of_the_world_survives_the_tokenizer(picture) -> None:
    tokenizer = build_tokenizer(("<image>",))
    for text in (*(q.text for q in picture.questions), *(q.answer for q in picture.questions), picture.caption):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_answers_decode_exactly() -> None:
    tokenizer = build_tokenizer(("<image>",))
    for answer in ("KITE", "482", "yes", "RED7", "0"):
        ids = tokenizer(f" {answer}</s>", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == answer


def test_targets_are_the_answers_and_nothing_else() -> None:
    tokenizer = build_tokenizer(("<image>",))
    picture = make("scenes", 11)
    batch = pack([picture], tokenizer, 14)
    for segment in range(1, int(batch.segment.max()) + 1):
        here = batch.segment[0] == segment
        ids, target = batch.text[0][here], batch.target[0][here]
        spoken = tokenizer.decode(target[target != IGNORE])
        asked = tokenizer.decode(ids)
        assert spoken.endswith("</s>") and asked.count("</s>") == spoken.count("</s>")
        for part in spoken.split("</s>")[:-1]:
            assert f"<assistant> {part.strip()}" in asked.replace("<assistant>  ", "<assistant> ")
        # Each target is the token that follows.
        assert torch.equal(target[:-1][target[:-1] != IGNORE], ids[1:][target[:-1] != IGNORE])


def test_packed_mask_by_brute_force() -> None:
    segment = torch.tensor([[1, 1, 2, 2, 2, -1], [1, 2, 3, -1, -1, -1]])
    mask = packed_mask(3, segment)
    whole = torch.cat([torch.zeros(2, 3, dtype=torch.int64), segment], 1)
    for row in range(2):
        for query in range(9):
            for key in range(9):
                sees = key <= query and (whole[row, key] == 0 or whole[row, key] == whole[row, query])
                assert mask[row, 0, query, key] == sees


@pytest.mark.parametrize("module", RECIPES)
def test_a_packed_question_is_asked_as_in_deployment(module: str) -> None:
    recipe = recipe_of(module)
    torch.manual_seed(0)
    model, processor = recipe.build()
    model.eval()
    picture = make("scenes", 5, recipe.image_size)
    batch = pack([picture], processor.tokenizer, recipe.grid)
    with torch.no_grad():
        prefix = recipe.prefix(model, batch.pixels, processor.tokenizer.bos_token_id)
        seen: list[torch.Tensor] = []
        hook = model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out))
        language_loss(model, prefix, batch, 1.0, torch.Generator())
        hook.remove()
        asked = picture.questions[3]
        inputs = encode(processor, [picture.pil()], [asked.text])
        deployed = model(**inputs).logits[0, -1]
    # Segment 1 is the caption, segments 2.. are the questions from the third on.
    positions = torch.nonzero(batch.target[0] != IGNORE)[:, 0]
    first = next(i for i, p in enumerate(positions) if batch.segment[0, p] == 3)
    torch.testing.assert_close(seen[0][first], deployed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("module", RECIPES)
def test_dropped_tokens_leave_the_others_where_they_were(module: str) -> None:
    recipe = recipe_of(module)
    model, processor = recipe.build()
    pixels = torch.stack([torch.from_numpy(make("scenes", s, recipe.image_size).image.copy()) for s in range(2)])
    with torch.no_grad():
        prefix = recipe.prefix(model, pixels, processor.tokenizer.bos_token_id)
    embeds, positions = prefix.take(0.25, torch.Generator().manual_seed(1))
    around = prefix.embeds.shape[1] - len(range(prefix.embeds.shape[1])[prefix.visual])
    assert embeds.shape[1] == round(0.25 * recipe.grid**2) + around
    axes = positions[None] if positions.ndim == 2 else positions
    whole = prefix.positions[None] if prefix.positions.ndim == 2 else prefix.positions
    for row in range(2):
        places = [int((prefix.embeds[row] == token).all(-1).nonzero()[0, 0]) for token in embeds[row]]
        assert places == sorted(set(places))
        assert torch.equal(axes[:, row], whole[:, row, places])
    everything, same = prefix.take(1.0, torch.Generator())
    assert torch.equal(everything, prefix.embeds) and torch.equal(same, prefix.positions)


def tiny_recipe() -> Recipe:
    stage = Stage("patches", steps=2, batch_size=2, peak_lr=1e-3, language=False, tasks=(("scenes", 1.0),))
    return replace(
        recipe_of("vistok_tiny"),
        stages=(stage, replace(stage, name="questions", steps=3, language=True, drop=0.5)),
        questions=3,
        warmup=1,
    )


def test_training_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "parts", stop_at=3)
    train(recipe, tmp_path / "parts")
    names = [tmp_path / part / "model.safetensors" for part in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_trained_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    told: list[dict] = []
    folder = train(tiny_recipe(), tmp_path, on_step=told.append)
    assert [t["step"] for t in told] == [1, 2, 3, 4, 5] and told[-1]["stage"] == "questions"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size < 15e6
    picture = make("words", 1, 160)
    answers = ask(model, processor, [picture.pil()] * 2, ["what is the word?", "is there a red word?"])
    assert len(answers) == 2
    assert type(load(folder)) is type(model) and type(load_processor(folder)) is type(processor)


def test_batches_are_a_function_of_the_step() -> None:
    recipe = tiny_recipe()
    tokenizer = build_tokenizer(("<image>",))
    first, again = WorldBatches(recipe, tokenizer), WorldBatches(recipe, tokenizer)
    assert torch.equal(first[3].pixels, again[3].pixels)
    assert not torch.equal(first[3].pixels, first[2].pixels)


def test_right_is_exact_up_to_case() -> None:
    question = make("words", 2).questions[0]
    assert is_right(question, f" {question.answer.lower()} ")
    assert not is_right(question, question.answer + "x")


def test_names_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="no weights"):
        locate(tmp_path)
    with pytest.raises(ModelNotFound, match="neither a folder"):
        locate("no-such-model")
    assert locate("owner/name") == "owner/name"

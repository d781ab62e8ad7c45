"""Training a masked-diffusion head: regions, masks, noise; a packed question is asked as the decoder asks it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.small import save_small_model
from vistok.host.diffusion import DiffusionDecoder
from vistok.world import make, sample
from vistok.zoo import MODELS, load, load_processor
from vistok.zoo.asking import ask, denoise, encode, is_diffusion, spoken
from vistok.zoo.diffusion import ANSWER_LENGTH, MASK, diffusion_loss, noise, pack_regions, region_mask
from vistok.zoo.evaluation import evaluate, total
from vistok.zoo.packing import IGNORE
from vistok.zoo.recipes import vistok_tiny_diffusion as recipe
from vistok.zoo.tokenizer import build_tokenizer
from vistok.zoo.training import WorldBatches, train


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = save_small_model(tmp_path_factory.mktemp("diffusion"), ANSWER_LENGTH)
    return load(folder), load_processor(folder)


def test_regions_are_the_answers_filled_with_end_tokens() -> None:
    tokenizer = build_tokenizer(("<image>",))
    pictures = list(sample("all", 4, seed=2))
    batch = pack_regions(pictures, tokenizer, 14)
    for row, picture in enumerate(pictures):
        assert int(batch.segment[row].max()) == len(picture.questions)
        for number, question in enumerate(picture.questions, start=1):
            here = batch.segment[row] == number
            ids, target = batch.text[row][here], batch.target[row][here]
            region = target != IGNORE
            assert region.tolist() == [False] * (len(ids) - ANSWER_LENGTH) + [True] * ANSWER_LENGTH
            assert torch.equal(ids[region], target[region])
            assert torch.equal(batch.position[row][here], torch.arange(len(ids)))
            spoken = tokenizer.decode(ids[region]).split("</s>")
            assert spoken[0].strip() == question.answer and not any(part.strip() for part in spoken[1:])
            assert tokenizer.decode(ids[~region]).replace(" ", "").startswith("<user>")


def test_an_answer_that_does_not_fit_is_named() -> None:
    picture = make("words", 3)
    long = replace(picture.questions[0], answer="ABCDEFGH")
    with pytest.raises(ValueError, match=r"^answer: got 8 tokens, must be fewer than 8"):
        pack_regions([replace(picture, questions=(long,))], build_tokenizer(("<image>",)), 14)


def test_who_sees_whom() -> None:
    """Pictures see pictures, questions those and themselves, answers all of their segment."""
    batch = pack_regions([make("scenes", 1, questions=3), make("words", 2, questions=2)], build_tokenizer(("<i>",)), 14)
    prefix, mask = 3, region_mask(3, batch)
    assert mask.shape == (2, 1, prefix + batch.text.shape[1], prefix + batch.text.shape[1])
    for row in range(2):
        segment = [0] * prefix + batch.segment[row].tolist()
        kinds = zip(batch.segment[row].tolist(), batch.target[row].tolist(), strict=True)
        block = [0] * prefix + [-1 if number < 0 else 1 + (target != IGNORE) for number, target in kinds]
        for query in range(0, len(segment), 3):
            for key in range(len(segment)):
                mine = segment[key] in (0, segment[query])
                sees = mine and (0 <= block[key] <= block[query] or block[key] == block[query])
                assert bool(mask[row, 0, query, key]) == sees


def test_noise_is_uniform_and_masks_by_its_share() -> None:
    segment = torch.arange(1, 9).repeat_interleave(50).expand(200, -1)
    share, masked = noise(segment, torch.Generator().manual_seed(0))
    each = share[:, ::50]
    assert bool((share == each.repeat_interleave(50, 1)).all()), "one share for a question"
    assert float(each.mean()) == pytest.approx(0.5, abs=0.02) and 0.0 < float(each.min()) < 0.01
    assert float(each.var()) == pytest.approx(1 / 12, abs=0.01)
    assert float((masked.float() - share).mean()) == pytest.approx(0, abs=0.01)
    assert bool(masked[share > 0.95].float().mean() > 0.9)


@torch.no_grad()
def test_a_packed_question_is_asked_as_the_decoder_asks_it(small) -> None:
    """With all of the answers masked, the loss sees the very logits of the decoder's first step."""
    model, processor = small
    picture = make("scenes", 5, recipe.IMAGE_SIZE, questions=3)
    batch = pack_regions([picture], processor.tokenizer, recipe.GRID)
    prefix = recipe.prefix(model, batch.pixels, processor.tokenizer.bos_token_id)
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out))
    masked = replace(batch, text=batch.text.masked_fill(batch.target != IGNORE, model.config.mask_token_id))
    try:
        # A batch with no masks left to chance: whatever is drawn, the whole region is masked already.
        diffusion_loss(model, prefix, masked, 1.0, torch.Generator().manual_seed(0))
        drawn = noise(batch.segment, torch.Generator().manual_seed(0))[1][0] & (batch.target[0] != IGNORE)
        for number, question in enumerate(picture.questions, start=1):
            inputs = encode(processor, [picture.pil()], [question.text])
            DiffusionDecoder(model, 1).run(inputs)
            mine = (batch.segment[0] == number) & (batch.target[0] != IGNORE)
            first = int((drawn & (batch.segment[0] < number)).sum())
            rows = drawn[mine].nonzero()[:, 0]
            packed = seen[0][first : first + len(rows)]
            keep = torch.arange(packed.shape[1]) != model.config.mask_token_id
            torch.testing.assert_close(packed[:, keep], seen[-1][0, rows][:, keep], atol=1e-4, rtol=1e-4)
    finally:
        hook.remove()


def test_the_loss_falls_on_one_batch(small) -> None:
    model, processor = small
    batch = pack_regions([make("scenes", 5, recipe.IMAGE_SIZE, questions=3)], processor.tokenizer, recipe.GRID)
    with torch.no_grad():
        prefix = recipe.prefix(model, batch.pixels, processor.tokenizer.bos_token_id)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss, right = diffusion_loss(model, prefix, batch, 1.0, torch.Generator().manual_seed(3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.load_state_dict(before)
    assert losses[-1] < 0.8 * losses[0] and 0 <= float(right) <= 1


def test_spoken_ends_at_the_first_end_token() -> None:
    class Processor:
        tokenizer = build_tokenizer(("<image>",))
        batch_decode = tokenizer.batch_decode

    texts = [" KITE</s> yes</s>", " yes no yes no no</s>a"]
    ids = torch.tensor(Processor.tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert spoken(Processor(), ids) == ["KITE", "yes no yes no no"]


def test_asking_goes_through_the_decoder(small) -> None:
    model, processor = small
    picture = make("words", 1, recipe.IMAGE_SIZE)
    assert is_diffusion(model)
    asked = [q.text for q in picture.questions[:3]]
    answers, runs = denoise(model, processor, [picture.pil()] * 3, asked, batch_size=2, steps=2)
    assert len(answers) == 3 and [len(run.ids) for run in runs] == [2, 1]
    assert ask(model, processor, [picture.pil()] * 3, asked) == denoise(model, processor, [picture.pil()] * 3, asked)[0]
    few = evaluate(model, processor, [replace(picture, questions=picture.questions[:2])], keep=0.1)
    assert total(few).n == 2


def test_the_recipe_starts_from_vistok_tiny_and_trains_the_language_model_only(tmp_path) -> None:
    stage = replace(recipe.RECIPE.stages[0], steps=1, batch_size=1)
    short = replace(recipe.RECIPE, stages=(stage,), questions=3, warmup=1)
    model, processor = short.build()
    tiny = load("vistok-tiny")
    table = model.get_input_embeddings().weight
    assert torch.equal(table[-1], table[processor.tokenizer.convert_tokens_to_ids("<assistant>")])
    assert processor.tokenizer.convert_tokens_to_ids(MASK) == model.config.mask_token_id == len(processor.tokenizer) - 1
    assert len(WorldBatches(short, processor.tokenizer)[0].pixels) == 1
    folder = train(short, tmp_path)
    made = load(folder)
    assert (made.config.mask_token_id, made.config.answer_length) == (model.config.mask_token_id, ANSWER_LENGTH)
    ours, theirs = made.state_dict(), tiny.state_dict()
    for name, value in theirs.items():
        if "vision_tower" in name or "projector" in name:
            assert torch.equal(ours[name], value), name
    changed = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(ours[changed], theirs[changed])


@pytest.mark.skipif(not (MODELS / "vistok-tiny-diffusion" / "config.json").is_file(), reason="not trained yet")
def test_the_shipped_model_answers() -> None:
    """Far better than blind (about 40%); few questions, so that it is quick."""
    model, processor = load("vistok-tiny-diffusion"), load_processor("vistok-tiny-diffusion")
    pictures = list(sample("all", 6, seed=5, size=recipe.IMAGE_SIZE, split="test", questions=4))
    assert total(evaluate(model, processor, pictures)).accuracy > 0.5

"""What a session refuses, composes, counts, draws, and leaves behind."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tests.host.families import FAMILIES, TEXT, prompt
from tests.host.plain import eager_maps
from tests.host.reducers import Asks, Mean, Spread, Staged, spread
from tests.host.reference import language_inputs, one_row, run
from vistok.host import Reducer, Reduction, Schedule, UnsupportedModel, apply
from vistok.host.keep import check_keep, counts

LLAVA = FAMILIES["llava-clip"]


def every_hook(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_always_called", "_backward_hooks")  # fmt: skip
    hooks = [{kind: list(getattr(module, kind)) for kind in kinds} for module in model.modules()]
    return hooks, sorted(vars(model.model)), model.config._attn_implementation


class Breaks(Spread):
    def select(self, evidence, keep):
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_nothing_is_left_in_the_model(family):
    model, batch = family.model, prompt(family, [[0]])
    plain = model(**batch.inputs).logits  # transformers installs hooks of its own at the first call
    before = every_hook(model)
    wants = dict.fromkeys(("cls_attention", "encoder_keys", "received_attention"), -2) | {"encoder_features": None}
    with apply(model, Asks(wants), keep=0.5):
        assert every_hook(model) != before
        model(**batch.inputs)
    assert every_hook(model) == before
    with pytest.raises(ArithmeticError), apply(model, Breaks(), keep=0.5):
        model(**batch.inputs)
    assert every_hook(model) == before
    with pytest.raises(ValueError, match="layer 99"), apply(model, Asks({"cls_attention": 99})):
        pass
    assert every_hook(model) == before
    assert torch.equal(model(**batch.inputs).logits, plain)


@torch.no_grad()
def test_a_second_method_in_one_model_is_refused_and_the_first_goes_on():
    batch = prompt(LLAVA, [[0]])
    with apply(LLAVA.model, Spread(), keep=0.25) as session:
        with pytest.raises(RuntimeError, match="already has a method"), apply(LLAVA.model, Spread(), keep=0.5):
            pass
        LLAVA.model(**batch.inputs)
        assert session.tokens_kept == 4
    with session:
        LLAVA.model(**batch.inputs)


@pytest.mark.parametrize("keep", [0, -3, 0.0, 1.5, -0.1, math.nan, math.inf, True, "4", [0.5, 0.5], [0]])
def test_wrong_keeps_are_named(keep):
    with pytest.raises(ValueError, match="keep: got"):
        apply(LLAVA.model, Spread(), keep=keep)


def test_counts():
    assert [counts(check_keep(keep), 16, 1) for keep in (5, np.int64(5), 0.25, 1.0, 0.01, np.float32(0.5))] == [
        [5], [5], [4], [16], [1], [8]
    ]  # fmt: skip
    assert counts(0.25, 16, 2) == [8, 4] and counts(2, 16, 3) == [8, 4, 2] and counts([0.5, 3], 16, 2) == [8, 3]


@torch.no_grad()
def test_a_keep_beyond_the_picture_shows_when_it_comes():
    with (
        apply(LLAVA.model, Spread(), keep=17),
        pytest.raises(ValueError, match=r"keep: got 17, .* only 16 visual tokens"),
    ):
        LLAVA.model(**prompt(LLAVA, [[0]]).inputs)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="position: got 'move'"):
        apply(LLAVA.model, Spread(), position="move")
    with pytest.raises(ValueError, match="method: got an empty list"):
        apply(LLAVA.model, [])
    with pytest.raises(ValueError, match="method: got 7"):
        apply(LLAVA.model, [7])
    with pytest.raises(ValueError, match="layer: hyper-parameters"):
        apply(LLAVA.model, Spread(), layer=3)
    with pytest.raises(LookupError, match="no-such-system"):
        apply(LLAVA.model, "no-such-system")


@torch.no_grad()
def test_inputs_that_are_refused():
    inputs = prompt(LLAVA, [[0]]).inputs
    with apply(LLAVA.model, Spread(), keep=0.25):
        with pytest.raises(ValueError, match="labels"):
            LLAVA.model(**inputs, labels=inputs["input_ids"])
        for mask in (torch.ones(1, 1, 23, 23), torch.ones(1, 7)):
            with pytest.raises(ValueError, match="attention_mask: got shape"):
                LLAVA.model(**inputs | {"attention_mask": mask})
    outside = LLAVA.model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    with apply(LLAVA.model, Spread(), keep=0.25), pytest.raises(ValueError, match="mm_encoder_outputs"):
        LLAVA.model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": outside})


def test_models_that_are_not_supported():
    class MllamaForConditionalGeneration(torch.nn.Module):
        pass

    with pytest.raises(UnsupportedModel, match=r"MllamaForConditionalGeneration: not supported yet: .* cross-att"):
        apply(MllamaForConditionalGeneration(), Spread())
    with pytest.raises(UnsupportedModel, match="Linear: not supported yet: it needs an adapter"):
        apply(torch.nn.Linear(1, 1), Spread())
    text = tf.LlamaConfig(**TEXT)
    pixtral = tf.PixtralVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UnsupportedModel, match="pixtral encoder: not supported yet"):
        apply(tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=pixtral, text_config=text)), Spread())
    sliding = tf.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    vision = tf.SiglipVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UnsupportedModel, match="sliding-window layers"):
        apply(tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=sliding)), Spread())
    spread_out = copy.deepcopy(LLAVA.model)
    spread_out.model.vision_tower.to("meta")
    with pytest.raises(UnsupportedModel, match="spread over cpu, meta"):
        apply(spread_out, Spread())
    full = copy.deepcopy(LLAVA.model)
    full.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModel, match="class token"):
        apply(full, Spread())


# Composition and counts ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_methods_compose():
    batch = prompt(LLAVA, [[0], [0]])
    first, second = Mean(), Asks({"cls_attention": -2, "text": None})
    with apply(LLAVA.model, [first, second], keep=0.25) as session:
        LLAVA.model(**batch.inputs)
    (evidence,) = second.seen
    assert evidence.features.shape[1] == evidence.cls_attention.shape[2] == 8 and evidence.grid is None
    embeds = language_inputs(LLAVA.model, **batch.inputs)["inputs_embeds"]
    pairs = embeds[0, batch.columns[0][0]].view(8, 2, -1).mean(1)
    torch.testing.assert_close(evidence.features[0], pairs)
    picture = session.pictures[0]
    assert picture.tokens_kept == 4 and picture.keep.tolist() == [2 * i for i in spread(8, 4)]
    assert picture.source.tolist() == [
        spread(8, 4).index(i) if i in spread(8, 4) else -1 for i in range(8) for _ in "ab"
    ]


@torch.no_grad()
def test_keep_for_each_of_several_methods():
    batch = prompt(LLAVA, [[0]])
    with apply(LLAVA.model, [Spread(), Spread(), Spread()], keep=[12, 0.5, 2]) as session:
        LLAVA.model(**batch.inputs)
    assert session.tokens_kept == 2
    staged = Staged(1.0, {2: 0.25})
    with apply(LLAVA.model, [Spread(), staged], keep=0.5) as session:
        got = LLAVA.model(**batch.inputs).logits
    (picture,) = session.pictures
    assert picture.tokens_kept == 11 and picture.layers == {2: 3}  # sqrt(0.5) of 16, then a quarter of those
    assert got.shape[1] == batch.inputs["input_ids"].shape[1] - 16 + 3


@dataclass(frozen=True)
class Varies(Spread):
    """Keeps as many tokens as the question has, and a row more or less inside the language model."""

    one_at_a_time = True

    @property
    def needs(self):
        return {"text_mask": None}

    def select(self, evidence, keep):
        return super().select(evidence, int(evidence.text_mask.sum()))

    def schedule(self, num_tokens, keep, num_layers):
        return Schedule(keep, {2: 0})

    def at_layer(self, evidence, keep, layer):
        many = evidence.num_tokens == 5
        return Reduction.select(evidence.features, Spread.select(self, evidence, evidence.num_tokens if many else keep))


@torch.no_grad()
def test_counts_that_depend_on_the_picture():
    batch = prompt(LLAVA, [[0], [0], [0]])
    with apply(LLAVA.model, Varies(), keep=0.25) as session:
        got = LLAVA.model(**batch.inputs).logits
    counts = [5, 4, 3]
    assert [p.tokens_kept for p in session.pictures] == counts
    assert [p.layers for p in session.pictures] == [{2: 5}, {2: 0}, {2: 0}]
    given, mask = language_inputs(LLAVA.model, **batch.inputs), batch.inputs["attention_mask"]
    for row, count in enumerate(counts):
        by_hand = one_row(given, row, mask)
        shift = int((mask[row] == 0).sum())
        left = batch.left(lambda n, count=count: spread(n, count))[row] - shift
        none = left if row == 0 else batch.left(lambda n: [])[row] - shift
        want = run(LLAVA.model, by_hand, left, {2: none})
        torch.testing.assert_close(got[row, -len(want) :], want, atol=2e-5, rtol=1e-4)


@dataclass(frozen=True)
class MergesInside(Reducer):
    def schedule(self, num_tokens, keep, num_layers):
        return Schedule(num_tokens, {1: 4})

    def at_layer(self, evidence, keep, layer):
        return Mean().compress(evidence, keep)


@torch.no_grad()
def test_merging_inside_the_language_model():
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    with apply(model, MergesInside(), keep=0.25) as session:
        got = model(**batch.inputs).logits
    given, lm = language_inputs(model, **batch.inputs), model.model.language_model
    hidden, positions = given["inputs_embeds"], torch.arange(batch.inputs["input_ids"].shape[1])[None]
    for number, layer in enumerate(lm.layers):
        if number == 1:
            columns = torch.tensor(batch.columns[0][0])
            hidden[0, columns[::4]] = hidden[0, columns].view(4, 4, -1).mean(1)
            stay = torch.tensor(
                [c for c in positions[0].tolist() if c not in set(columns.tolist()) - set(columns[::4].tolist())]
            )
            hidden, positions = hidden[:, stay], positions[:, stay]
        hidden = layer(hidden, position_embeddings=lm.rotary_emb(hidden, positions))
    torch.testing.assert_close(got, model.lm_head(lm.norm(hidden)), atol=2e-5, rtol=1e-4)
    assert session.pictures[0].layer_keep[1].tolist() == [0, 4, 8, 12]
    assert session.pictures[0].mean_tokens(4) == (16 + 3 * 4) / 4


class Wrong(Spread):
    def compress(self, evidence, keep):
        return Reduction(torch.zeros(1, 2), evidence.features[:, :3], torch.zeros(1, 16))


@dataclass(frozen=True)
class WrongPlan(Spread):
    plan: Schedule = None

    def schedule(self, num_tokens, keep, num_layers):
        return self.plan


@torch.no_grad()
def test_what_a_faulty_reducer_returns_is_named():
    inputs = prompt(LLAVA, [[0]]).inputs
    for method, message in (
        (Wrong(), r"Wrong: returned keep \(1, 2\), tokens \(1, 3, 48\)"),
        (WrongPlan(Schedule(17)), "input is 17"),
        (WrongPlan(Schedule(4, {9: 2})), "before layer 9"),
        (WrongPlan(Schedule(4, {1: 5})), "5 tokens from layer 1 on"),
    ):
        with apply(LLAVA.model, method, keep=0.25), pytest.raises(ValueError, match=message):
            LLAVA.model(**inputs)


@torch.no_grad()
def test_layers_are_given_no_positions_with_gaps():
    """Flash attention takes gaps in position ids for the seams of packed sequences."""
    seen = []
    hook = lambda m, a, k: seen.append((k["hidden_states"].shape[1], k.get("position_ids")))  # noqa: E731
    for family in (LLAVA, FAMILIES["qwen2-vl"]):
        layers = family.model.model.language_model.layers
        handles = [layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        with apply(family.model, Staged(0.5, {2: 0.25}), keep=0.25):
            family.model(**prompt(family, [[0]]).inputs)
        for handle in handles:
            handle.remove()
    assert len(seen) == 8
    assert all(positions is None for _, positions in seen)


@torch.no_grad()
def test_eager_attention_gives_the_same():
    eager = copy.deepcopy(LLAVA.model)
    eager.set_attn_implementation("eager")
    batch = prompt(LLAVA, [[0, 0], [0]])
    for method in (Spread(), Staged(0.5, {1: 0.25})):
        with apply(LLAVA.model, method, keep=0.25):
            want = LLAVA.model.generate(**batch.inputs, max_new_tokens=5, do_sample=False)
        with apply(eager, method, keep=0.25):
            assert torch.equal(eager.generate(**batch.inputs, max_new_tokens=5, do_sample=False), want)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.inference_mode()
def test_half_precision(family):
    model, batch = copy.deepcopy(family.model).bfloat16(), prompt(family, [[0, family.sizes - 1], [0]])
    wants = dict.fromkeys(("cls_attention", "encoder_keys", "received_attention"), -2) | {"encoder_features": None}
    method = Staged(0.5, {2: 0.25}, {"llm_attention": "text", "llm_received": None})
    with apply(model, [Asks(wants), method], keep=0.5) as session:
        out = model.generate(**batch.inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == batch.inputs["input_ids"].shape[1] + 3
    assert session.tokens_kept < session.tokens_in


@torch.no_grad()
def test_text_alone_passes_through():
    model = LLAVA.model
    ids = torch.tensor([[1, 30, 31, 32]])
    plain = model(input_ids=ids).logits
    with apply(model, Spread(), keep=0.25) as session:
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert session.pictures == [] and session.tokens_in == 0


@torch.no_grad()
def test_a_prompt_of_embeddings():
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
    with apply(model, Asks({"text": None}), keep=0.25):
        want = model(**batch.inputs).logits
        got = model(inputs_embeds=embeds, pixel_values=batch.inputs["pixel_values"]).logits
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", [pytest.param(f, id=name) for name, f in FAMILIES.items() if name != "qwen3.5"])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(family):
    batch = prompt(family, [[0], [family.sizes - 1, 0]])
    for method in (Spread(), Staged(0.5, {1: 0.25, 3: 0.1})):
        with apply(family.model, method, keep=0.25) as session, FlopCounterMode(display=False) as counter:
            family.model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
        assert session.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
        assert min(session.report()["flops_by_stage"].values()) > 0


@torch.no_grad()
def test_reports_are_plain_and_times_are_spent():
    with apply(LLAVA.model, Staged(0.5, {1: 0.25}), keep=0.25) as session:
        LLAVA.model.generate(**prompt(LLAVA, [[0], [0, 0]]).inputs, max_new_tokens=3, do_sample=False)
    report = json.loads(json.dumps(session.report()))
    assert report["tokens_in"] == 48 and report["tokens_kept"] == 24
    assert [(p["row"], p["index"], p["tokens_kept"]) for p in report["pictures"]] == [(0, 0, 8), (1, 0, 8), (1, 1, 8)]
    assert set(report["milliseconds"]) == {"vision", "select", "prefill", "decode"}
    assert min(report["milliseconds"].values()) > 0


@torch.no_grad()
def test_crops_are_reduced_one_by_one_unless_the_method_wants_the_whole():
    class ByCrop(Asks):
        whole_picture = False

    family = FAMILIES["llava-next"]
    method = ByCrop({"cls_attention": -2})
    with apply(family.model, method, keep=0.25) as session:
        family.model(**prompt(family, [[1], [1]]).inputs)
    assert [e.grid for e in method.seen] == [(4, 4)] + 4 * [(3, 4)]
    assert all(len(e.features) == 2 and e.cls_attention.shape[2] == e.num_tokens for e in method.seen)
    starts = [0, 16, 28, 40, 52]
    want = [start + i for start, n in zip(starts, (16, 12, 12, 12, 12), strict=True) for i in spread(n, n // 4)]
    assert session.pictures[1].keep.tolist() == want


@torch.no_grad()
def test_a_method_may_say_that_positions_close_up():
    class Closes(Spread):
        position = "recompact"

    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    logits = []
    for method, position in ((Closes(), None), (Spread(), "recompact"), (Closes(), "keep"), (Spread(), None)):
        with apply(model, method, keep=0.25, position=position):
            logits.append(model(**batch.inputs).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[2], logits[3])
    assert not torch.allclose(logits[0], logits[2])


@torch.no_grad()
def test_two_methods_at_one_layer():
    """The second sees what the first left, its attention included."""
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    first, second = Staged(1.0, {2: 0.5}), Staged(1.0, {2: 0.25}, {"llm_attention": "last"})
    with apply(model, [first, second], keep=1.0) as session:
        model(**batch.inputs)
    (picture,), ((_, evidence),) = session.pictures, second.seen
    assert picture.layers == {2: 4} and evidence.num_tokens == 8
    assert picture.layer_keep[2].tolist() == [spread(16, 8)[i] for i in spread(8, 4)]
    columns = torch.tensor(batch.columns[0][0])
    full = eager_maps(LLAVA, batch.inputs)[0][2][0, :, -1]
    left, gone = columns[spread(16, 8)], columns[[i for i in range(16) if i not in spread(16, 8)]]
    want = full[:, left] / (1 - full[:, gone].sum(1, keepdim=True))
    torch.testing.assert_close(evidence.llm_attention[0, :, 0], want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_keep_all_is_bit_equal_for_staged_methods_too():
    for family in (LLAVA, FAMILIES["qwen3-vl"]):
        batch = prompt(family, [[0], [0, 0]])
        plain = family.model(**batch.inputs).logits
        with apply(family.model, Staged(1.0, {1: 1.0, 2: 1.0}, {"llm_attention": "text"}), keep=1.0):
            assert torch.equal(family.model(**batch.inputs).logits, plain)


# Overlay -----------------------------------------------------------------------------------------------------------


def brightness(image):
    return np.asarray(image, float).mean(2)


@torch.no_grad()
def test_overlay_darkens_what_was_dropped():
    with apply(LLAVA.model, Spread(), keep=0.25) as session:
        LLAVA.model(**prompt(LLAVA, [[0]]).inputs)
    white = Image.new("RGB", (80, 40), "white")
    drawn = brightness(session.overlay(white))
    assert drawn.shape == (40, 80)
    cells = drawn.reshape(4, 10, 4, 20).transpose(0, 2, 1, 3).reshape(16, -1)
    assert (cells == cells[:, :1]).all()
    assert [i for i in range(16) if cells[i, 0] == 255] == session.pictures[0].keep.tolist()
    assert sorted(set(cells[:, 0])) == [56, 255]
    cropped = brightness(session.overlay(white, fit="crop"))
    assert (cropped[:, :20] == 56).all() and (cropped[:, 60:] == 56).all() and (cropped[:, 20:60] == 255).any()
    with pytest.raises(ValueError, match="picture: got 1"):
        session.overlay(white, 1)
    with pytest.raises(ValueError, match="fit: got 'pad'"):
        session.overlay(white, fit="pad")


@torch.no_grad()
def test_overlay_tints_what_was_merged():
    with apply(LLAVA.model, Mean(), keep=0.25) as session:
        LLAVA.model(**prompt(LLAVA, [[0]]).inputs)
    pixels = np.asarray(session.overlay(Image.new("RGB", (40, 40), "white")))
    rows = pixels[::10].reshape(4, -1, 3)
    assert all((row == row[0]).all() for row in rows)  # each row of the grid was merged into one token
    assert len({tuple(row[0]) for row in rows}) == 4 and all(len(set(row[0].tolist())) > 1 for row in rows)


@torch.no_grad()
def test_overlay_of_pictures_in_crops():
    family = FAMILIES["llava-next"]

    class OneOfEach(Reducer):
        """The first token of the thumbnail and the last of the last crop."""

        whole_picture = True

        def select(self, evidence, keep):
            return torch.tensor([[0, evidence.num_tokens - 1]])

    with apply(family.model, OneOfEach(), keep=2) as session:
        family.model(**prompt(family, [[1]]).inputs)
    drawn = brightness(session.overlay(Image.new("RGB", (80, 60), "white")))  # crops: 6 rows of 8 tokens
    assert drawn[59, 79] == drawn[50, 70] == 255 and drawn[59, 69] == drawn[49, 79] == 56
    assert drawn[0, 0] == drawn[14, 19] == 153 and drawn[15, 19] == drawn[14, 20] == 56
    family = FAMILIES["internvl"]
    with apply(family.model, OneOfEach(), keep=2) as session:
        family.model(**prompt(family, [[1]]).inputs)
    drawn = brightness(session.overlay(Image.new("RGB", (80, 40), "white")))  # two tiles side by side
    assert drawn[39, 79] == 255 and drawn[39, 69] == 56 and drawn[0, 0] == 153
    drawn = brightness(session.overlay(Image.new("RGB", (40, 80), "white")))  # one above the other
    assert drawn[79, 39] == 255 and drawn[79, 29] == 56 and drawn[69, 39] == 56

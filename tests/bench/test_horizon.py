"""Information of visual tokens against the plain model run by hand, and horizons of models made to have one."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.host.families import FAMILIES, TEXT, VISION, prompt
from tests.host.reference import language_inputs, one_row, run
from vistok.bench import horizon as measured
from vistok.bench.compare import case_of
from vistok.bench.horizon import (
    Change,
    From,
    LayerProfile,
    Profile,
    answer_probability,
    append,
    draw,
    horizon,
    layer_profile,
    none,
    only,
    token_information,
    window_information,
    with_answers,
)
from vistok.bench.measure import Case
from vistok.world import sample

LLAVA = FAMILIES["llava-clip"]
TARGETS = [torch.tensor([30, 31, 32]), torch.tensor([33])]


def asked(targets, rows=((0,), (0,))):
    """A padded batch of prompts that end in answers, and its prompt's columns of visual tokens."""
    batch = prompt(LLAVA, [list(row) for row in rows])
    return append(batch.inputs, targets), batch


def by_hand(inputs, targets, row, layer, left, model=None):
    """The probability from the plain model, row by row: of each picture only ``left`` goes on from ``layer``."""
    model = LLAVA.model if model is None else model
    mask = inputs["attention_mask"]
    single = one_row(language_inputs(model, **inputs), row, mask)
    ids = inputs["input_ids"][row, single["real"]]
    visual = (ids == 98).nonzero()[:, 0]
    gone = {*range(len(visual))} - {*left}
    stay = torch.tensor([c for c in range(len(ids)) if c not in {int(visual[i]) for i in gone}])
    places = torch.arange(len(ids))
    logits = run(model, single, places if layer else stay, {layer: stay} if layer else {})
    target = targets[row]
    logs = logits[-len(target) - 1 : -1].double().log_softmax(-1)
    return float(logs[torch.arange(len(target)), target].sum().exp())


def test_append_pads_on_the_left_and_answers_end_the_rows():
    inputs, batch = asked(TARGETS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    before = batch.inputs
    for row, target in enumerate(TARGETS):
        real = ids[row, mask[row].bool()].tolist()
        alone = before["input_ids"][row, before["attention_mask"][row].bool()].tolist()
        assert real == alone + target.tolist()
        assert ids[row, -len(target) :].tolist() == target.tolist()
        assert not mask[row].diff().lt(0).any()
    kinds = append({"input_ids": ids, "mm_token_type_ids": (ids == 98).int()}, TARGETS)["mm_token_type_ids"]
    assert kinds.sum() == 2 * 16 and kinds.dtype == torch.int32


@pytest.mark.parametrize("layer", range(5))
def test_removal_is_that_of_the_plain_model_on_what_is_left(layer):
    inputs, _ = asked(TARGETS)
    for choice, left in ((none, []), (only(torch.tensor([[2, 7, 11]])), [2, 7, 11])):
        found = answer_probability(LLAVA.model, inputs, TARGETS, From(layer, choice))
        left = range(16) if layer == 4 else left
        for row in range(2):
            assert float(found[row]) == pytest.approx(by_hand(inputs, TARGETS, row, min(layer, 3), left), rel=1e-4)


def test_behind_the_last_layer_nothing_changes():
    inputs, _ = asked(TARGETS)
    dense = answer_probability(LLAVA.model, inputs, TARGETS)
    assert torch.equal(dense, answer_probability(LLAVA.model, inputs, TARGETS, From(4, none)))
    one, _ = asked(TARGETS[:1], rows=((0,),))
    for mode in ("keep-one", "leave-one-out"):
        assert torch.equal(token_information(LLAVA.model, one, 4, TARGETS[0], mode), torch.zeros(16).double())


@pytest.mark.parametrize("layer", [0, 2])
def test_information_of_tokens_is_the_difference_by_hand(layer):
    inputs, _ = asked(TARGETS[:1], rows=((0,),))
    p = lambda left: by_hand(inputs, TARGETS, 0, layer, left)  # noqa: E731
    found = token_information(LLAVA.model, inputs, layer, TARGETS[0], batch_size=5)
    assert found.tolist() == pytest.approx([p([i]) - p([]) for i in range(16)], rel=1e-3, abs=1e-9)
    pairs = torch.tensor([[3, 4], [0, 15]])
    out = token_information(LLAVA.model, inputs, layer, TARGETS[0], "leave-one-out", pairs)
    expected = [p(range(16)) - p([i for i in range(16) if i not in pair]) for pair in pairs.tolist()]
    assert out.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert len({round(x, 12) for x in found.tolist()}) == 16


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode: got 'both'"):
        token_information(LLAVA.model, {}, 0, TARGETS[0], "both")


def test_the_only_token_is_worth_what_all_are():
    vision = tf.CLIPVisionConfig(**VISION, image_size=7, patch_size=7)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=98)
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 98, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 7, 7)}
    inputs = append(inputs, TARGETS[:1])
    for layer in range(4):
        (found,) = token_information(model, inputs, layer, TARGETS[0])
        effect = answer_probability(model, inputs, TARGETS[:1])
        effect = effect - answer_probability(model, inputs, TARGETS[:1], From(layer, none))
        assert float(found) == float(effect) != 0


@pytest.mark.parametrize("first", [1, 3])
def test_blocks_that_cannot_see_have_their_horizon_at_the_first(first):
    """From layer ``first`` on attention gives nothing."""
    blind = copy.deepcopy(LLAVA.model)
    for layer in blind.model.language_model.layers[first:]:
        layer.self_attn.o_proj.weight.data.zero_()
    inputs, _ = asked(TARGETS)
    dense = answer_probability(blind, inputs, TARGETS)
    changes = [dense - answer_probability(blind, inputs, TARGETS, From(layer, none)) for layer in range(5)]
    worst = [float(change.abs().max()) for change in changes]
    assert horizon(worst, 1e-9) == first
    assert worst[first] <= 1e-9 < worst[first - 1]


@given(st.lists(st.sampled_from([-0.3, -0.01, 0.0, 0.005, 0.02, 0.5]), max_size=8), st.sampled_from([0.0, 0.01, 0.1]))
def test_horizon_is_the_first_from_which_on_all_are_within(changes, eps):
    free = [all(abs(c) <= eps for c in changes[i:]) for i in range(len(changes) + 1)]
    assert horizon(changes, eps) == free.index(True)


def test_horizon_does_not_take_what_is_no_number_for_nothing():
    assert horizon([0.0, float("nan"), 0.0], 0.1) == 2
    with pytest.raises(ValueError, match="eps: got -1"):
        horizon([0.0], -1)


def test_interval_of_a_mean():
    change = Change.of(torch.tensor([0.1, 0.2, 0.6, 0.3]).double())
    deviation = ((0.2**2 + 0.1**2 + 0.3**2 + 0.0**2) / 3) ** 0.5
    assert (change.mean, change.high - change.mean) == pytest.approx((0.3, 1.959964 * deviation / 2))
    assert change.bound == change.high and Change(0, -0.2, 0.1).bound == 0.2
    assert Change.of(torch.tensor([0.0])) == Change(0.0, -1.0, 1.0)


def profile(removed, random):
    """A profile with these bounds."""
    rows = zip(removed, random, strict=True)
    return Profile(9, 0.5, tuple(LayerProfile(i, Change(a, -a, a), Change(b, -b, b)) for i, (a, b) in enumerate(rows)))


def test_what_the_reducer_takes_of_it():
    found = profile([0.5, 0.3, 0.2, 0.001, 0.0], [0.1, 0.0, 0.0, 0.0, 0.0])
    assert (found.horizon(0.01), found.random_horizon(0.01)) == (3, 1)
    assert found.hyper(0.01, 0.25) == {"stages": ((0.25, 0.25),), "horizon": 0.75}
    assert found.hyper(0.0, 0.25) == {"stages": ((0.25, 0.25),), "horizon": 1.0}
    never = profile([0.5, 0.3, 0.0], [0.5, 0.3, 0.0])
    assert never.hyper(0.01, 0.25) == {"stages": (), "horizon": 1.0}
    blind = profile([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    assert blind.hyper(0.01, 0.25) == {"stages": (), "horizon": 0.5}


@pytest.fixture(scope="module")
def cases():
    return [case_of(p, p.questions[0]) for p in sample("scenes", 3, split="test", questions=1)]


def test_the_profile_of_a_model(model, processor, cases, monkeypatch):
    """Against its parts; batches of two and one. Two layers, 196 tokens."""
    steps = []
    found = layer_profile(
        model, processor, cases, share=0.25, seeds=2, seed=1, batch_size=2, on_step=lambda: steps.append(1)
    )
    assert (found.questions, len(found.layers), len(steps)) == (3, 3, 6)
    assert found.layers[2].removed == found.layers[2].random == Change(0.0, 0.0, 0.0)
    whole = [with_answers(processor, [case]) for case in cases]
    dense = torch.cat([answer_probability(model, *one) for one in whole])
    assert found.probability == pytest.approx(float(dense.mean()), rel=1e-4)
    gone = torch.cat([answer_probability(model, *one, From(1, none)) for one in whole])
    assert found.layers[1].removed.mean == pytest.approx(float((dense - gone).mean()), rel=1e-3, abs=1e-9)
    few = [
        torch.cat([answer_probability(model, *one, From(1, measured._few(0.25, turn, 1))) for one in whole])
        for turn in (2, 3)
    ]
    assert measured._few(0.25, 2, 1)(196).shape == (1, 49)
    assert found.layers[1].random.mean == pytest.approx(float((dense - sum(few) / 2).mean()), rel=1e-3, abs=1e-9)
    eps = 1e-4
    effect = found.layers[found.horizon(eps)].removed
    assert abs(effect.mean) <= eps


def test_windows_are_groups_of_neighbours(model, processor, cases):
    inputs, (target,) = with_answers(processor, cases[:1])
    groups = [[14 * (y + dy) + x + dx for dy in range(7) for dx in range(7)] for y in (0, 7) for x in (0, 7)]
    alone = token_information(model, inputs, 1, target, tokens=torch.tensor(groups))
    found = window_information(model, processor, cases[0], 1, 7)
    assert found == pytest.approx((float(alone.mean()), float(alone.std(unbiased=False))))
    with pytest.raises(ValueError, match="window: got 15"):
        window_information(model, processor, cases[0], 1, 15)


def test_a_case_without_truth_is_refused(processor, cases):
    with pytest.raises(ValueError, match="truth"):
        with_answers(processor, [replace(cases[0], truth=None), Case(cases[0].picture, "what?")])


def test_the_picture_can_be_opened():
    png = draw(profile([0.5, 0.3, 0.0], [0.1, 0.0, 0.0]), 0.01, 0.25, "a title")
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG" and picture.width > 600

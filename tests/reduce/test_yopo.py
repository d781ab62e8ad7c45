"""YOPO: its pattern, its heads against brute force, and what it does to a model. Its parts are tested in
tests/core/test_effort.py and tests/host/test_effort.py."""

from __future__ import annotations

import pytest
import torch

import vistok
from tests.host.families import FAMILIES, IMAGE, prompt
from tests.host.plain import eager_maps
from tests.host.reference import language_inputs, one_row
from tests.host.test_effort import Works, by_hand, grids
from tests.reduce.synthetic import Trial
from vistok.host.effort import LayerEffort
from vistok.reduce import yopo
from vistok.reduce.yopo import YOPO, inactive_heads

LLAVA = FAMILIES["llava-clip"]
HEADS = ((), (), (1,), (0, 2))


def test_the_pattern_of_the_released_script():
    assert (YOPO().stop(40), YOPO(depth=5 / 8).stop(32), YOPO(depth=1).stop(32)) == (20, 20, 32)
    assert (
        YOPO().layers(40, 40)
        == [LayerEffort(5, units=0.5)] * 20 + [LayerEffort(5, units=0.5, blind=tuple(range(40)))] * 20
    )
    given = YOPO(3, 4, 1, HEADS, causal=True).layers(4, 4)
    assert given == [LayerEffort(3, True, 0.25, heads, heads) for heads in HEADS]


def test_layer_cut_of_the_released_code_leaves_tokens_that_nobody_reads():
    system = YOPO(inactive=HEADS, parity="authors")
    assert system.stop(4) == 4 and system.schedule(16, 4, 4).layers == {}
    assert [(e.blind, e.silent) for e in system.layers(4, 4)] == [
        ((), ()), ((), ()), ((0, 1, 2, 3), (1,)), ((0, 1, 2, 3), (0, 2))
    ]  # fmt: skip


@pytest.mark.parametrize("parity", ["paper", "authors"])
@torch.no_grad()
def test_in_a_model(parity):
    """Logits as by hand. By default the upper layers hold text only; in the released form, all."""
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    system = YOPO(3, 2, 1 / 2, ((), (3,), (1,), (0, 2)), parity=parity)
    with vistok.apply(model, system, keep=4) as session:
        out = model(**batch.inputs)
    (picture,) = session.pictures
    assert picture.tokens_kept == 16 and picture.layers == ({2: 0} if parity == "paper" else {})
    length = batch.inputs["input_ids"].shape[1]
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers[2:]] == [length - 16 * (parity == "paper")] * 2
    single = one_row(language_inputs(model, **batch.inputs), 0, batch.inputs["attention_mask"])
    works = Works(system.layers(4, 4), system.stop(4))
    expected = by_hand(model, single, [(grids([picture])[0][0], batch.columns[0][0])], works)
    torch.testing.assert_close(out.logits[0, -2:], expected[-2:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [pytest.param(f, id=name) for name, f in FAMILIES.items() if f.effort])
@torch.no_grad()
def test_every_host_keeps_all_tokens_for_half_of_the_layers(family):
    batch = prompt(family, [[0], [0, 0]])
    with vistok.apply(family.model, "yopo") as session:
        logits = family.model(**batch.inputs).logits
    assert bool(logits.isfinite().all()) and len(session.pictures) == 3
    assert all((p.tokens_kept, p.layers) == (p.tokens_in, {2: 0}) for p in session.pictures)


@torch.no_grad()
def test_composed_with_a_reducer_which_alone_spends_the_budget():
    with vistok.apply(LLAVA.model, ["fastervlm", YOPO()], keep=0.25) as session:
        LLAVA.model(**prompt(LLAVA, [[0]]).inputs)
    assert session.tokens_kept == 4


def test_inactive_heads_are_those_of_the_maps():
    samples = [prompt(LLAVA, rows).inputs for rows in ([[0], [0, 0]], [[0]])]
    ratios = []
    for inputs in samples:
        maps = eager_maps(LLAVA, inputs)[0]
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            sample = []
            for attention in maps:
                rows = attention[row][:, mask.bool()].sum(1)
                visual = rows[:, ids == IMAGE].sum(1)
                sample.append((visual / rows[:, ids != IMAGE].sum(1)).tolist())
            ratios.append(sample)
    threshold = sorted(r for sample in ratios for layer in sample[1:] for r in layer)[len(ratios) * 6]
    found = inactive_heads(LLAVA.model, samples, threshold, votes=0.4, always=1)
    expected = [
        tuple(h for h in range(4) if layer and sum(s[layer][h] > threshold for s in ratios) <= 0.4 * len(ratios))
        for layer in range(4)
    ]
    assert found == tuple(expected)
    assert found[0] == () and 0 < sum(map(len, found)) < 12
    assert LLAVA.model.model.language_model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="samples: got none"):
        inactive_heads(LLAVA.model, [], 0.1)


MISTAKES = [
    ({"window": 4}, "window: got 4, must be odd"),
    ({"ffn_ratio": 0.5}, "ffn_ratio: got 0.5"),
    ({"depth": 0}, "depth: got 0"),
    ({"parity": "mine"}, "parity: got 'mine'"),
]


@pytest.mark.parametrize(("hyper", "message"), MISTAKES)
def test_mistakes_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        YOPO(**hyper)


def test_heads_of_another_model_are_named():
    with pytest.raises(ValueError, match="inactive: got 3 layers, the model has 4"):
        vistok.apply(LLAVA.model, "yopo", inactive=((), (), (1,)))
    with pytest.raises(ValueError, match=r"inactive: got head 4, the model has heads 0\.\.3"):
        vistok.apply(LLAVA.model, "yopo", inactive=((), (), (1,), (4,)))


def test_claim_is_accuracy_and_speed():
    def outcome(accuracy, milliseconds):
        trial = Trial(dense=0.8, YOPO=accuracy)
        trial.ttft_ms = lambda method, keep=1.0: 30.0 if method is None else milliseconds
        return yopo.claim(trial)

    assert outcome(0.785, 20).holds and "1.50 times" in outcome(0.785, 20).note
    assert not outcome(0.78, 20).holds and not outcome(0.785, 31).holds

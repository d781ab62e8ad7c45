"""VTC-CLS against NumPy, and what its sheet says must hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reduce.synthetic import DEPTH, Trial, evidence, permuted
from vistok.host.reducer import Evidence
from vistok.reduce import vtc_cls
from vistok.reduce.fastervlm import FasterVLM
from vistok.reduce.vtc_cls import VTCCLS


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 12), st.integers(0, 4))
def test_equals_numpy(seed, layers, n, start):
    """On multiples of 1/8, whose sums are exact in any order: many scores tie."""
    start = min(start, layers - 2)
    rng = np.random.default_rng(seed)
    attention = rng.integers(0, 5, (layers, 2, 4, n)) / 8
    method = VTCCLS(start_layer=start)
    asked = range(layers)[method.needs["cls_attention"]]
    assert list(asked) == list(range(start, layers - 1))
    given = Evidence(
        features=torch.zeros(2, n, 1), cls_attention=tuple(torch.from_numpy(attention[layer]) for layer in asked)
    )
    score = attention[start : layers - 1].mean(2).sum(0)
    for keep in range(1, n):
        expected = np.sort(np.argsort(-score, axis=1, kind="stable")[:, :keep], axis=1)
        assert method.reduce(given, keep).keep.tolist() == expected.tolist()


def test_one_layer_is_fastervlm():
    one = evidence(VTCCLS(start_layer=DEPTH - 2), seed=3)
    faster = evidence(FasterVLM(), seed=3)
    assert len(one.cls_attention) == 1 and torch.equal(one.cls_attention[0], faster.cls_attention)
    assert all(
        torch.equal(VTCCLS(start_layer=DEPTH - 2).reduce(one, k).keep, FasterVLM().reduce(faster, k).keep)
        for k in (1, 9, 30)
    )


def test_default_is_the_deeper_half_of_the_layers_before_the_last():
    """Of CLIP-L's 24 layers: 11 to 22."""
    rows = torch.zeros(23, 1, 1, 30)
    rows[range(23), 0, 0, range(23)] = 1.0  # layer l looks at token l
    given = Evidence(features=torch.zeros(1, 30, 1), cls_attention=tuple(rows))
    assert len(range(24)[VTCCLS().needs["cls_attention"]]) == 23
    assert VTCCLS().reduce(given, 12).keep.tolist() == [list(range(11, 23))]


def test_a_tower_of_two_layers_still_has_one():
    given = Evidence(features=torch.zeros(1, 3, 1), cls_attention=(torch.tensor([[[0.1, 0.3, 0.2]]]),))
    assert VTCCLS().reduce(given, 1).keep.tolist() == [[1]]


def test_a_common_factor_does_not_matter():
    given = evidence(VTCCLS())
    scaled = replace(given, cls_attention=tuple(4 * layer for layer in given.cls_attention))
    assert torch.equal(VTCCLS().reduce(given, 16).keep, VTCCLS().reduce(scaled, 16).keep)


def test_rows_are_not_renormalised():
    """A layer whose class token looks mostly at itself has little say."""
    loud, quiet = torch.tensor([[[0.5, 0.4, 0.1]]]), torch.tensor([[[0.001, 0.002, 0.009]]])
    given = Evidence(features=torch.zeros(1, 3, 1), cls_attention=(quiet, loud))
    assert VTCCLS(start_layer=0).reduce(given, 1).keep.tolist() == [[0]]


def test_follows_the_tokens_where_they_are_shuffled():
    given, order = evidence(VTCCLS()), torch.randperm(64, generator=torch.Generator().manual_seed(4))
    plain, shuffled = VTCCLS().reduce(given, 9), VTCCLS().reduce(permuted(given, order), 9)
    assert torch.equal(order[shuffled.keep].sort(1).values, plain.keep)


@pytest.mark.parametrize(("ensemble", "kept"), [("sum", [1]), ("max", [0]), ("min", [2])])
def test_ensembles(ensemble, kept):
    one, other = torch.tensor([[[0.0, 0.2, 0.3, 0.0]]]), torch.tensor([[[0.6, 0.5, 0.3, 0.0]]])
    given = Evidence(features=torch.zeros(1, 4, 1), cls_attention=(one, other))
    assert VTCCLS(start_layer=0, ensemble=ensemble).reduce(given, 1).keep.tolist() == [kept]


def test_unknown_ensemble_is_refused():
    with pytest.raises(ValueError, match="ensemble: got 'mean', must be 'sum', 'min' or 'max'"):
        VTCCLS(ensemble="mean")


def test_claim_is_several_layers_over_one():
    assert vtc_cls.claim(Trial(VTCCLS=0.5, FasterVLM=0.5)).holds
    assert not vtc_cls.claim(trial := Trial(VTCCLS=0.49, FasterVLM=0.5)).holds
    assert {call[2] for call in trial.calls} == {1 / 9}

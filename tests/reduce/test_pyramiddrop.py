"""PyramidDrop against a plain ranking in stages, and against the attention maps of a model that ran without it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial, evidence
from tests.reduce.test_fastv import last_rows
from vistok.reduce import pyramiddrop
from vistok.reduce.pyramiddrop import PyramidDrop


@pytest.mark.parametrize("keep", [0, 1, 9, 24])
def test_stage_against_a_plain_ranking(keep):
    given = evidence(PyramidDrop(), (4, 6))
    reduction = PyramidDrop().at_layer(given, keep, 8)
    for i, kept in enumerate(reduction.keep.tolist()):
        score = [sum(float(head[0, j]) for head in given.llm_attention[i]) for j in range(24)]
        assert kept == sorted(sorted(range(24), key=lambda j: -score[j])[:keep])
        assert torch.equal(reduction.tokens[i], given.features[i, kept])


def test_order_of_heads_does_not_matter_and_a_larger_count_keeps_a_superset():
    given = evidence(PyramidDrop(), (4, 6))
    turned = replace(given, llm_attention=given.llm_attention[:, [2, 0, 3, 1]])
    sets = [{*PyramidDrop().at_layer(given, k, 8).keep[0].tolist()} for k in range(25)]
    assert all(a < b for a, b in pairwise(sets))
    assert torch.equal(PyramidDrop().at_layer(turned, 9, 8).keep, PyramidDrop().at_layer(given, 9, 8).keep)


def test_counts_of_the_paper():
    schedule = PyramidDrop().schedule(576, 270, 32)
    assert (schedule.input, dict(schedule.layers)) == (576, {8: 288, 16: 144, 24: 72})
    assert schedule.mean(32) == 270
    assert PyramidDrop(ratio=1).schedule(576, 432, 32).layers == {8: 384, 16: 384, 24: 384}


def test_other_means_scale_the_stages_and_small_ones_move_them():
    deep = PyramidDrop().schedule(576, 400, 32)
    assert dict(deep.layers) == {8: 576, 16: 299, 24: 149} and deep.mean(32) == 400
    moved = PyramidDrop().schedule(576, 128, 32)
    assert list(moved.layers) == [5, 14, 23] and abs(moved.mean(32) - 128) < 0.5
    first, second, third = moved.layers.values()
    assert abs(second - first / 2) <= 1 and abs(third - second / 2) <= 1


@torch.no_grad()
def test_first_stage_is_the_dense_model_s_ranking():
    family = FAMILIES["llava-clip"]
    batch = prompt(family, [[0], [0, 0]])
    rows = last_rows(family, batch.inputs, 1)
    with vistok.apply(family.model, "pyramiddrop", keep=8) as session:
        family.model(**batch.inputs)
    for picture in session.pictures:
        score = rows[picture.row, batch.columns[picture.row][picture.index]]
        left = picture.layers[1]
        assert torch.equal(picture.layer_keep[1], score.topk(left).indices.sort().values)
        assert list(picture.layers) == [1, 2, 3] and {*picture.layer_keep[3].tolist()} < {
            *picture.layer_keep[2].tolist()
        }


@pytest.mark.parametrize(
    ("name", "wrong"), [("ratio", 0.0), ("ratio", 1.5), ("depths", ()), ("depths", (0.5, 0.2)), ("depths", (0.0, 0.5))]
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        PyramidDrop(**{name: wrong})


def test_claim():
    assert pyramiddrop.claim(Trial(dense=0.8, PyramidDrop=0.795)).holds
    outcome = pyramiddrop.claim(trial := Trial(dense=0.8, PyramidDrop=0.78))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.78)
    assert [keep for _, method, keep, _ in trial.calls if method] == [15 / 32]

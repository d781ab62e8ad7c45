"""What a method chose by, written down: the method itself does what it does unwatched, and no score is made up."""

from __future__ import annotations

import pytest
import torch

import vistok
from tests.host.families import FAMILIES, prompt
from vistok.catalogue import card, methods
from vistok.core.score import cls_mean
from vistok.host.effort import Effort
from vistok.host.recipe import swap
from vistok.host.watch import Watched

NAMES = [c.slug for c in methods("reduce") if not isinstance(vistok.create(c.slug), Effort)]
SCORED = {
    "adatoken-3d", "agilepruner", "attention-debias", "cdpruner", "fastervlm", "fastv", "flashvlm", "fopru",
    "globalcom2", "hiprune", "hired", "holov", "prumerge", "pyramiddrop", "sparsevlm", "todre", "vflowopt",
    "visiondrop", "visionzip", "vtc-cls", "zoo-prune",
}  # fmt: skip
"""Those that score tokens at their first stage."""


def watch(name, keep=0.3, family="llava-clip"):
    model, watched = FAMILIES[family].model, Watched(vistok.create(name))
    with torch.no_grad(), vistok.apply(model, watched, keep=keep) as session:
        logits = model(**prompt(FAMILIES[family], [[0]]).inputs).logits
    return watched.seen, session.pictures[0], logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
def test_a_watched_method_does_what_it_does_unwatched(name, family):
    model = FAMILIES[family].model
    with torch.no_grad(), vistok.apply(model, name, keep=0.3) as session:
        logits = model(**prompt(FAMILIES[family], [[0]]).inputs).logits
    seen, picture, watched = watch(name, family=family)
    plain = session.pictures[0]
    assert torch.equal(logits, watched)
    assert torch.equal(plain.keep, picture.keep) and torch.equal(plain.source, picture.source)
    assert plain.layers == picture.layers
    assert seen and [choice.layer for choice in seen if choice.layer is not None] == sorted(
        layer for layer, left in plain.layers.items() if layer in {choice.layer for choice in seen}
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_score_is_told_where_the_method_has_one_and_nowhere_else(name):
    first = watch(name)[0][0]
    assert (first.scores is not None) == (name in SCORED), card(name).score
    if first.scores is not None:
        order = sorted(range(first.scores.shape[1]), key=lambda i: (-float(first.scores[0, i]), i))
        assert [int(first.ranks[0, i]) for i in order] == list(range(1, len(order) + 1))
    else:
        assert first.ranks is None


@pytest.mark.parametrize("name", ["fastervlm", "fastv", "pyramiddrop", "vtc-cls"])
def test_of_a_plain_ranking_the_best_ranks_stay(name):
    seen, picture, _ = watch(name)
    for choice in seen:
        left = picture.keep if choice.layer is None else picture.layer_keep[choice.layer]
        best = choice.index[0][choice.ranks[0] <= len(left)]
        assert best.sort().values.tolist() == left.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_where_each_token_went_agrees_with_the_reduction(name):
    seen, picture, _ = watch(name)
    first = seen[0]
    if first.layer is not None:
        left = picture.layer_keep[first.layer]
        assert set(first.into[0][first.into[0] >= 0].tolist()) == set(left.tolist())
        return
    expected = torch.where(picture.source < 0, -1, picture.keep[picture.source.clamp(min=0)])
    assert torch.equal(first.into[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_order_of_choice_is_told_of_greedy_methods_only_and_a_smaller_budget_begins_alike(name):
    few, many = watch(name, keep=4)[0][0].order, watch(name, keep=8)[0][0].order
    assert (few is not None) == (name in {"cdpruner", "divprune", "todre", "zoo-prune"})
    if few is not None:
        assert many[0, :4].tolist() == few[0].tolist()
        assert sorted(few[0].tolist()) == watch(name, keep=4)[1].keep.tolist()


def test_a_swapped_score_is_told_and_a_plain_one_is_not():
    plain = swap(vistok.create("fastervlm"), select="uniform")
    longest = swap(vistok.create("fastervlm"), score="token_norm")
    model = FAMILIES["llava-clip"].model
    for reducer, has in ((plain, False), (longest, True)):
        watched = Watched(reducer)
        with torch.no_grad(), vistok.apply(model, watched, keep=5):
            model(**prompt(FAMILIES["llava-clip"], [[0]]).inputs)
        assert (watched.seen[0].scores is not None) == has


def test_of_a_cut_picture_each_part_is_a_choice_of_its_own():
    seen, picture, _ = watch("fastervlm", family="llava-next")
    assert len(seen) == len(picture.crops)
    assert sorted(torch.cat([choice.index[0] for choice in seen]).tolist()) == list(range(picture.tokens_in))


def test_a_method_that_chooses_nothing_is_refused():
    with pytest.raises(ValueError, match="which keeps all tokens and chooses none"):
        Watched(vistok.create("yopo"))


def test_class_attention_is_what_fastervlm_is_shown():
    seen = []

    class Shown(type(vistok.create("fastervlm"))):
        def scores(self, evidence):
            seen.append(cls_mean(evidence.cls_attention))
            return super().scores(evidence)

    watched = Watched(Shown())
    model = FAMILIES["llava-clip"].model
    with torch.no_grad(), vistok.apply(model, watched, keep=5):
        model(**prompt(FAMILIES["llava-clip"], [[0]]).inputs)
    assert torch.equal(watched.seen[0].scores, seen[0])

"""Recipes: the chain, its named steps, and that a swapped step changes that step and nothing else."""

from __future__ import annotations

import doctest
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import evidence, rows
from vistok.catalogue import methods
from vistok.core.score import text_similarity
from vistok.host import recipe
from vistok.host.choices import CHOICES, SLOTS, chunks, crops, equal, facility, quality
from vistok.host.recipe import Recipe, Swapped, steps_of, swap
from vistok.host.reducer import Evidence
from vistok.reduce.agilepruner import AgilePruner
from vistok.reduce.cdpruner import CDPruner
from vistok.reduce.divprune import DivPrune
from vistok.reduce.fastervlm import FasterVLM
from vistok.reduce.globalcom2 import GlobalCom2
from vistok.reduce.hiprune import HiPrune
from vistok.reduce.hired import HiRED
from vistok.reduce.holov import HoloV
from vistok.reduce.random import Random
from vistok.reduce.todre import ToDRE
from vistok.reduce.uniform import Uniform
from vistok.reduce.visionzip import VisionZip
from vistok.reduce.vtc_cls import VTCCLS

CROPS = ((4, 4), (4, 4), (3, 5))
RECIPES = [c.slug for c in methods("reduce") if isinstance(vistok.create(c.slug), Recipe)]
NAMED = [(slot, name) for slot in SLOTS for name in CHOICES[slot]]


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("keep", "tokens", "source"))


def check(reducer, shown, keep):
    """Form of a reduction: the count, ascending places, and that ``source`` agrees (but in the author's order)."""
    reduction = reducer.reduce(shown, keep)
    b, n = shown.features.shape[:2]
    assert reduction.keep.shape == (b, keep) and reduction.tokens.shape[:2] == (b, keep)
    assert bool((reduction.keep.diff(dim=1) > 0).all()) and reduction.source.shape == (b, n)
    assert int(reduction.keep.min()) >= 0 and int(reduction.keep.max()) < n
    assert bool((reduction.source >= -1).all()) and bool((reduction.source < keep).all())
    assert bool(reduction.tokens.isfinite().all())
    if getattr(reducer, "order", "raster") == "raster":
        assert torch.equal(reduction.source.gather(1, reduction.keep), torch.arange(keep).expand(b, keep))
    return reduction


def fits(name, slot, step):
    """``name`` with ``step``, or None where it is refused."""
    method = vistok.create(name)
    return swap(method, **{slot: step}) if step in steps_of(method)[slot].choices else None


# A swap that is none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_its_own_steps_by_any_name_change_nothing(name):
    """Each slot swapped for the step that it has: by name where it has one, borrowed from itself where it has not."""
    method = vistok.create(name)
    shown, whole = evidence(method), evidence(method, crops=CROPS)
    if method.one_at_a_time:
        shown, whole = rows(shown, [0]), rows(whole, [0])
    for slot, (step, choices) in steps_of(method).items():
        by_name = step if step != "own" else name if name in choices else None
        if by_name is None or not choices:
            continue
        other = swap(method, **{slot: by_name})
        assert isinstance(other, Swapped)
        for given_ in (shown, whole):
            for keep in (1, 7, 16, given_.num_tokens - 1, given_.num_tokens):
                assert same(method.reduce(given_, keep), other.reduce(given_, keep)), (slot, keep)


def test_own_is_the_recipe_itself():
    assert swap(HoloV(), select="own") == HoloV() == swap(HoloV())
    once = swap(HoloV(), select="max_sum", allocate="none")
    assert swap(once, select="own") == swap(HoloV(), allocate="none")
    assert swap(once, select="own", allocate="own") == HoloV()
    assert steps_of(once)["select"].step == "max_sum" and steps_of(once)["score"].step == "own"


@pytest.mark.parametrize("parts", [(), CROPS])
def test_holov_in_one_group_is_fastervlm(parts):
    shown = evidence(FasterVLM(), crops=parts)
    for keep in (1, 7, 20, 46):
        assert same(swap(HoloV(), allocate="none").reduce(shown, keep), FasterVLM().reduce(shown, keep))
        assert same(swap(FasterVLM(), allocate="holov").reduce(shown, keep), HoloV().reduce(shown, keep))
        assert same(swap(HoloV(), allocate="chunks").reduce(shown, keep), HoloV(beta=0).reduce(shown, keep))


def test_what_visionzip_is_without_its_merge_and_without_its_order():
    shown = evidence(VisionZip())
    alone = swap(VisionZip(), merge="none").reduce(shown, 16)
    assert torch.equal(alone.keep, VisionZip().reduce(shown, 16).keep)
    assert torch.equal(alone.tokens, shown.encoder_features.gather(1, alone.keep[..., None].expand(-1, -1, 24)))
    ranked = swap(VisionZip(), select="topk", merge="none")
    assert torch.equal(ranked.reduce(shown, 16).keep, FasterVLM().reduce(shown, 16).keep)
    assert set(ranked.needs) == {"encoder_features", "cls_attention"}
    released = VisionZip(parity="authors")
    assert same(swap(VisionZip(), order="author").reduce(shown, 16), released.reduce(shown, 16))
    assert same(swap(released, order="raster").reduce(shown, 16), VisionZip().reduce(shown, 16))


@pytest.mark.parametrize("parts", [(), CROPS])
def test_what_other_methods_are_made_of(parts):
    shown = evidence(swap(CDPruner(), score="fastervlm", merge="visionzip"), crops=parts)
    both = evidence(CDPruner(), crops=parts)
    for keep in (1, 7, 16, 46):
        assert same(swap(DivPrune(), select="max_min").reduce(shown, keep), DivPrune().reduce(shown, keep))
        assert same(swap(CDPruner(), select="dpp").reduce(both, keep), CDPruner().reduce(both, keep))
        assert same(swap(Random(3), select="random").reduce(shown, keep), Random(3).reduce(shown, keep))
        assert same(swap(FasterVLM(), select="uniform").reduce(shown, keep), Uniform().reduce(shown, keep))
        if not parts:  # these take a picture that was cut as one
            diverse = swap(FasterVLM(), score="constant", select="max_min")
            assert same(diverse.reduce(shown, keep), DivPrune().reduce(shown, keep))
            pivoted = swap(FasterVLM(), select="max_sum").reduce(shown, keep)
            assert torch.equal(pivoted.keep, ToDRE().select(shown, keep).sort(1).values)
            drawn = swap(FasterVLM(), select="random", seed=3)
            assert same(drawn.reduce(shown, keep), Random(3).reduce(shown, keep))
            assert same(swap(FasterVLM(), score="random", seed=3).reduce(shown, keep), drawn.reduce(shown, keep))
        ranked = swap(CDPruner(), select="topk").reduce(both, keep)
        if not parts:
            best = text_similarity(both.features, both.text, both.text_mask).topk(keep).indices
            assert torch.equal(ranked.keep, best.sort(1).values)


def test_start_is_the_best_token_or_the_most_isolated_one():
    """A batch of which one picture has a score and the other has none."""
    x = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([torch.ones(30), torch.rand(30, generator=torch.Generator().manual_seed(1))])
    shown = Evidence(features=x)
    picks = CHOICES["select"]["max_min"].run(shown, scores, 5)
    assert picks[0].tolist() == DivPrune().select(Evidence(features=x[:1]), 5)[0].tolist()
    assert int(picks[1, 0]) == int(scores[1].argmax())
    longest = CHOICES["select"]["max_sum"].run(shown, scores, 5)
    assert longest[:, 0].tolist() == [int(x[0].norm(dim=1).argmax()), int(scores[1].argmax())]


# Any step in any recipe -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "step"), NAMED)
@pytest.mark.parametrize("name", RECIPES)
def test_any_recipe(name, slot, step):
    method = fits(name, slot, step)
    if method is None:
        assert (name in ("divprune", "mmtok", "random", "uniform")) == (slot == "score" or step in ("topk", "nms"))
        return
    if name == "hiprune" and step in ("chunks", "equal"):  # neighbours are those on the grid
        with pytest.raises(ValueError, match="whole grid"):
            method.reduce(evidence(method, (6, 8)), 9)
        return
    for parts in ((), CROPS):
        shown = evidence(method, (6, 8), 1 if method.one_at_a_time else 2, crops=parts)
        for keep in (1, 9, shown.num_tokens - 1):
            check(method, shown, keep)


@pytest.mark.parametrize(("slot", "step"), NAMED)
@pytest.mark.parametrize("name", ["fastervlm", "holov", "visionzip"])
def test_any_batch_any_count_and_crops(name, slot, step):
    method = fits(name, slot, step)
    if method is None:
        pytest.skip("refused")
    for how in ({}, {"grid": (1, 13)}, {"crops": CROPS}, {"scale": 0.0}, {"dtype": torch.float16}):
        shown = evidence(method, **how)
        n = shown.num_tokens
        for keep in (1, 2, 7, n - 1, n):
            batch = check(method, shown, keep)
            if how.get("scale") == 0:
                continue
            turned = method.reduce(rows(shown, [2, 0, 1]), keep)
            for i, at in ((0, 1), (1, 2), (2, 0)):
                alone = method.reduce(rows(shown, [i]), keep)
                assert torch.equal(batch.keep[i], alone.keep[0]) and torch.equal(batch.keep[i], turned.keep[at])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_combination(data):
    method = vistok.create(data.draw(st.sampled_from(["fastervlm", "holov", "visionzip"])))
    steps = {slot: data.draw(st.sampled_from(sorted(CHOICES[slot]))) for slot in SLOTS if data.draw(st.booleans())}
    try:
        other = swap(method, seed=data.draw(st.integers(0, 9)), **steps)
    except ValueError as error:
        assert str(error).startswith("score: ")
        return
    parts = data.draw(st.sampled_from([(), CROPS]))
    shown = evidence(other, (6, 8), 2, seed=data.draw(st.integers(0, 99)), crops=parts)
    keep = data.draw(st.integers(1, shown.num_tokens))
    reduction = check(other, shown, keep)
    again = pickle.loads(pickle.dumps(other))
    assert again == other and hash(again) == hash(other) and same(again.reduce(shown, keep), reduction)
    assert set(other.needs) >= ({"encoder_features"} if other.space == "encoder" else set())
    lacking = [field for field in other.needs if field != "features"]
    for field in lacking:
        with pytest.raises(ValueError, match=field):
            other.reduce(replace(shown, **{field: None}), min(keep, shown.num_tokens - 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 47), st.sampled_from(["max_min", "max_sum", "dpp", "facility", "nms"]))
def test_each_part_is_picked_from_by_itself(seed, keep, step):
    """A step in chunks is that step on the tokens of each chunk alone, for the chunk's budget."""
    method = swap(HoloV(chunks=5), select=step)
    shown = evidence(method, (6, 8), 3, seed=seed)
    kept = method.reduce(shown, keep).keep
    scores = shown.cls_attention.mean(1)
    shares = HoloV(chunks=5).allocate(shown, scores, keep)
    for i in range(3):
        wanted, first = [], 0
        for part, size in enumerate(shares.sizes):
            count = int(shares.budgets[i, part])
            piece = Evidence(features=shown.features[i : i + 1, first : first + size])
            own = scores[i : i + 1, first : first + size]
            if count:
                wanted += (first + CHOICES["select"][step].run(piece, own, count)[0]).tolist()
            first += size
        assert kept[i].tolist() == sorted(wanted)


def test_random_tokens_of_equal_parts_are_not_the_same_ones():
    method = swap(HoloV(chunks=4), score="constant", select="random")
    shown = Evidence(features=torch.ones(1, 128, 4))
    kept = method.reduce(shown, 32).keep[0]
    parts = [frozenset((kept[kept // 32 == part] % 32).tolist()) for part in range(4)]
    assert len(set(parts)) == 4 and all(len(part) == 8 for part in parts)
    assert not method.needs or set(method.needs) == {"cls_attention"}


@pytest.mark.parametrize("pair", [("globalcom2", "holov"), ("cdpruner", "holov"), ("hiprune", "holov")])
def test_a_borrowed_budget_takes_any_score(pair):
    """HoloV shares by attention, which is positive; logarithms and cosines are not."""
    method = swap(vistok.create(pair[0]), allocate=pair[1], select="topk")
    for parts in ((), CROPS):
        check(method, evidence(method, (6, 8), 2, crops=parts), 11)


def test_a_borrowed_selection_takes_any_score():
    method = swap(CDPruner(), select="zoo-prune")  # weighs distances by a score that is 0 or more
    shown = evidence(method, (6, 8), 2)
    check(method, shown, 11)
    best = text_similarity(shown.features, shown.text, shown.text_mask).argmax(1)
    assert torch.equal(method.reduce(shown, 1).keep[:, 0], best)


# What runs is what is asked for -------------------------------------------------------------------------------------


def test_needs_are_those_of_the_steps_that_run():
    assert swap(FasterVLM(), select="random").needs == {}
    assert swap(FasterVLM(), select="random", allocate="chunks").needs == {"cls_attention": -2}
    assert swap(FasterVLM(layer=3), score="cls_attention", merge="contextual").needs == {
        "cls_attention": 3,
        "encoder_mean_keys": 3,
    }
    assert swap(CDPruner(), score="token_norm").needs == {}
    assert swap(AgilePruner(), select="topk").needs == {"cls_attention": -2}
    assert swap(VisionZip(), merge="nearest").needs == {"encoder_features": None, "cls_attention": -2}
    assert swap(HoloV(), score="text_cosine").needs == {"text": None}


def test_one_field_at_several_layers():
    """Each step sees the layers that it asked for."""
    parts, boxes = ((4, 4), (2, 4), (2, 4)), ((0, 0, 1, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 1))
    joined = swap(HiRED(), score="globalcom2")
    assert joined.needs["cls_attention"] == (-1, 0, -2)
    shown = replace(evidence(joined, crops=parts), boxes=boxes)
    last, first, late = shown.cls_attention
    scores = GlobalCom2().scores(replace(shown, cls_attention=last))
    budgets = HiRED().budgets(replace(shown, cls_attention=(first, late)), 11)
    assert torch.equal(joined.scores(shown), scores)
    shares = joined.allocate(shown, joined.scores(shown), 11)
    assert torch.equal(shares.budgets, budgets)
    check(joined, shown, 11)

    sliced = swap(HiRED(), score="vtc-cls")
    assert sliced.needs["cls_attention"] == slice(None)
    shown = replace(evidence(sliced, crops=parts), boxes=boxes)
    layers = shown.cls_attention
    assert torch.equal(sliced.scores(shown), VTCCLS().scores(replace(shown, cls_attention=layers[:-1])))
    budgets = HiRED().budgets(replace(shown, cls_attention=(layers[0], layers[-2])), 11)
    assert torch.equal(sliced.allocate(shown, sliced.scores(shown), 11).budgets, budgets)

    received = swap(HiPrune(), score="received_attention")
    shown = evidence(received, (6, 8))
    late, middle = shown.received_attention
    own = HiPrune().reduce(replace(shown, received_attention=(middle, late)), 16)
    assert same(received.reduce(shown, 16), own)


def test_all_else_is_the_recipes():
    method = swap(ToDRE(tau=2.0), score="distinctness", merge="nearest")
    assert method.whole_picture and method.one_at_a_time and method.space == "projected"
    assert method.schedule(64, 16, 32) == ToDRE(tau=2.0).schedule(64, 16, 32)
    assert method.layer_needs == ToDRE().layer_needs
    shown = evidence(method, (1, 40), 1)
    assert same(method.at_layer(shown, 0, 28), ToDRE(tau=2.0).at_layer(shown, 0, 28))
    assert swap(VisionZip(), merge="none").space == "encoder"


def test_frozen_and_named():
    method = swap(HoloV(), merge="none", select="max_sum")
    assert method.name == "holov[select=max_sum, merge=none]" and method.steps == (
        ("select", "max_sum"),
        ("merge", "none"),
    )
    assert method == swap(swap(HoloV(), merge="none"), select="max_sum")
    assert swap(VTCCLS(), order="author").name == "vtc-cls[order=author]"
    assert swap(Random(5), allocate="equal").seed == 5 and swap(Random(5), seed=1, allocate="equal").seed == 1
    with pytest.raises(FrozenInstanceError):
        method.seed = 1


@pytest.mark.parametrize("name", ["holov", "visionzip"])
@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
@torch.no_grad()
def test_in_a_model(family, name):
    family = FAMILIES[family]
    method = swap(vistok.create(name), select="max_sum", merge="nearest")
    with vistok.apply(family.model, method, keep=0.3) as session:
        logits = family.model(**prompt(family, [[0], [0, 0]]).inputs).logits
    assert bool(logits.isfinite().all())
    assert all(p.tokens_kept == pytest.approx(0.3 * p.tokens_in, abs=0.5) for p in session.pictures)


# Steps by themselves ------------------------------------------------------------------------------------------------


def tokens(seed, n, b=2):
    g = torch.Generator().manual_seed(seed)
    return Evidence(features=torch.randn(b, n, 6, generator=g)), torch.randn(b, n, generator=g)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 60), st.data())
def test_shares_add_up(seed, n, data):
    keep = data.draw(st.integers(1, n))
    shown, scores = tokens(seed, n)
    for allocate in (chunks, equal):
        sizes, budgets = allocate(shown, scores, keep)
        assert sum(sizes) == n and max(sizes) - min(sizes) <= 1
        assert bool((budgets.sum(1) == keep).all()) and bool((budgets <= torch.tensor(sizes)).all())
    spread = budgets / torch.tensor(sizes)  # of the equal chunks
    assert float(spread.max() - spread.min()) <= 1 / min(sizes) + 1e-6
    assert crops(shown, scores, keep) is None


def test_the_better_chunk_gets_more():
    shown, _ = tokens(0, 40, 1)
    scores = torch.cat([torch.full((1, 20), 3.0), torch.full((1, 20), 1.0)], 1)
    for shift in (0.0, -3.0):
        sizes, budgets = chunks(shown, scores + shift, 12)
        first = int(budgets[0, : len(sizes) // 2].sum())
        assert first >= 8
    sizes, budgets = crops(replace(shown, crops=((4, 5), (2, 5), (2, 5))), scores, 12)
    assert sizes == [20, 10, 10] and budgets.tolist() == [[6, 3, 3]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(2, 12), st.data())
def test_facility_takes_the_best_cover_at_each_step(seed, n, data):
    keep = data.draw(st.integers(1, min(n, 4)))
    shown, scores = tokens(seed, n, 1)
    picks = facility(shown, scores, keep)[0].tolist()
    x = torch.nn.functional.normalize(shown.features[0].double(), dim=1)
    weight = (scores[0] - scores.min()) / (scores.max() - scores.min()) + 1e-6

    def cover(chosen):
        return float((weight.double() * (x @ x[chosen].T).amax(1).clamp_min(0)).sum())

    for step in range(keep):
        free = [j for j in range(n) if j not in picks[:step]]
        best = max(cover([*picks[:step], j]) for j in free)
        assert cover(picks[: step + 1]) == pytest.approx(best, rel=1e-4)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=9))
def test_quality_keeps_the_order(values):
    scores = torch.tensor([values])
    scaled = quality(scores)
    assert bool((scaled > 0).all()) and bool((scaled.double() <= 1 + 1e-1).all())
    order = scores[0].argsort(stable=True)
    assert bool((scaled[0, order].diff() >= 0).all())


def test_merges():
    shown, _ = tokens(4, 20, 1)
    x, picks = shown.features, torch.tensor([[7, 3, 12]])
    run = {name: choice.run for name, choice in CHOICES["merge"].items()}
    similarity = torch.nn.functional.normalize(x[0], dim=1) @ torch.nn.functional.normalize(x[0, picks[0]], dim=1).T

    values, source = run["nearest"](x, shown, picks)
    assert source[0].tolist() == similarity.argmax(1).tolist()
    for slot in range(3):
        torch.testing.assert_close(values[0, slot], x[0, source[0] == slot].mean(0))

    values, source = run["knn"](x, shown, picks)
    for slot, pick in enumerate(picks[0].tolist()):
        others = [j for j in similarity[:, slot].argsort(descending=True).tolist() if j not in picks[0]]
        torch.testing.assert_close(values[0, slot], x[0, [pick, *others[:6]]].mean(0))

    many = torch.arange(19).flip(0)[None]  # 3 of 19 picks are contextual: tokens 2, 1, 0
    values, source = run["contextual"](x, replace(shown, encoder_mean_keys=x), many)
    norm = torch.nn.functional.normalize(x[0], dim=1)
    into = int((norm[[2, 1, 0]] @ norm[19]).argmax())
    assert int(source[0, 19]) == 16 + into
    torch.testing.assert_close(values[0, 16 + into], x[0, 2 - into] + x[0, 19])
    assert torch.equal(values[0, :16], x[0, many[0, :16]])


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        (HoloV(), {"selct": "topk"}, r"^slot: got 'selct', must be score, allocate, select, merge, order$"),
        (HoloV(), {"select": "top"}, r"^select: got 'top', must be own, dpp, .*topk, uniform, agilepruner"),
        (HoloV(), {"select": "random", "merge": "topk"}, r"^merge: got 'topk', must be own, contextual, "),
        (HoloV(), {"order": "reading"}, r"^order: got 'reading', must be own, author, raster$"),
        (HoloV(), {"select": "dart"}, r"^select: got 'dart', must be "),
        (DivPrune(), {"score": "token_norm"}, r"^score: got 'token_norm', but no step of divprune reads a score"),
        (DivPrune(), {"select": "topk"}, r"^select: got 'topk', which needs a score; divprune has none"),
        (DivPrune(), {"select": "cdpruner"}, r"^select: got 'cdpruner', which needs a score"),
        (HoloV(parity="authors"), {"select": "topk"}, r"^reducer: holov is one piece with parity='authors'; "),
        (GlobalCom2(parity="authors"), {"merge": "knn"}, r"^reducer: globalcom2 is one piece with parity='authors'"),
        ("holov", {"select": "topk"}, r"^reducer: got 'holov', must be a Reducer"),
    ],
)
def test_what_does_not_exist_or_has_no_effect(method, steps, message):
    with pytest.raises(ValueError, match=message):
        swap(method, **steps)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fastv", "it acts inside the language model"),
        ("visiondrop", "it acts inside the language model"),
        ("tome-merge", "it chooses and merges in one step"),
        ("pool", "it chooses and merges in one step"),
        ("information-horizon", "it works through another method, whose steps can be swapped"),
    ],
)
def test_what_is_no_chain(name, why):
    for call in (steps_of, lambda method: swap(method, select="topk")):
        with pytest.raises(ValueError, match=f"^reducer: {name} is not a chain of score, .*: {why}$"):
            call(vistok.create(name))


def test_a_recipe_that_writes_the_chain_itself():
    class First(FasterVLM):
        def select(self, evidence, keep):
            return torch.arange(keep).expand(len(evidence.features), keep)

    with pytest.raises(ValueError, match=r"is one piece with its own select\(\) or compress\(\)$"):
        swap(First(), merge="nearest")


def test_a_score_that_nothing_reads_can_be_given_to_a_step_that_does():
    method = swap(DivPrune(), score="token_norm", select="topk")
    shown = evidence(method, (6, 8))
    assert torch.equal(method.reduce(shown, 5).keep, shown.features.norm(dim=2).topk(5).indices.sort(1).values)
    assert steps_of(DivPrune())["score"].choices == ()
    assert "topk" not in steps_of(DivPrune())["select"].choices
    assert "token_norm" in steps_of(method)["score"].choices


def test_batches_whose_budgets_differ_are_named():
    shown = replace(evidence(HiRED(), crops=((3, 3), (2, 3), (2, 3)), batch=2), boxes=())
    method = swap(HiRED(), select="max_sum")
    with pytest.raises(ValueError, match=r"^budgets: got sums"):
        method._pick_in_parts(shown, torch.ones(2, 21), recipe.Shares([9, 12], torch.tensor([[1, 2], [2, 2]])))


def test_the_example_in_the_docstring():
    assert doctest.testmod(recipe, optionflags=doctest.ELLIPSIS).failed == 0

"""What every reducer promises, asked of each one that the catalogue finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vistok
from tests.reduce.synthetic import Trial, cast, evidence, mapped, rows
from vistok.catalogue import Outcome, claim_of, methods
from vistok.host.recipe import Recipe
from vistok.host.reducer import Reducer, Reduction

KEEPS_ALL = {"yopo"}
"""Systems that drop no token by choice but spend less on each, see tests/host/test_effort.py."""
NAMES = [card.slug for card in methods("reduce") if card.slug not in KEEPS_ALL]
GRIDS = [(8, 8), (6, 10), (1, 13)]
CROPS = ((4, 4), (4, 4), (3, 5))

UNANCHORED = {"apet": "overwrites the slots of some tokens with basis tokens from elsewhere, as the paper has it"}
"""Systems of which a kept position does not say where the slot's value comes from."""

every = pytest.mark.parametrize("name", NAMES)


def pictures(reducer, grid=(8, 8), **how):
    """Evidence as the host would show it: a method whose count depends on the picture sees one at a time."""
    given = evidence(reducer, grid, **how)
    return [rows(given, slice(i, i + 1)) for i in range(len(given.features))] if reducer.one_at_a_time else [given]


def values_of(reducer, given):
    return given.encoder_features if reducer.space == "encoder" else given.features


def check(name, given, reduction, keep):
    """The form of a reduction: counts, order, and that ``source`` and ``keep`` tell the same story."""
    reducer = vistok.create(name)
    values = values_of(reducer, given)
    b, n, d = values.shape
    k = reduction.keep.shape[1]
    assert k == keep or (reducer.one_at_a_time and 1 <= k <= n)
    assert reduction.keep.shape == (b, k) and reduction.keep.dtype == torch.int64
    assert reduction.tokens.shape == (b, k, d) and reduction.tokens.dtype == values.dtype
    assert reduction.source.shape == (b, n) and reduction.source.dtype == torch.int64
    assert bool((reduction.keep.diff(dim=1) > 0).all()), "keep must ascend, each position once"
    assert bool((reduction.keep >= 0).all()) and bool((reduction.keep < n).all())
    assert bool((reduction.source >= -1).all()) and bool((reduction.source < k).all())
    assert name in UNANCHORED or anchored(reduction)
    assert bool(reduction.tokens.isfinite().all())
    assert reduction.carry is None or reduction.carry.shape[:2] == (b, k)


def anchored(reduction):
    """Whether the token at each kept position is in the slot that stands there."""
    slots = torch.arange(reduction.keep.shape[1]).expand_as(reduction.keep)
    return torch.equal(reduction.source.gather(1, reduction.keep), slots)


def same(a, b):
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(x is y if x is None else torch.equal(x, y) for x, y in pairs)


@every
@pytest.mark.parametrize("grid", GRIDS)
def test_counts_are_exact_and_source_agrees(name, grid):
    reducer, n = vistok.create(name), grid[0] * grid[1]
    for given in pictures(reducer, grid):
        for keep in (1, 2, 7, n // 4, n - 1, n):
            check(name, given, reducer.reduce(given, keep), keep)


@every
def test_all_tokens_is_the_identity(name):
    reducer = vistok.create(name)
    for given in pictures(reducer):
        reduction = reducer.reduce(given, given.num_tokens)
        places = torch.arange(64).expand(len(given.features), 64)
        assert torch.equal(reduction.tokens, values_of(reducer, given))
        assert torch.equal(reduction.keep, places) and torch.equal(reduction.source, places)


@every
def test_a_token_alone_in_its_slot_keeps_its_value(name):
    """Of a method that only drops, every kept row is bit for bit the one that was given."""
    reducer = vistok.create(name)
    kind = type(reducer)
    chain = isinstance(reducer, Recipe) and kind.merge is Recipe.merge
    if kind.compress is not (Recipe if chain else Reducer).compress:
        pytest.skip("merges")
    for given in pictures(reducer, (6, 10)):
        reduction = reducer.reduce(given, 17)
        index = reduction.keep.unsqueeze(2).expand(-1, -1, given.features.shape[2])
        assert torch.equal(reduction.tokens, given.features.gather(1, index))
        assert bool(((reduction.source >= 0).sum(1) == 17).all())


@every
def test_pictures_do_not_see_each_other(name):
    """A picture alone, in its batch, and in that batch in another order: the same choice, the same values."""
    reducer = vistok.create(name)
    if reducer.one_at_a_time:
        pytest.skip("is shown one picture at a time")
    given = evidence(reducer)
    batch = reducer.reduce(given, 16)
    turned = reducer.reduce(rows(given, [2, 0, 1]), 16)
    for i, at in ((0, 1), (1, 2), (2, 0)):
        alone = reducer.reduce(rows(given, slice(i, i + 1)), 16)
        for other, j in ((alone, 0), (turned, at)):
            assert torch.equal(batch.keep[i], other.keep[j]) and torch.equal(batch.source[i], other.source[j])
            torch.testing.assert_close(batch.tokens[i], other.tokens[j])


@every
def test_is_deterministic_and_changes_nothing_it_was_given(name):
    reducer = vistok.create(name)
    for given in pictures(reducer):
        before = mapped(given, torch.clone)
        torch.manual_seed(1)
        first = reducer.reduce(given, 16)
        torch.manual_seed(2)
        assert same(first, vistok.create(name).reduce(given, 16))
        unchanged = mapped(given, lambda x: x)
        for field in vars(before):
            a, b = getattr(before, field), getattr(unchanged, field)
            pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
            assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs), field


@every
@pytest.mark.parametrize("constant", [0.0, 1.0], ids=["zero", "constant"])
def test_tokens_that_are_all_alike(name, constant):
    reducer = vistok.create(name)
    for given in pictures(reducer, scale=0.0):
        given = mapped(given, lambda x: x + constant if x.is_floating_point() and not x.any() else x)
        for keep in (1, 7, 63):
            check(name, given, reducer.reduce(given, keep), keep)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision(name, dtype):
    """Works in that precision, and gives its values back in it."""
    reducer = vistok.create(name)
    for given in pictures(reducer, dtype=dtype):
        check(name, given, reducer.reduce(given, 16), 16)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_chooses_as_single_does(name, dtype):
    """A model in half precision: its features are, the attention that the host computes is not."""
    reducer = vistok.create(name)
    for given in pictures(reducer):
        single = cast(cast(given, dtype), torch.float32)
        real = ("features", "encoder_features", "text", "encoder_keys", "encoder_mean_keys")
        half = replace(single, **{n: x.to(dtype) for n in real if (x := getattr(single, n)) is not None})
        assert torch.equal(reducer.reduce(half, 16).keep, reducer.reduce(single, 16).keep)


@every
@pytest.mark.parametrize("keep", [1, 7, 20, 46, 47])
def test_a_picture_in_parts(name, keep):
    reducer = vistok.create(name)
    for given in pictures(reducer, crops=CROPS):
        check(name, given, reducer.reduce(given, keep), keep)


@every
def test_bad_keep_is_named(name):
    reducer = vistok.create(name)
    given = pictures(reducer)[0]
    for keep in (0, -1, 65):
        with pytest.raises(ValueError, match=rf"^keep: got {keep}, must be between 1 and .* 64 "):
            reducer.reduce(given, keep)


@every
def test_missing_evidence_is_named(name):
    reducer = vistok.create(name)
    for field in reducer.needs:
        with pytest.raises(ValueError, match=f"^evidence: .*{field}"):
            reducer.reduce(replace(pictures(reducer)[0], **{field: None}), 4)


@every
def test_schedule_falls_and_stays_in_the_budget(name):
    reducer = vistok.create(name)
    for num_layers in (1, 2, 4, 12, 32):
        for keep in (1, 7, 16, 63, 64):
            schedule = reducer.schedule(64, keep, num_layers)
            layers = sorted(schedule.layers)
            counts = [schedule.input, *(schedule.layers[layer] for layer in layers)]
            assert 1 <= schedule.input <= 64 and counts[-1] >= 0
            assert counts == sorted(counts, reverse=True) or schedule.returns
            assert all(0 <= layer < num_layers for layer in layers)
            assert schedule.mean(num_layers) <= keep + 1
        assert set(counts) == {64}, "keep == N must reduce nowhere"


@every
def test_stage_inside_the_language_model(name):
    reducer = vistok.create(name)
    if type(reducer).at_layer is Reducer.at_layer:
        assert not reducer.schedule(64, 16, 32).layers
        with pytest.raises(TypeError, match="no stage"):
            reducer.at_layer(evidence(reducer), 16, 2)
        return
    for given in pictures(reducer, (1, 40)):
        for keep in (0, 1, 13, 39, 40):
            reduction = reducer.at_layer(given, keep, 2)
            k = reduction.keep.shape[1]
            assert k == keep or reducer.one_at_a_time
            assert reduction.tokens.shape == (len(given.features), k, given.features.shape[2])
            assert bool((reduction.keep.diff(dim=1) > 0).all())
            assert name in UNANCHORED or anchored(reduction)
            if k == given.num_tokens:
                assert torch.equal(reduction.tokens, given.features)


@every
def test_claim_measures_the_system_against_something(name):
    """Two figures at least, one of them the system's own; and it can fail as well as hold."""
    trial = Trial()
    outcome = claim_of(name)(trial)
    assert isinstance(outcome, Outcome) and outcome.metric and isinstance(outcome.holds, bool)
    assert isinstance(outcome.baseline, float) and isinstance(outcome.value, float)
    system = type(vistok.create(name)).__name__
    assert system in {type(method).__name__ for _, method, _, _ in trial.calls}
    assert all(keep >= 1 if isinstance(keep, int) else 0 < keep <= 1 for _, _, keep, _ in trial.calls)
    worse = claim_of(name)(Trial(default=0.9, **{system: 0.01}))
    assert not worse.holds


@pytest.mark.parametrize(
    ("keep", "source"),
    [([2, 1], [-1, 1, 0, -1]), ([1, 1], [-1, 1, -1, -1]), ([1, 4], [-1, 0, -1, 1]), ([1, 2], [-1, 1, 0, -1])],
    ids=["descending", "twice", "outside", "other slot"],
)
def test_check_sees_what_is_wrong(keep, source):
    given = evidence(vistok.create("fastervlm"), (2, 2), batch=1)
    wrong = Reduction(torch.tensor([keep]), given.features[:, :2], torch.tensor([source]))
    with pytest.raises((AssertionError, RuntimeError)):
        check("fastervlm", given, wrong, 2)


@pytest.mark.gpu
@every
def test_a_gpu_chooses_as_the_cpu_does(name):
    reducer = vistok.create(name)
    for given in pictures(reducer):
        here = reducer.reduce(given, 16)
        there = reducer.reduce(mapped(given, lambda x: x.cuda()), 16)
        assert there.keep.is_cuda and there.tokens.is_cuda and there.source.is_cuda
        assert torch.equal(here.keep, there.keep.cpu()) and torch.equal(here.source, there.source.cpu())
        torch.testing.assert_close(here.tokens, there.tokens.cpu(), rtol=1e-4, atol=1e-5)

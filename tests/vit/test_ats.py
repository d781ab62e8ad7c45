"""ATS: scores and samples against loops, the values of every kind of model, the number by picture."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import vistok
from tests.vit.test_contract import case
from tests.vit.towers import KINDS, PATCHES, built, pixels
from vistok.host.vit import Stage, TokenState, ViTEvidence, ViTReducer
from vistok.vit.ats import ATS, significance


def scores(evidence, parity="paper"):
    """Significance by its definition, one list a picture."""
    row, v = evidence.class_row, evidence.values[:, :, evidence.prefix :]
    out = []
    for i in range(len(row)):
        score = []
        for j in range(row.shape[2]):
            if parity == "paper":
                score.append(sum(float(row[i, h, j]) * math.hypot(*v[i, h, j].tolist()) for h in range(row.shape[1])))
            else:
                score.append(float(row[i, :, j].sum()) * math.hypot(*v[i, :, j].flatten().tolist()))
        out.append([s / sum(score) for s in score])
    return out


def sampled(score, points):
    """Tokens in whose stretch of the cumulative sum a point lies, in (0, sum of the scores)."""
    kept, total = set(), 0.0
    for j, s in enumerate(score):
        if any(total < y <= total + s for y in points):
            kept.add(j)
        total += s
    return sorted(kept)


def places(state):
    return [row.tolist() for row in state.anchor]


def given(score, dtype=torch.float32):
    """A state and evidence whose class token attends as ``score``, with values of length 1."""
    n = len(score)
    q = torch.zeros(1, 1, n + 1, 1)
    q[:, :, 0] = 1
    k = torch.tensor([1e-9, *score]).log()[None, None, :, None]
    v = torch.ones(1, 1, n + 1, 1)
    evidence = ViTEvidence(q, k, 1.0, 1, True, Stage(1, 6, n), read_values=lambda: v)
    return TokenState.start(torch.randn(1, n + 1, 4), 1, (1, n)), evidence


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("parity", ["paper", "authors"])
def test_significance(prefix, parity):
    _, evidence = case(prefix)
    torch.testing.assert_close(significance(evidence, parity), torch.tensor(scores(evidence, parity)).double())


def test_values_of_grouped_heads_count_for_each_of_their_queries():
    _, evidence = case()
    v = evidence.values
    one = ViTEvidence(
        evidence.q, evidence.k[:, :1], 0.5, 1, True, evidence.stage, read_values=lambda: v[:, :1].contiguous()
    )
    two = ViTEvidence(
        evidence.q, evidence.k[:, :1].repeat(1, 2, 1, 1), 0.5, 1, True, evidence.stage,
        read_values=lambda: v[:, :1].repeat(1, 2, 1, 1),
    )  # fmt: skip
    torch.testing.assert_close(significance(one), significance(two))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("count", [1, 3, 10, 19])
def test_as_many_points_as_it_takes_for_so_many_different_tokens(prefix, count):
    """Shares are filled level by bisection, and their sum is cut at 1/2, 3/2, ..."""
    state, evidence = case(prefix)
    found = places(ATS().reduce(state, evidence, count))
    for score, kept in zip(scores(evidence), found, strict=True):
        low, high = 0.0, 1e9
        for _ in range(200):
            level = (low + high) / 2
            low, high = (level, high) if sum(min(1, level * s) for s in score) < count else (low, level)
        assert kept == sampled([min(1, level * s) for s in score], [j + 0.5 for j in range(count)])
        assert len(kept) == count


def test_where_no_token_is_picked_twice_it_is_the_papers_sampling():
    """Eight scores, none above a quarter: four points at (2 j - 1) / 8 of the cumulative sum."""
    score = [0.05, 0.2, 0.1, 0.15, 0.22, 0.03, 0.05, 0.2]
    state, evidence = given(score)
    want = sampled(score, [1 / 8, 3 / 8, 5 / 8, 7 / 8])
    assert places(ATS().reduce(state, evidence, 4)) == [want] == places(ATS(samples=4).reduce(state, evidence, 4))


def test_a_significant_token_always_stays_and_even_ones_lie_apart():
    state, evidence = given([0.02] * 5 + [0.8] + [0.02] * 5)
    for count in range(1, 11):
        assert 5 in places(ATS().reduce(state, evidence, count))[0]
    state, evidence = given([1 / 12] * 12)
    assert places(ATS().reduce(state, evidence, 4)) == [[1, 4, 7, 10]]


def test_exactly_as_many_even_where_one_token_has_it_all():
    state, evidence = given([1.0] + [1e-38] * 9)
    for count in range(1, 10):
        kept = places(ATS().reduce(state, evidence, count))[0]
        assert len(set(kept)) == count and kept[0] == 0


def test_number_by_picture():
    """The more even the scores, the more tokens: alone exactly the different ones of the paper's points."""
    numbers = []
    for sharpness in (0.0, 0.5, 2.0):
        score = torch.linspace(0, 6, 30).mul(sharpness).exp()
        score = (score / score.sum()).tolist()
        state, evidence = given(score)
        kept = places(ATS(samples=20).reduce(state, evidence, 20))[0]
        assert kept == sampled(score, [(2 * j + 1) / 40 for j in range(20)])
        numbers.append(len(kept))
    assert numbers[0] == 20 > numbers[1] > numbers[2]


def test_number_by_picture_in_a_batch_is_that_of_the_picture_with_the_most():
    model, x = built("timm-vit"), pixels(4)
    method, alone = ATS(samples=24, layers=(2,)), []
    with torch.no_grad():
        for i in range(4):
            with vistok.apply(model, method) as session:
                model(x[i : i + 1])
            alone.append(session.states[-1].anchor[0].tolist())
        with vistok.apply(model, method) as session:
            model(x)
    together = session.states[-1].anchor.tolist()
    assert len({len(kept) for kept in alone}) > 1, "all pictures keep as many: nothing tested"
    assert session.tokens[-1] == max(map(len, alone)) <= method.plan(PATCHES, 6)[-1] == 24
    assert all(set(kept) <= set(more) for kept, more in zip(alone, together, strict=True))


def test_authors_points():
    """Released: tokens in rising order, the sum scaled to 0..1, points from its smallest positive value to 1."""
    state, evidence = case(n=20)
    found = ATS(samples=9, parity="authors").reduce(state, evidence, 9)
    wanted = []
    for score in scores(evidence, "authors"):
        along = sorted(range(20), key=lambda j: score[j])
        total = torch.tensor([score[j] for j in along], dtype=torch.float64).cumsum(0)
        total = (total - total[0]) / (total[-1] - total[0])
        start = float(total[1])
        points = [start + (1 - start) * j / 8 for j in range(9)]
        wanted.append({along[int((total - y).abs().argmin())] for y in points})
    most = max(map(len, wanted))
    for kept, want in zip(places(found), wanted, strict=True):
        assert len(kept) == most and want <= set(kept)
    assert any(len(want) == most for want in wanted)


def test_authors_order_changes_who_is_sampled_not_how_many():
    state, evidence = given([0.3, 0.02, 0.1, 0.08, 0.2, 0.06, 0.14, 0.1])
    paper, authors = (places(ATS(parity=p).reduce(state, evidence, 4))[0] for p in ("paper", "authors"))
    assert len(paper) == len(authors) == 4 and paper != authors and 0 in paper and 0 in authors


class Values(ViTReducer):
    """Keeps what it is shown."""

    def stages(self, depth):
        return [2]

    def count(self, tokens, stage):
        return tokens - 1

    def reduce(self, state, evidence, count):
        self.seen = evidence.values
        return state.keep(torch.arange(count).expand(len(state.x), -1))


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_attention(kind, monkeypatch):
    model, method, used = copy.deepcopy(built(kind)), Values(), []
    for name, p in model.named_parameters():
        if p.ndim == 1 and ("v_bias" in name or "qkv.bias" in name or "v_proj.bias" in name):
            torch.nn.init.normal_(p)
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: used.append(a[2]) or attend(*a, **k))
    with torch.no_grad(), vistok.apply(model, method):
        model(pixels())
    torch.testing.assert_close(method.seen, used[2], rtol=1e-5, atol=1e-5)


def test_evidence_without_values_says_so():
    _, evidence = case()
    with pytest.raises(RuntimeError, match=r"^values: .*read_values"):
        ViTEvidence(evidence.q, evidence.k, 1.0, 1, True, evidence.stage).values  # noqa: B018


def test_wrong_arguments_are_named():
    for wrong in (1, 2.5):
        with pytest.raises(ValueError, match=r"^samples: got"):
            ATS(samples=wrong)
    with pytest.raises(ValueError, match=r"^parity: got 'code'"):
        ATS(parity="code")

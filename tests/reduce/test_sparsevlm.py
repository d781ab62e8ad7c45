"""SparseVLM against plain loops: raters, ranking, recycling, counts; and its stages inside a language model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial, evidence, project, rows
from vistok.reduce import sparsevlm
from vistok.reduce.sparsevlm import SparseVLM, text_raters


def made(seed=0, grid=(5, 8), batch=3):
    return evidence(SparseVLM(), grid, batch, seed=seed, dtype=torch.float64)


def plain_raters(given_, i):
    """Softmax over the real text of the products of each visual token, averaged over them; at least the mean."""
    visual = project(given_.encoder_features[i])
    real = [j for j, yes in enumerate(given_.text_mask[i].tolist()) if yes]
    totals = dict.fromkeys(real, 0.0)
    for token in visual:
        products = {j: math.exp(float(token @ given_.text[i, j])) for j in real}
        for j in real:
            totals[j] += products[j] / sum(products.values()) / len(visual)
    mean = sum(totals.values()) / len(real)
    return [j for j in real if totals[j] >= mean - 1e-12]


def plain_peaks(x, k):
    """Density peaks with k neighbours, itself among them; ties to the lower index."""
    n, width = x.shape
    d = [[float((x[a] - x[b]).norm()) / width**0.5 for b in range(n)] for a in range(n)]
    density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / min(k, n)) for row in d]
    largest = max(map(max, d))

    def separation(a):
        denser = [b for b in range(n) if density[b] > density[a] or (density[b] == density[a] and b < a)]
        return min((d[a][b] for b in denser), default=largest)

    centres = sorted(range(n), key=lambda a: (-density[a] * separation(a), a))[:k]
    group = [centres.index(a) if a in centres else min(range(k), key=lambda c: d[a][centres[c]]) for a in range(n)]
    return centres, group


def plain(given_, i, stay, among, clusters):
    """Positions, values and who ended where, of one picture."""
    x, n = given_.features[i], given_.features.shape[1]
    raters = plain_raters(given_, i)
    attention = given_.llm_attention[i]
    score = [sum(float(attention[h, j, t]) for h in range(len(attention)) for j in raters) for t in range(n)]
    order = sorted(range(n), key=lambda t: (-score[t], t))
    slots = {t: x[t] for t in order[:stay]}
    ended = {t: t for t in order[:stay]}
    if clusters:
        again = order[stay : stay + among]
        centres, group = plain_peaks(x[again], clusters)
        for c, centre in enumerate(centres):
            members = [again[a] for a in range(among) if group[a] == c]
            slots[again[centre]] = x[members].mean(0)
            ended |= dict.fromkeys(members, again[centre])
    return slots, ended


@settings(max_examples=15)
@given(st.integers(0, 9999), st.integers(1, 39))
def test_stage_against_a_loop(seed, keep):
    given_, system = made(seed), SparseVLM()
    stay = system.count(40, keep)
    among = system.recycling(40 - stay)[0]
    reduction = system.at_layer(given_, keep, 2)
    for i in range(3):
        slots, ended = plain(given_, i, stay, among, keep - stay)
        assert reduction.keep[i].tolist() == sorted(slots) and len(slots) == keep
        torch.testing.assert_close(reduction.tokens[i], torch.stack([slots[t] for t in sorted(slots)]))
        found = {t: int(reduction.keep[i, s]) for t, s in enumerate(reduction.source[i].tolist()) if s >= 0}
        assert found == ended
        stayed = [t for t in sorted(slots) if ended[t] == t and list(ended.values()).count(t) == 1]
        where = [reduction.keep[i].tolist().index(t) for t in stayed]
        assert torch.equal(reduction.tokens[i, where], given_.features[i, stayed])


def test_raters():
    given_ = made(4)
    found = text_raters(given_)
    assert [[j for j, yes in enumerate(row) if yes] for row in found.tolist()] == [
        plain_raters(given_, i) for i in range(3)
    ]
    assert not (found & ~given_.text_mask).any() and bool(found.any(1).all())
    assert not found[0].all()


def test_raters_of_equal_words_are_all_of_them_and_of_none_none():
    given_ = made()
    alike = replace(given_, text=torch.zeros_like(given_.text), text_mask=torch.ones_like(given_.text_mask))
    assert text_raters(alike).all()
    silent = replace(given_, text_mask=torch.zeros_like(given_.text_mask))
    assert not text_raters(silent).any()
    assert SparseVLM().at_layer(silent, 7, 2).tokens.isfinite().all()


def test_later_stages_keep_the_first_stage_s_raters():
    """Though the tokens that are left would choose others: with the whole picture's raters, not theirs."""
    for seed in range(20):
        given_, system = made(seed, batch=1), SparseVLM(recycled=0.0)
        first = system.at_layer(given_, 9, 2)
        later = replace(given_.take(first.keep), carry=first.carry)
        assert torch.equal(first.carry[0, 0], text_raters(given_)[0])
        alone = replace(later, carry=None)
        second = system.at_layer(later, 4, 6)
        assert torch.equal(second.carry[0], first.carry[0, :4])
        score = later.llm_attention[0].mean(0)[text_raters(given_)[0]].mean(0)
        assert second.keep[0].tolist() == score.topk(4).indices.sort().values.tolist()
        if not torch.equal(system.at_layer(alone, 4, 6).keep, second.keep):
            return
    pytest.fail("no seed where it makes a difference")


def test_other_text_does_not_count():
    """Attention of words that are not raters, or padding, changes nothing."""
    given_ = made(2)
    raters = text_raters(given_)
    noise = torch.rand(given_.llm_attention.shape, dtype=torch.float64)
    other = replace(given_, llm_attention=torch.where(raters[:, None, :, None], given_.llm_attention, noise))
    for keep in (1, 8, 30):
        assert torch.equal(SparseVLM().at_layer(other, keep, 2).keep, SparseVLM().at_layer(given_, keep, 2).keep)


# Counts --------------------------------------------------------------------------------------------------------------


def test_recycling_of_the_release():
    """Of what does not stay int(30%) + 1 tokens are clustered into int(a tenth) + 1."""
    assert SparseVLM().recycling(276) == (83, 9)
    assert SparseVLM().recycling(1) == (1, 1) and SparseVLM().recycling(0) == (0, 0)
    assert SparseVLM(recycled=0.0).recycling(276) == (0, 0)


@given(st.integers(2, 700), st.data(), st.sampled_from([0.0, 0.1, 0.3, 1.0]), st.sampled_from([0.1, 0.5, 1.0]))
def test_counts_are_met_with_the_release_s_recycling_where_there_is_room(n, data, recycled, clusters):
    keep = data.draw(st.integers(1, n - 1))
    system = SparseVLM(recycled=recycled, clusters=clusters)
    stay = system.count(n, keep)
    among, most = system.recycling(n - stay)
    assert 1 <= stay <= keep and keep - stay <= among
    assert keep - stay == most or (keep - stay == keep // 2 and most > keep // 2)


def test_schedule():
    schedule = SparseVLM().schedule(576, 192, 32)
    assert dict(schedule.layers) == {2: 307, 6: 205, 15: 113} and abs(schedule.mean(32) - 192) < 0.5
    assert dict(SparseVLM().schedule(196, 49, 6).layers) == {1: 35, 2: 24, 3: 13}


def test_count_by_rank():
    """The first release's rule; attention of rank 2 and 4, whatever ``keep``."""
    given_ = rows(made(batch=3), slice(0, 1))
    given_ = replace(given_, text_mask=torch.ones(1, 5, dtype=torch.bool), carry=torch.ones(1, 40, 5).bool())
    g = torch.Generator().manual_seed(0)
    for rank in (2, 4):
        maps = torch.rand(5, rank, generator=g).double() @ torch.rand(rank, 40, generator=g).double()
        seen = replace(given_, llm_attention=maps.expand(1, 3, 5, 40))
        system = SparseVLM(scale=2.5, bias=1.0)
        assert system.one_at_a_time and not SparseVLM().one_at_a_time
        stay = int(2.5 * rank + 1)
        reduction = system.at_layer(seen, 30, 2)
        assert reduction.keep.shape[1] == stay + system.recycling(40 - stay)[1]
        assert SparseVLM(scale=100.0).at_layer(seen, 3, 2).keep.shape[1] == 40
        assert SparseVLM(scale=0.01).at_layer(seen, 3, 2).keep.shape[1] == 1 + system.recycling(39)[1]


def test_count_by_rank_wants_one_picture():
    with pytest.raises(ValueError, match=r"^evidence: got 3 pictures"):
        SparseVLM(scale=2.0).at_layer(made(), 9, 2)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("depths", ()),
        ("depths", (0.5, 0.2, 0.7)),
        ("shape", (3, 2)),
        ("shape", (1, 2, 3)),
        ("shape", (2, 1, 0)),
        ("recycled", 1.5),
        ("clusters", 0.0),
        ("scale", 0.0),
    ],
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        SparseVLM(**{name: wrong})


@torch.no_grad()
def test_inside_a_model():
    family = FAMILIES["llava-clip"]
    inputs = prompt(family, [[0], [0, 0]]).inputs
    with vistok.apply(family.model, "sparsevlm", keep=8) as session:
        logits = family.model(**inputs).logits
    assert logits.isfinite().all()
    for picture in session.pictures:
        counts = [16, *picture.layers.values()]
        assert counts == sorted(counts, reverse=True) and abs(picture.mean_tokens(4) - 8) < 0.5
    with vistok.apply(family.model, SparseVLM(scale=1.5), keep=8) as session:
        family.model(**inputs)
    assert len(session.pictures) == 3


def test_claim():
    assert sparsevlm.claim(Trial(dense=0.8, SparseVLM=0.75)).holds
    outcome = sparsevlm.claim(trial := Trial(dense=0.8, SparseVLM=0.74))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.74)
    assert [keep for _, method, keep, _ in trial.calls if method] == [2 / 9]

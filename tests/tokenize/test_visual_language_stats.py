"""The study of ids as a language: what it reports, and its claim."""

from __future__ import annotations

import math

import pytest
import torch

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.tokenize.visual_language_stats import VisualLanguageStats, claim, linearise


def test_orders():
    ids = torch.arange(12).view(2, 2, 3)
    assert linearise(ids).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert linearise(ids, "snake").tolist() == [[0, 1, 2, 5, 4, 3], [6, 7, 8, 11, 10, 9]]
    assert linearise(ids, "columns").tolist() == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]
    assert ids.tolist() == torch.arange(12).view(2, 2, 3).tolist()
    with pytest.raises(ValueError, match="order: got 'spiral'"):
        linearise(ids, "spiral")


def test_even_ids_are_no_language():
    ids = torch.randint(16, (60, 8, 8), generator=torch.Generator().manual_seed(0))
    found = VisualLanguageStats(longest=3, symbols=3, piece=4, steps=4).report(ids, 32)
    assert found["unused"] == 0.5
    assert found["entropy"] == pytest.approx(4, abs=0.01)
    assert found["entropy"] == pytest.approx(found["entropy_1"])
    assert found["compression"] == pytest.approx(0.2, abs=0.01)  # 16 of 32 codes: a bit of five
    assert found["zipf_1"] < 0.1 and found["heaps_b"] < 0.5
    for n in (1, 2):
        assert 15 < found[f"perplexity_{n}"] < 21
    assert found["perplexity_pcfg"] > 14
    assert all(math.isfinite(value) for value in found.values())


def test_a_language_is_told_from_its_shuffled_self():
    """Rows that repeat: bigrams know what comes next, until the order is taken away."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randint(8, (80, 1), generator=rng)
    ids = (start + torch.arange(12)) % 8
    study = VisualLanguageStats(longest=2, symbols=0)
    plain = study.report(ids, 8)
    mixed = study.report([row[torch.randperm(12, generator=rng)] for row in ids], 8)
    assert plain["entropy"] == pytest.approx(mixed["entropy"])
    assert plain["entropy_2"] == pytest.approx(0, abs=1e-9) and mixed["entropy_2"] > 2.5
    assert plain["perplexity_2"] < 2 < mixed["perplexity_2"] and "perplexity_pcfg" not in plain
    with pytest.raises(ValueError, match="ids: got 1 sequences"):
        study.report(ids[:1], 8)


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=16, size=32), steps=2, codes=64)
    assert 0 <= outcome.baseline < 1 and 0 <= outcome.value < 1 and outcome.holds == (outcome.value < outcome.baseline)

"""Density peaks and k-medoids against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracle
from tests.core.oracle import Case, cases
from vistok.core.cluster import dpc_knn, k_medoids
from vistok.core.merge import nearest_slot


@given(cases(), st.sampled_from([1, 2, 3, 5]))
def test_dpc_knn(case: Case, neighbours: int):
    picks = dpc_knn(case.x, case.k, neighbours, case.mask)
    assert picks.shape == (len(case.x), case.k)
    for b, row in enumerate(picks.tolist()):
        assert row == oracle.density_peaks(case.x[b].tolist(), case.real(b), case.k, neighbours)


@pytest.mark.parametrize("scenes", [2, 3, 4, 5])
@pytest.mark.parametrize("neighbours", [1, 2, 5])
def test_dpc_knn_finds_clean_scenes(scenes, neighbours):
    """With one neighbour all densities are equal: the index breaks ties, so every scene still gets a centre."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        centre = torch.randn(scenes, 32, generator=generator)
        x = centre.repeat_interleave(8, 0) + 0.1 * torch.randn(scenes * 8, 32, generator=generator)
        assert sorted((dpc_knn(x[None], scenes, neighbours)[0] // 8).tolist()) == list(range(scenes))


def test_dpc_knn_of_large_features_does_not_underflow():
    x = 1000 * torch.randn(1, 20, 4)
    assert torch.equal(dpc_knn(x, 20, 3)[:, :5], dpc_knn(x, 5, 3))
    assert dpc_knn(x, 5, 3).tolist() != [[0, 1, 2, 3, 4]]


def test_dpc_knn_neighbours():
    with pytest.raises(ValueError, match="neighbours"):
        dpc_knn(torch.randn(1, 4, 2), 2, 0)


@given(cases(), st.sampled_from([0, 1, 100]))
def test_k_medoids(case: Case, iterations: int):
    x = case.x[..., :1]  # on a line, distances are whole numbers
    picks = k_medoids(x, case.k, iterations=iterations, mask=case.mask)
    assert picks.shape == (len(x), case.k)
    for b, row in enumerate(picks.tolist() if case.k else []):
        rows = x[b].tolist()
        start = oracle.best(case.real(b), lambda i, rows=rows: abs(rows[i][0]))
        assert row == oracle.medoids(rows, case.real(b), case.k, start, iterations)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_k_medoids_recovers_clusters(metric):
    centre = torch.eye(4) * 10
    x = (centre.repeat_interleave(6, 0) + 0.2 * torch.randn(24, 4))[None]
    medoids = k_medoids(x, 4, metric)
    assert (medoids[0] // 6).tolist() == [0, 1, 2, 3]
    assert torch.equal(nearest_slot(x, medoids)[0], torch.arange(24) // 6)
    with pytest.raises(ValueError, match="metric"):
        k_medoids(x, 4, "manhattan")

"""k-means against its own definition, and on clusters that are plain to see."""

from __future__ import annotations

import pytest
import torch

from vistok.core.cluster import k_means


def test_centres_are_the_means_of_the_rows_nearest_to_them():
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    centres = k_means(x, 6)
    own = [min(range(6), key=lambda j: float((row - centres[j]).square().sum())) for row in x]
    for j in range(6):
        torch.testing.assert_close(centres[j], x[[i for i, o in enumerate(own) if o == j]].mean(0))
    assert torch.equal(centres, k_means(x, 6)) and not torch.equal(centres, k_means(x, 6, seed=1))


def test_clusters_that_are_plain_to_see():
    g = torch.Generator().manual_seed(1)
    middles = 20 * torch.randn(4, 3, generator=g)
    x = (middles[:, None] + 0.1 * torch.randn(4, 50, 3, generator=g)).flatten(0, 1)[torch.randperm(200, generator=g)]
    found = k_means(x, 4)
    nearest = torch.cdist(middles, found).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(found[nearest], middles, atol=0.1, rtol=0)


@pytest.mark.parametrize("k", [1, 3])
def test_equal_rows_and_as_many_centres_as_rows(k):
    assert torch.equal(k_means(torch.ones(3, 2), k), torch.ones(k, 2))
    x = torch.tensor([[0.0], [5.0], [9.0]])
    assert sorted(k_means(x, 3).flatten().tolist()) == [0.0, 5.0, 9.0]
    assert k_means(x.bfloat16(), 1).tolist() == [[pytest.approx(14 / 3)]]


def test_wrong_counts_are_named():
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"^k: got {k} for x of shape \(3, 2\)"):
            k_means(torch.ones(3, 2), k)

"""The local outlier factor against its definition and against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracle
from vistok.core.outlier import local_outlier_factor, outlier_ratio


@given(st.integers(1, 3), st.integers(1, 14), st.integers(1, 20), st.booleans(), st.integers(0, 2**31))
def test_definition(b: int, n: int, neighbours: int, padded: bool, seed: int):
    """Whole numbers: many duplicates and many neighbours at the same distance."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 5, (b, n), generator=generator).double()
    mask = torch.rand(b, n, generator=generator) < 0.7 if padded else None
    factors = local_outlier_factor(values, neighbours, mask)
    ratio = outlier_ratio(values, neighbours, mask)
    for p in range(b):
        real = list(range(n)) if mask is None else mask[p].nonzero()[:, 0].tolist()
        expected = oracle.outlier_factors([values[p, i].item() for i in real], neighbours)
        assert factors[p, real].tolist() == pytest.approx(expected)
        assert ratio[p].item() == pytest.approx(sum(f > 1.5 for f in expected) / max(len(real), 1))
        if mask is not None:
            assert (factors[p][~mask[p]] == 1).all()


@pytest.mark.filterwarnings("ignore:n_neighbors")
@pytest.mark.parametrize("neighbours", [1, 5, 10, 20, 200])
@pytest.mark.parametrize("n", [2, 15, 100, 576])
@pytest.mark.parametrize("kind", ["normal", "attention", "cubed", "float32"])
def test_scikit_learn(neighbours, n, kind):
    sklearn = pytest.importorskip("sklearn.neighbors")
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(n + neighbours), dtype=torch.float64)
    if kind == "attention":
        values = (4 * values).softmax(1)
    elif kind == "cubed":
        values = values**3
    elif kind == "float32":
        values = values.float()
    factors, ratio = local_outlier_factor(values, neighbours), outlier_ratio(values, neighbours)
    for p in range(3):
        reference = sklearn.LocalOutlierFactor(n_neighbors=neighbours, contamination="auto")
        labels = reference.fit_predict(values[p].double().numpy()[:, None])
        assert ratio[p].item() == (labels == -1).mean()
        # Neighbourhoods so dense that they count as points (1e-10 in the density) amplify rounding.
        torch.testing.assert_close(
            factors[p], -torch.from_numpy(reference.negative_outlier_factor_), rtol=1e-4, atol=1e-6
        )


def test_equal_values_have_no_outliers():
    assert outlier_ratio(torch.full((2, 50), 0.3)).tolist() == [0, 0]
    assert (local_outlier_factor(torch.ones(1, 50)) == 1).all()
    for n in (0, 1):
        assert outlier_ratio(torch.ones(2, n)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="neighbours"):
        outlier_ratio(torch.ones(1, 4), 0)


def test_one_value_far_away():
    values = torch.cat([torch.linspace(0, 1, 99), torch.tensor([50.0])])[None]
    factors = local_outlier_factor(values)
    assert int(factors.argmax()) == 99 and outlier_ratio(values).item() == 0.01

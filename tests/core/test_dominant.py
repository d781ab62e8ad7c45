"""``dominant_contextual`` against plain Python, also where scores and similarities tie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracle
from tests.core.oracle import Case, cases
from vistok.core.merge import dominant_contextual


@given(cases(exact_cosines=True), st.data(), st.booleans())
def test_dominant_contextual(case: Case, data: st.DataObject, average: bool):
    b, n = case.mask.shape
    dominant = data.draw(st.integers(0, n))
    contextual = data.draw(st.integers(0, n - dominant))
    score, values = case.whole(b, n), case.whole(b, n, 3)
    places, tokens, source = dominant_contextual(values, score, case.x, dominant, contextual, average)
    assert tokens.shape == (b, dominant + contextual, 3)
    for p in range(b):
        metric, x = case.x[p].tolist(), values[p]
        best = sorted(sorted(range(n), key=lambda i: (-score[p, i].item(), i))[:dominant])
        rest = [i for i in range(n) if i not in best]
        stride = max(1, len(rest) // contextual) if contextual else 1
        anchors = [rest[a * stride] for a in range(contextual)]
        joined: dict[int, list[int]] = {a: [] for a in range(contextual)}
        slot = {i: s for s, i in enumerate(best + anchors)}
        for i in rest if anchors else []:
            if i not in anchors:
                at = [metric[anchor] for anchor in anchors]
                a = oracle.best(range(contextual), lambda a, x=metric[i], at=at: oracle.cosine(x, at[a]))
                joined[a].append(i)
                slot[i] = dominant + a
        assert places[p].tolist() == best + anchors
        assert source[p].tolist() == [slot.get(i, -1) for i in range(n)]
        assert torch.equal(tokens[p, :dominant], x[best])
        for a, members in joined.items():
            both = x[[anchors[a], *members]].mean(0)
            added = x[anchors[a]] + (x[members].mean(0) if members else 0)
            torch.testing.assert_close(tokens[p, dominant + a], both if average else added)


@pytest.mark.parametrize(("dominant", "contextual"), [(-1, 2), (2, -1), (4, 3)])
def test_counts_that_do_not_fit_are_named(dominant, contextual):
    x = torch.randn(1, 6, 2)
    with pytest.raises(ValueError, match=rf"^dominant, contextual: got {dominant}, {contextual}"):
        dominant_contextual(x, x[..., 0], x, dominant, contextual)

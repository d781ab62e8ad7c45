"""The chunked scan of Mamba-2 against the recurrence, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.scan import sequential_scan
from vistok.core.ssd import chunked_scan


def made(b=2, length=11, heads=2, channels=3, n=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(b, length, heads, channels, generator=rng, dtype=torch.float64)
    step = torch.rand(b, length, heads, generator=rng, dtype=torch.float64)
    a = -3 * torch.rand(heads, generator=rng, dtype=torch.float64)
    maps = torch.randn(2, b, length, n, generator=rng, dtype=torch.float64)
    return x, step, a, maps[0], maps[1]


def recurrence(x, step, a, b, c):
    """The scan with a decay a channel, all channels of a head alike."""
    heads, channels = x.shape[2:]
    u = x.flatten(2).transpose(1, 2)
    each = step.repeat_interleave(channels, 2).transpose(1, 2)
    decay = a.repeat_interleave(channels)[:, None].expand(-1, b.shape[2])
    y, _ = sequential_scan(u, each, decay, b.transpose(1, 2), c.transpose(1, 2))
    return y.transpose(1, 2).unflatten(2, (heads, channels))


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
def test_against_the_recurrence(b, length, heads, n, chunk):
    given = made(b, length, heads, n=n, seed=length)
    torch.testing.assert_close(chunked_scan(*given, chunk=chunk), recurrence(*given))


def test_gradients():
    """Of every input, with a last chunk that is not full."""
    given = [t.requires_grad_() for t in made(b=1, length=5)]
    assert torch.autograd.gradcheck(lambda *t: chunked_scan(*t, chunk=2), given)


def test_strong_decay_and_long_sequences_stay_finite():
    x, step, a, b, c = (t.float() for t in made(length=300))
    assert chunked_scan(x, 1e4 * step, 1e4 * a, b, c).isfinite().all()
    y = chunked_scan(x, 4 * step, 4 * a, b, c)
    torch.testing.assert_close(y, recurrence(x, 4 * step, 4 * a, b, c), rtol=1e-3, atol=1e-3)


def test_half_precision_and_autocast_cost_only_rounding():
    given = [t.bfloat16() for t in made(length=70)]
    exact = recurrence(*(t.double() for t in given))
    with torch.autocast("cpu", torch.bfloat16):
        y = chunked_scan(*given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


def test_empty_sequence_and_errors():
    x, step, a, b, c = made()
    assert chunked_scan(x[:, :0], step[:, :0], a, b[:, :0], c[:, :0]).shape == (2, 0, 2, 3)
    with pytest.raises(ValueError, match="step, A: got"):
        chunked_scan(x, step[:, 1:], a, b, c)
    with pytest.raises(ValueError, match="B, C: got"):
        chunked_scan(x, step, a, b, c[..., 1:])
    with pytest.raises(ValueError, match="chunk: got 0"):
        chunked_scan(x, step, a, b, c, chunk=0)

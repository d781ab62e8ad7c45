"""The chunked selective scan against loops over numbers, its gradients, gaps, orders and masks."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.scan import gaps, selective_scan, sequential_scan


def made(b=2, d=3, n=4, length=11, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    u, delta = (torch.randn(b, d, length, generator=rng) for _ in range(2))
    A = -torch.rand(d, n, generator=rng) * 3
    B, C = (torch.randn(b, n, length, generator=rng) for _ in range(2))
    return [t.to(dtype) for t in (u, torch.nn.functional.softplus(delta), A, B, C)]


def oracle(u, delta, A, B, C, order=None, decays=None, skip=()):
    """y[b][d][t] and last state, with Python floats. ``skip``: (picture, token) whose input is 0."""
    batch, channels, length = u.shape
    u, delta, A, B, C = (t.tolist() for t in (u, delta, A, B, C))
    decays = delta if decays is None else decays.tolist()
    y = [[[0.0] * length for _ in range(channels)] for _ in range(batch)]
    last = []
    for b in range(batch):
        h = [[0.0] * len(A[0]) for _ in range(channels)]
        for t in range(length) if order is None else order[b]:
            for d in range(channels):
                for n in range(len(A[0])):
                    put = 0.0 if (b, t) in skip else delta[b][d][t] * B[b][n][t] * u[b][d][t]
                    h[d][n] = math.exp(decays[b][d][t] * A[d][n]) * h[d][n] + put
                    y[b][d][t] += C[b][n][t] * h[d][n]
        last.append(h)
    return torch.tensor(y, dtype=torch.float64), torch.tensor(last, dtype=torch.float64)


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 13), st.integers(1, 15), st.integers(0, 99)
)
def test_against_loops(b, d, n, length, chunk, seed):
    given = made(b, d, n, length, seed)
    y, last = selective_scan(*given, chunk=chunk)
    expected, state = oracle(*given)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last, state)
    for ours, theirs in zip(sequential_scan(*given), (expected, state), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_precision(dtype, tolerance):
    """Inside it is float32: half-precision inputs cost only their own rounding and that of the result."""
    given = [t.to(dtype) for t in made(2, 7, 5, 131)]
    y, last = selective_scan(*given)
    assert y.dtype == dtype and last.dtype == torch.float32
    expected, state = oracle(*(t.double() for t in given))
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last.double(), state, rtol=1e-4, atol=1e-4)


def test_autocast_changes_nothing_inside():
    given = [t.requires_grad_() for t in made(1, 4, 3, 40, dtype=torch.float32)]
    expected = selective_scan(*given)[0]
    gradients = torch.autograd.grad(expected.square().sum(), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(*given)[0]
        again = torch.autograd.grad(y.square().sum(), given)
    assert torch.equal(y, expected)
    for ours, theirs in zip(again, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_skip_gate_bias_and_softplus():
    u, delta, A, B, C = made()
    D, bias, z = torch.randn(3).double(), torch.randn(3).double(), torch.randn(2, 3, 11).double()
    y, _ = selective_scan(u, delta, A, B, C, D, z, bias, True)
    final = torch.log1p((delta + bias[:, None]).exp())
    expected = (oracle(u, final, A, B, C)[0] + D[:, None] * u) * z / (1 + (-z).exp())
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_gradients(chunk):
    given = [t.requires_grad_() for t in made(2, 2, 3, 7)]
    state = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    gap = torch.rand(2, 2, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = False
    order = torch.stack([torch.randperm(7), torch.arange(7).flip(0)])

    def scan(u, delta, A, B, C, gap, state):
        return selective_scan(u, delta, A, B, C, gap=gap, state=state, mask=mask, order=order, chunk=chunk)

    assert torch.autograd.gradcheck(scan, (*given, gap, state))


def test_gradients_of_a_longer_scan_are_those_of_the_definition():
    ours, theirs = ([t.requires_grad_() for t in made(2, 5, 4, 150, dtype=torch.float32)] for _ in range(2))
    selective_scan(*ours, chunk=32)[0].square().mean().backward()
    sequential_scan(*theirs)[0].square().mean().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_order(chunk, length, seed):
    given = made(2, 2, 2, length, seed)
    order = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(seed + i)) for i in range(2)])
    y, last = selective_scan(*given, order=order, chunk=chunk)
    expected, state = oracle(*given, order=order.tolist())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last, state)
    one, _ = selective_scan(*given, order=order[0], chunk=chunk)
    torch.testing.assert_close(one[0], expected[0])


def test_backward_scan_is_the_scan_of_the_turned_sequence():
    u, delta, A, B, C = made()
    y, last = selective_scan(u, delta, A, B, C, order=torch.arange(10, -1, -1))
    turned, state = selective_scan(u.flip(2), delta.flip(2), A, B.flip(2), C.flip(2))
    assert torch.equal(y, turned.flip(2)) and torch.equal(last, state)


@given(st.integers(1, 12), st.data())
def test_gaps_align_a_pruned_scan(length, data):
    """A scan of the kept tokens is the whole one with zero input at the others, read at the kept; both directions."""
    u, delta, A, B, C = made(2, 3, 2, length, data.draw(st.integers(0, 99)))
    k = data.draw(st.integers(1, length))
    keep = torch.stack([torch.tensor(sorted(data.draw(st.permutations(range(length)))[:k])) for _ in range(2)])
    gone = {(b, t) for b in range(2) for t in range(length) if t not in keep[b]}
    kept = [t.gather(2, keep[:, None].expand(-1, t.shape[1], -1)) for t in (u, delta, B, C)]
    for direction in ("forward", "backward"):
        turn = direction == "backward"
        order = torch.arange(length).flip(0).expand(2, -1).tolist() if turn else None
        expected, _ = oracle(u, delta, A, B, C, order=order, skip=gone)
        y, _ = selective_scan(
            *kept[:2],
            A,
            *kept[2:],
            gap=gaps(keep, delta, direction),
            order=torch.arange(k).flip(0) if turn else None,
        )
        torch.testing.assert_close(y, expected.gather(2, keep[:, None].expand(-1, 3, -1)))


def test_a_state_that_a_scan_starts_from_decays_over_the_first_gap():
    u, delta, A, B, C = made(1, 2, 2, 5)
    keep, state = torch.tensor([[2, 4]]), torch.randn(1, 2, 2).double()
    part = [t[..., 2::2] for t in (u, delta, B, C)]
    y, _ = selective_scan(*part[:2], A, *part[2:], gap=gaps(keep, delta), state=state)
    quiet = u.clone()
    quiet[..., [0, 1, 3]] = 0
    expected, _ = selective_scan(quiet, delta, A, B, C, state=state)
    torch.testing.assert_close(y, expected[..., 2::2])


def test_gaps_of_a_constant_step():
    keep = torch.tensor([[1, 4, 5], [0, 1, 2]])
    step = torch.tensor([0.5, 2.0])
    forward, backward = gaps(keep, step, length=8), gaps(keep, step, "backward", length=8)
    assert forward[:, 0].tolist() == [[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert backward[:, 1].tolist() == [[4.0, 0.0, 4.0], [0.0, 0.0, 10.0]]
    same = step[:, None].expand(2, 2, 8)
    assert torch.equal(gaps(keep, same), forward) and torch.equal(gaps(keep, same, "backward"), backward)


def test_naive_scan_of_kept_tokens_differs_unless_nothing_decays():
    u, delta, A, B, C = made(1, 2, 2, 6)
    kept = [t[..., ::2] for t in (u, delta, B, C)]
    for decay, same in ((A, False), (torch.zeros_like(A), True)):
        naive, _ = selective_scan(*kept[:2], decay, *kept[2:])
        aligned, _ = selective_scan(*kept[:2], decay, *kept[2:], gap=gaps(torch.tensor([[0, 2, 4]]), delta))
        assert torch.allclose(naive, aligned) == same


def test_mask_leaves_the_state_and_gives_zero():
    u, delta, A, B, C = made()
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, 7:], mask[1, [0, 3]] = False, False
    y, last = selective_scan(u, delta, A, B, C, torch.ones(3).double(), mask=mask)
    for b in range(2):
        real = mask[b]
        parts = [t[b : b + 1, :, real] for t in (u, delta, B, C)]
        alone, state = selective_scan(*parts[:2], A, *parts[2:], torch.ones(3).double())
        torch.testing.assert_close(y[b : b + 1, :, real], alone)
        torch.testing.assert_close(last[b : b + 1], state)
        assert not y[b][:, ~real].any()


def test_cutting_a_sequence_and_handing_on_the_state_is_one_scan():
    u, delta, A, B, C = made(length=20)
    whole, end = selective_scan(u, delta, A, B, C)
    first, state = selective_scan(u[..., :7], delta[..., :7], A, B[..., :7], C[..., :7])
    second, last = selective_scan(u[..., 7:], delta[..., 7:], A, B[..., 7:], C[..., 7:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole)
    torch.testing.assert_close(last, end)


def test_strong_decay_and_no_tokens():
    u, delta, A, B, C = made(dtype=torch.float32)
    y, last = selective_scan(u, delta * 1e4, A * 1e4, B, C)
    assert y.isfinite().all() and last.isfinite().all()
    y, last = selective_scan(u[..., :0], delta[..., :0], A, B[..., :0], C[..., :0])
    assert y.shape == (2, 3, 0) and not last.any()


def test_what_is_kept_for_backward_does_not_grow_with_the_state():
    """Saved for the backward pass: the inputs and one state a chunk, not one a token."""
    sizes = []
    for n in (4, 32):
        given = [t.requires_grad_() for t in made(1, 8, n, 512, dtype=torch.float32)]
        saved = []

        def keep(t, saved=saved):
            saved.append((t.untyped_storage().data_ptr(), t.numel()))
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            selective_scan(*given, chunk=64)
        sizes.append(sum(dict(saved).values()))
    assert sizes[1] - sizes[0] < (32 - 4) * (2 * 512 + 10 * 8 + 8) + 1  # B and C, a state a chunk, A
    assert sizes[1] < 8 * 32 * 512


def test_errors_name_the_argument():
    u, delta, A, B, C = made()
    with pytest.raises(ValueError, match=r"A: got \(4, 3\), must be \(3, N\)"):
        selective_scan(u, delta, A.T, B, C)
    with pytest.raises(ValueError, match=r"B: got \(2, 4, 10\), must be \(2, 4, 11\)"):
        selective_scan(u, delta, A, B[..., 1:], C)
    with pytest.raises(ValueError, match=r"delta_bias: got \(4,\), must be \(3,\)"):
        selective_scan(u, delta, A, B, C, delta_bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"state: got \(2, 3, 1\), must be \(2, 3, 4\)"):
        selective_scan(u, delta, A, B, C, state=torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="chunk: got 0"):
        selective_scan(u, delta, A, B, C, chunk=0)
    with pytest.raises(ValueError, match=r"order: got \(3,\)"):
        selective_scan(u, delta, A, B, C, order=torch.arange(3))
    with pytest.raises(ValueError, match=r"mask: got \(2, 3\)"):
        selective_scan(u, delta, A, B, C, mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        selective_scan(u, delta, A, B, C, backend="cuda")
    with pytest.raises(ValueError, match=r"places: got 0\.\.11"):
        gaps(torch.tensor([[0, 11]]), delta)


INTERPRETED = """
import torch
from vistok.core.scan import selective_scan
torch.manual_seed(0)
for b, d, n, length, chunk in ((2, 3, 4, 7, 3), (1, 70, 5, 9, 4), (1, 1, 1, 1, 64)):
    u, delta = torch.randn(b, d, length), torch.rand(b, d, length)
    A, B, C = -torch.rand(d, n), torch.randn(b, n, length), torch.randn(b, n, length)
    state, gap = torch.randn(b, d, n), torch.rand(b, d, length)
    order = torch.arange(length).flip(0)
    results = []
    for backend in ("torch", "triton"):
        given = [t.clone().requires_grad_() for t in (u, delta, A, B, C)]
        y, last = selective_scan(*given, gap=gap, state=state, order=order, chunk=chunk, backend=backend)
        (y.square().sum() + last.sum()).backward()
        results.append([y, last] + [t.grad for t in given])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
print("equal")
"""


def test_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "equal"


def test_triton_kernel_is_refused_on_a_cpu():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter takes tensors on a CPU")
    with pytest.raises(ValueError, match="backend: got 'triton' for tensors on cpu"):
        selective_scan(*made(), backend="triton")


@pytest.mark.gpu
def test_triton_kernel_on_a_gpu():
    pytest.importorskip("triton")
    given = [t.cuda().float() for t in made(2, 70, 16, 300)]
    for ours, theirs in zip(selective_scan(*given, backend="triton"), selective_scan(*given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

"""Triton's kernels against dense attention, in its interpreter: a process of its own, since that is chosen on import.

Run the cases by themselves with ``TRITON_INTERPRET=1 pytest tests/core/test_attention_triton.py``.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vistok.core.attention import (
    BlockMask,
    CoarseKV,
    Dense,
    GridWindow,
    Halo,
    TokenIndex,
    attend,
    attend_grid,
    choose,
)

pytest.importorskip("triton")
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
kernels = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_all_in_the_interpreter")


def blocks(b, h, queries, keys, block, share=0.5):
    rng = torch.Generator().manual_seed(queries)
    shape = b, h, math.ceil(queries / block[0]), math.ceil(keys / block[1])
    return BlockMask(torch.rand(shape, generator=rng) < share, queries, keys, block)


def lists(b, h, *shape, keys, count):
    rng = torch.Generator().manual_seed(keys)
    index = torch.rand(b, h, *shape, keys, generator=rng).argsort(-1)[..., :count]
    return torch.where(torch.rand(index.shape, generator=rng) < 0.2, -1, index)


NONE = torch.full((1, 4, 3), -1)
NONE[:, 1:] = torch.arange(3)
TILED = {
    "line": (GridWindow((77,), 9, 4), 40, 24),
    "causal line": (GridWindow((90,), 20, 3, causal=True), 32, 32),
    "plane": (GridWindow((9, 11), (3, 4), (2, 1)), 64, 64),
    "dilated plane": (GridWindow((7, 12), (2, 3), (2, 1), (2, 2), (False, True)), 48, 48),
    "volume": (GridWindow((3, 5, 4), (3, 2, 3), causal=(True, False, False)), 32, 16),
    "halo": (Halo((5, 9), 3, 1, padded=True), 32, 32),
    "blocks of 16": (blocks(2, 2, 50, 40, (16, 16), 0.4), 80, 80),
    "blocks of 64": (blocks(1, 1, 100, 130, (64, 64)), 128, 96),
    "blocks of a picture": (blocks(2, 1, 64, 96, (16, 32)), 33, 33),
    "blocks of a head": (blocks(1, 4, 40, 40, (32, 16)), 128, 128),
    "dense": (Dense(70, 90), 32, 32),
    "causal": (Dense(70, 90, causal=True), 32, 32),
}
LISTED = {
    "a token": (TokenIndex(lists(2, 4, 1, keys=90, count=40), 1, 90), 128, 128),
    "a few causal": (TokenIndex(lists(2, 1, keys=90, count=33), 5, 90, causal=True), 40, 24),
    "each its own": (TokenIndex(lists(1, 1, 7, keys=50, count=17), 7, 50), 32, 32),
    "one head sees none": (TokenIndex(NONE, 2, 9), 32, 32),
}


def made(pattern, d, dv, dtype, grad=False, group=2):
    """As few pictures and heads as the pattern is for, two heads at least, each ``group`` of them on one key head."""
    torch.manual_seed(0)
    b, h, nq, nk = pattern.dense_shape
    h = max(h, 2)
    shapes = (b, h, nq, d), (b, h // group, nk, d), (b, h // group, nk, dv)
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def check(found, expected, dtype):
    """bfloat16 keeps 8 bits of a number; where a sum cancels they are 8 bits of what was summed."""
    size = expected.abs().amax().item()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, rtol=2 * tolerance, atol=max(1.0, size) * tolerance)


HALF = "line", "dilated plane", "blocks of a head", "blocks of 64"


@kernels
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.float32) for name in TILED] + [(name, torch.bfloat16) for name in HALF]
)
def test_tiles_forward_and_backward(name, dtype):
    pattern, d, dv = TILED[name]
    given = made(pattern, d, dv, dtype, grad=True)
    exact = [t.detach().double().requires_grad_() for t in given]
    found = attend(*given, pattern, return_lse=True, executor="triton")
    expected = attend(*exact, pattern, return_lse=True, executor="dense")
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    check(found[0], expected[0], dtype)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    weigh = torch.linspace(-1, 1, expected[0].numel()).view_as(expected[0])

    def loss(out, lse):
        return (out.double() * weigh).sum() + lse.double().masked_fill(lse == -torch.inf, 0).square().sum()

    slopes = torch.autograd.grad(loss(*found), given), torch.autograd.grad(loss(*expected), exact)
    for ours, theirs in zip(*slopes, strict=True):
        assert ours.dtype == dtype
        check(ours, theirs, dtype)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LISTED)
def test_lists(name, dtype):
    pattern, d, dv = LISTED[name]
    given = made(pattern, d, dv, dtype)
    found = attend(*given, pattern, scale=0.2, return_lse=True, executor="triton")
    expected = attend(*(t.double() for t in given), pattern, scale=0.2, return_lse=True, executor="dense")
    check(found[0], expected[0], dtype)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(attend(*given, pattern, scale=0.2, executor="triton"), found[0])


@kernels
def test_levels_are_merged_and_heads_last():
    pattern = CoarseKV((GridWindow((5, 7), 3), blocks(1, 1, 35, 20, (16, 16))), (0.0, math.log(2)))
    given = made(pattern, 16, 16, torch.float32, group=1)
    check(attend(*given, pattern, executor="triton"), attend(*(t.double() for t in given), pattern), torch.float32)
    q, k, v = (torch.randn(1, 5, 7, 2, 16) for _ in range(3))
    extra = torch.randn(1, 3, 2, 16), torch.randn(1, 3, 2, 16)
    found, expected = (
        attend_grid(q, k, v, GridWindow((5, 7), 3), extra_kv=extra, executor=executor)
        for executor in ("triton", "tiles")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@kernels
def test_gradient_through_the_output_alone_and_through_nothing():
    pattern = TILED["blocks of a head"][0]
    given = made(pattern, 16, 16, torch.float32, grad=True)
    out, lse = attend(*given, pattern, return_lse=True, executor="triton")
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = attend(*exact, pattern, return_lse=True, executor="dense")
    for which in (0, 1):
        seen = expected[1] > -torch.inf if which else torch.ones((), dtype=torch.bool)
        part = ((out, lse)[which], expected[which])
        ours, theirs = (torch.where(seen, p, 0).sum() for p in part)
        slopes = torch.autograd.grad(ours, given, retain_graph=True)
        wanted = torch.autograd.grad(theirs, exact, retain_graph=True, allow_unused=True)
        for a, b in zip(slopes, wanted, strict=True):
            check(a, torch.zeros_like(a).double() if b is None else b, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(1, 1, 1, 32)}, "bias: got one with executor 'triton'"),
        ({"dtype": torch.float64}, "for torch.float64, must be"),
        ({"d": 300}, "for heads of 300"),
        ({"pattern": blocks(1, 1, 32, 32, (8, 16))}, r"for blocks of \(8, 16\)"),
        ({"pattern": blocks(1, 1, 32, 32, (16, 48))}, r"for blocks of \(16, 48\)"),
        ({"pattern": TokenIndex(lists(1, 1, keys=32, count=4), 32, 32), "grad": True}, "for a gradient through lists"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    pattern, d = change.get("pattern", Dense(32, 32)), change.get("d", 16)
    given = made(pattern, d, d, change.get("dtype", torch.float32), change.get("grad", False))
    with pytest.raises(ValueError, match=message):
        attend(*given, pattern, change.get("bias"), executor="triton")


def test_auto_takes_it_on_cuda_only(monkeypatch):
    monkeypatch.setattr(sys.modules[choose.__module__], "_has_triton", lambda: True)
    cpu = torch.zeros(1, 4, 64, 32)
    there = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=cpu.shape, dtype=cpu.dtype)
    token = TokenIndex(lists(1, 1, 64, keys=64, count=8), 64, 64)
    patterns = {"blocks": blocks(1, 1, 64, 64, (16, 16)), "token": token, "odd": blocks(1, 1, 64, 64, (10, 16))}
    assert all(choose(cpu, pattern).executor != "triton" for pattern in patterns.values())
    with torch.no_grad():
        found = {name: choose(there, pattern).executor for name, pattern in patterns.items()}
        found["grid"] = choose(there, GridWindow((8, 8), 3)).executor
        found["bias"] = choose(there, patterns["blocks"], cpu).executor
    assert found == {"blocks": "triton", "token": "triton", "odd": "tiles", "grid": "flex", "bias": "tiles"}
    assert choose(there, token).executor == "gather"  # gradients may be asked for


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on a CPU")
def test_refused_on_a_cpu():
    with pytest.raises(ValueError, match="executor: got 'triton' for tensors on cpu"):
        attend(*made(Dense(4, 4), 16, 16, torch.float32), Dense(4, 4), executor="triton")


@pytest.mark.skipif(INTERPRETED, reason="is in it")
def test_all_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", TILED)
def test_on_a_gpu(name):
    pattern, d, dv = TILED[name]
    given = [t.cuda().requires_grad_() for t in made(pattern, d, dv, torch.float32)]
    found, expected = (attend(*given, pattern, executor=executor) for executor in ("triton", "dense"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    slopes = [torch.autograd.grad(out.square().sum(), given) for out in (found, expected)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

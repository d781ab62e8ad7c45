"""Every executor against attention a row at a time, in any precision, with groups of heads, biases and gradients."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from vistok.core.attention import (
    BlockMask,
    CoarseKV,
    Dense,
    GridWindow,
    Halo,
    TokenIndex,
    Window,
    attend,
    choose,
    flex,
    merge_lse,
    mix,
)
from vistok.core.attention.grid import Grid


def blocks(b, h, queries, keys, block, seed=0, share=0.5):
    rng = torch.Generator().manual_seed(seed)
    shape = b, h, math.ceil(queries / block[0]), math.ceil(keys / block[1])
    return BlockMask(torch.rand(shape, generator=rng) < share, queries, keys, block)


def lists(b, h, *shape, keys, count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    index = torch.rand(b, h, *shape, keys, generator=rng).argsort(-1)[..., :count]
    return torch.where(torch.rand(index.shape, generator=rng) < 0.2, -1, index)


PATTERNS = {
    "grid": GridWindow((5, 7), 3),
    "line": GridWindow((35,), 8, 3),
    "dilated": GridWindow((5, 7), (2, 3), (2, 1), (2, 2)),
    "causal": GridWindow((5, 7), (3, 4), (1, 3), causal=(False, True)),
    "volume": GridWindow((3, 4, 5), (3, 2, 3), causal=(True, False, False)),
    "halo": Halo((5, 7), 3, 1),
    "padded": Halo((5, 7), 3, 1, padded=True),
    "window": Window((5, 7), 3, 1),
    "blocks": blocks(2, 4, 35, 29, (8, 6)),
    "blocks of a picture": blocks(2, 1, 35, 29, (8, 6), share=0.3),
    "blocks of a head": blocks(1, 4, 35, 29, (8, 6)),
    "blocks of all": blocks(1, 1, 35, 29, (8, 6)),
    "list": TokenIndex(lists(2, 4, keys=29, count=9), 35, 29),
    "list of a picture": TokenIndex(lists(2, 1, keys=29, count=9), 7, 29, causal=True),
    "list of a query": TokenIndex(lists(2, 4, 35, keys=29, count=5), 35, 29),
    "dense": Dense(35, 29),
    "dense causal": Dense(29, 35, causal=True),
    "square causal": Dense(35, 35, causal=True),
    "coarse": CoarseKV(
        (GridWindow((5, 7), 3), blocks(2, 4, 35, 9, (8, 2), share=0.3), Dense(35, 3)), (0.0, math.log(4), -1.0)
    ),
}
every = pytest.mark.parametrize("name", PATTERNS)
EXECUTORS = ("dense", "gather", "tiles")


def made(pattern, heads=4, kv_heads=2, d=8, dv=None, dtype=torch.float64, seed=0, grad=False):
    _, _, nq, nk = pattern.dense_shape
    rng = torch.Generator().manual_seed(seed)
    shapes = (2, heads, nq, d), (2, kv_heads, nk, d), (2, kv_heads, nk, dv or d)
    return [torch.randn(s, generator=rng).to(dtype).requires_grad_(grad) for s in shapes]


def oracle(q, k, v, pattern, bias=None, scale=None):
    """Output and log-sum-exp, a row at a time, from the pattern's dense mask."""
    b, h, nq, d = q.shape
    mask = pattern.to_dense().expand(b, h, nq, -1)
    weights = pattern.log_bias() if isinstance(pattern, CoarseKV) else torch.zeros(k.shape[2])
    bias = torch.zeros(1) if bias is None else bias
    bias = bias.expand(b, h, nq, k.shape[2]) + weights
    out, lse = torch.zeros(b, h, nq, v.shape[3], dtype=q.dtype), torch.full((b, h, nq), -torch.inf, dtype=q.dtype)
    for i in range(b):
        for j in range(h):
            own = j // (h // k.shape[1])
            for n in range(nq):
                seen = mask[i, j, n].nonzero()[:, 0]
                if len(seen):
                    logits = k[i, own, seen] @ q[i, j, n] * (d**-0.5 if scale is None else scale)
                    logits = logits + bias[i, j, n, seen]
                    lse[i, j, n] = logits.logsumexp(0)
                    out[i, j, n] = logits.softmax(0) @ v[i, own, seen]
    return out, lse


@every
@pytest.mark.parametrize("executor", EXECUTORS)
def test_against_rows(name, executor):
    pattern = PATTERNS[name]
    given = made(pattern)
    expected = oracle(*given, pattern, scale=0.7)
    torch.testing.assert_close(attend(*given, pattern, scale=0.7, executor=executor), expected[0])
    found = attend(*given, pattern, scale=0.7, executor=executor, return_lse=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@every
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_precision(name, executor, dtype, tolerance):
    pattern = PATTERNS[name]
    given = made(pattern, kv_heads=4, d=32, dtype=dtype)
    expected = oracle(*(t.double() for t in given), pattern)
    out, lse = attend(*given, pattern, executor=executor, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(attend(*given, pattern, executor=executor), out, rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients(name, executor):
    """Through output and log-sum-exp, of q, k, v and a bias by key, against those of the rows."""
    pattern = PATTERNS[name]
    given = made(pattern, grad=True)
    bias = torch.randn(2, 1, 1, pattern.dense_shape[3], dtype=torch.float64, requires_grad=True)

    def loss(out, lse):
        seen = lse > -torch.inf
        weigh = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return (out * weigh).sum() + lse.masked_fill(~seen, 0).square().sum()

    ours = torch.autograd.grad(loss(*attend(*given, pattern, bias, executor=executor, return_lse=True)), [*given, bias])
    theirs = torch.autograd.grad(loss(*oracle(*given, pattern, bias)), [*given, bias])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["causal", "blocks", "list", "coarse"])
def test_gradcheck(name):
    pattern = PATTERNS[name]
    given = made(pattern, heads=4, kv_heads=2, d=2, dv=3, grad=True)
    bias = torch.randn(1, 4, pattern.dense_shape[2], pattern.dense_shape[3], dtype=torch.float64, requires_grad=True)

    def run(q, k, v, bias):
        return attend(q, k, v, pattern, bias, executor="tiles")

    assert torch.autograd.gradcheck(run, (*given, bias), fast_mode=True)


@pytest.mark.parametrize("shape", [(29,), (1, 29), (35, 1), (35, 29), (4, 1, 29), (2, 1, 35, 29), (2, 4, 35, 29)])
@pytest.mark.parametrize("name", ["blocks", "blocks of all", "list of a query", "dense"])
def test_bias_of_any_shape(name, shape):
    pattern = PATTERNS[name]
    given = made(pattern)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected, _ = oracle(*given, pattern, bias)
    (slope,) = torch.autograd.grad(expected.square().sum(), bias)
    for executor in EXECUTORS:
        found = attend(*given, pattern, bias, executor=executor)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), bias)[0], slope)


@pytest.mark.parametrize("budget", [1, 3000])
@every
def test_chunks_change_nothing(name, budget, monkeypatch):
    pattern = PATTERNS[name]
    given = made(pattern, grad=True)
    whole = attend(*given, pattern, executor="tiles")
    slopes = torch.autograd.grad(whole.square().sum(), given)
    monkeypatch.setitem(mix.CHUNK, "cpu", budget)
    parts = attend(*given, pattern, executor="tiles")
    torch.testing.assert_close(parts, whole)
    for a, b in zip(torch.autograd.grad(parts.square().sum(), given), slopes, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [n for n, p in PATTERNS.items() if isinstance(p, Grid)])
@pytest.mark.parametrize("size", [1, 2, 50])
def test_tiles_of_any_size_give_the_same(name, size):
    pattern = PATTERNS[name]
    given = made(pattern)
    out, _ = mix.mix_tiles(*given, pattern, pattern.tiles(size))
    torch.testing.assert_close(out, attend(*given, pattern, executor="dense"))


def test_other_width_of_values_and_no_row():
    """A list that is empty for one head: 0 and -inf there, and gradients that are numbers."""
    index = torch.tensor([[[0, 2], [-1, -1]]])
    pattern = TokenIndex(index, 3, 4)
    given = made(pattern, heads=2, kv_heads=1, d=4, dv=6, grad=True)
    for executor in EXECUTORS:
        out, lse = attend(*given, pattern, executor=executor, return_lse=True)
        assert (
            bool((out[:, 1] == 0).all()) and bool((lse[:, 1] == -torch.inf).all()) and bool(lse[:, 0].isfinite().all())
        )
        assert torch.equal(attend(*given, pattern, executor=executor)[:, 1], torch.zeros(2, 3, 6).double())
        assert all(bool(t.isfinite().all()) for t in torch.autograd.grad(out.sum() + lse[:, 0].sum(), given))


def test_constant_values_come_out():
    for pattern in PATTERNS.values():
        q, k, v = made(pattern)
        out = attend(q, k, torch.ones_like(v), pattern)
        sees = pattern.to_dense().any(3, keepdim=True).expand(2, 4, -1, 8)
        torch.testing.assert_close(out, sees.double())


def test_reversed_attention_is_two_calls():
    """F^T v for F = softmax(q k^T): queries k, keys q, the rows' log-sum-exp as a bias, and its own as a factor."""
    pattern = Dense(13, 13)
    q, k, v = made(pattern, kv_heads=4)
    _, lse = attend(q, k, v, pattern, return_lse=True, executor="tiles")
    out, back = attend(k, q, v, pattern, -lse[:, :, None], return_lse=True, executor="tiles")
    weights = torch.softmax(q @ k.transpose(2, 3) * 8**-0.5, -1)
    torch.testing.assert_close(out * back.exp()[..., None], weights.transpose(2, 3) @ v)


def test_merge_of_any_split_is_one_softmax():
    q, k, v = made(Dense(6, 15))
    whole = attend(q, k, v, Dense(6, 15), return_lse=True, executor="dense")
    parts = [
        attend(q, k_, v_, Dense(6, k_.shape[2]), return_lse=True, executor="dense")
        for k_, v_ in zip(k.split([4, 1, 10], 2), v.split([4, 1, 10], 2), strict=True)
    ]
    for order in ([0, 1, 2], [2, 0, 1]):
        found = merge_lse([parts[i][0] for i in order], [parts[i][1] for i in order])
        for ours, theirs in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, theirs)
    left = merge_lse(*zip(parts[0], parts[1], strict=True))
    found = merge_lse(*zip(left, parts[2], strict=True))
    torch.testing.assert_close(found[0], whole[0])


def test_merge_with_nothing_is_the_identity():
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    none = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    found = merge_lse([out, none[0]], [lse, none[1]])
    torch.testing.assert_close(found[0], out)
    torch.testing.assert_close(found[1], lse)
    lse.requires_grad_()
    empty = merge_lse([none[0]] * 2, [none[1] + 0 * lse] * 2)
    assert torch.equal(empty[0], none[0]) and torch.equal(empty[1], none[1])
    with pytest.raises(ValueError, match="lses: got 1 for 2"):
        merge_lse([out, out], [lse])


def test_autocast_changes_nothing_inside():
    pattern = PATTERNS["grid"]
    given = made(pattern, dtype=torch.float32, grad=True)
    plain = attend(*given, pattern, executor="tiles")
    slopes = torch.autograd.grad(plain.square().sum(), given)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*given, pattern, executor="tiles")
        again = torch.autograd.grad(found.square().sum(), given)
    assert torch.equal(found, plain) and all(torch.equal(a, b) for a, b in zip(again, slopes, strict=True))


FLEXIBLE = [n for n, p in PATTERNS.items() if isinstance(p, Grid | BlockMask)]


@pytest.mark.parametrize("name", FLEXIBLE)
def test_flex_agrees(name):
    """Not compiled, which goes by the masks alone; the block lists that a kernel goes by have a test of their own."""
    pattern = PATTERNS[name]
    given = made(pattern, d=16, dtype=torch.float32)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = attend(*given, pattern, executor="dense")
        found = attend(*given, pattern, executor="flex")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [*(PATTERNS[n] for n in FLEXIBLE), GridWindow((17, 40), (5, 9), (1, 3), (1, 2))])
def test_flex_block_lists(pattern):
    """Blocks in no list hold no pair, full ones nothing but pairs, and padded keys are in partial blocks only."""
    order = None
    if isinstance(pattern, Grid):
        mask, queries, keys = flex._grid_mask(pattern, torch.device("cpu"))
        order = queries.order, keys.order
        seen = pattern.to_dense()[:, :, order[0].clamp_min(0)][..., order[1].clamp_min(0)]
        seen = seen & (order[1] >= 0)
    else:
        mask = flex._block_mask(pattern, torch.device("cpu"))
        seen = pattern.to_dense()
    bq, bk = mask.BLOCK_SIZE
    seen = torch.nn.functional.pad(seen, (0, -seen.shape[3] % bk, 0, -seen.shape[2] % bq))
    tiles = seen.unflatten(3, (-1, bk)).unflatten(2, (-1, bq)).transpose(3, 4)
    real = torch.ones(pattern.dense_shape[2] if order is None else len(order[0]), dtype=torch.bool)
    real = (real if order is None else order[0] >= 0).float()
    real = torch.nn.functional.pad(real, (0, -len(real) % bq)).view(-1, 1, bq, 1).bool()
    some, whole = (tiles & real).flatten(4).any(4), (tiles | ~real).flatten(4).all(4)
    for counts, numbers, wanted in (
        (mask.full_kv_num_blocks, mask.full_kv_indices, whole & some),
        (mask.kv_num_blocks, mask.kv_indices, some & ~whole),
    ):
        listed = torch.zeros_like(wanted)
        for at in (counts > 0).nonzero():
            where = tuple(at)
            listed[where][numbers[where][: counts[where]].long()] = True
        assert torch.equal(listed, wanted)


@pytest.mark.slow
def test_flex_compiled():
    pattern = GridWindow((16, 16), 5)
    given = made(pattern, d=16, dtype=torch.float32)
    with torch.no_grad():
        expected = attend(*given, pattern, executor="dense")
        torch.testing.assert_close(attend(*given, pattern, executor="flex"), expected, rtol=1e-4, atol=1e-5)


def test_memory_grows_with_tokens_not_with_pairs():
    """The largest tensor that the tiles make, forward and backward, is no larger for a line twice as long."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                    self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
            return out

    found = []
    for n in (8192, 16384):
        pattern = GridWindow((n,), 129)
        given = made(pattern, heads=1, kv_heads=1, d=4, dtype=torch.float32, grad=True)
        pattern.tiles()
        with Largest() as largest:
            attend(*given, pattern, executor="tiles").sum().backward()
        found.append(largest.size)
    assert found[1] <= 2 * max(found[0], 1) and found[1] < 16384 * 129


def test_choice_says_what_and_why(caplog):
    small, large = GridWindow((4, 4), 3), GridWindow((64, 64), 7)
    q = torch.zeros(1, 4, 1, 64)
    assert choose(q, small).executor == "dense" and choose(q, large).executor == "tiles"
    assert "of all pairs" in choose(q, large).why
    assert choose(q, Dense(4096, 4096)).executor == "dense"
    assert choose(q, PATTERNS["list of a query"]).executor == "gather"
    with caplog.at_level(logging.DEBUG, "vistok"):
        attend(*made(small), small)
    assert "GridWindow: dense" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 9)}, "q: got 3"),
        ({"k": torch.zeros(2, 3, 9, 8)}, "k: got"),
        ({"v": torch.zeros(2, 2, 8, 8)}, "v: got"),
        ({"v": torch.zeros(2, 2, 9, 8).half()}, "v: got"),
        ({"pattern": Dense(9, 8)}, "pattern: got one of shape"),
        ({"pattern": TokenIndex(torch.zeros(3, 1, 1).long(), 9, 9)}, "pattern: got one of shape"),
        ({"bias": torch.zeros(5, 9)}, "bias: got"),
        ({"executor": "fast"}, "executor: got 'fast'"),
        ({"executor": "flex"}, "executor: got 'flex' for Dense"),
        ({"executor": "flex", "bias": torch.zeros(9)}, "bias: got one"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    given = {"q": torch.zeros(2, 4, 9, 8), "k": torch.zeros(2, 2, 9, 8), "v": torch.zeros(2, 2, 9, 8)}
    with pytest.raises(ValueError, match=message):
        attend(**({**given, "pattern": Dense(9, 9)} | change))


def test_what_flex_has_not_on_a_cpu():
    pattern = PATTERNS["grid"]
    with pytest.raises(ValueError, match="executor: got 'flex' for return_lse on a CPU"):
        attend(*made(pattern), pattern, executor="flex", return_lse=True)
    with pytest.raises(ValueError, match="executor: got 'flex' for a gradient on a CPU"):
        attend(*made(pattern, grad=True), pattern, executor="flex")

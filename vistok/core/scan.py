"""The selective scan of state space models (Mamba), with gaps where tokens are gone, in any order, with masks.

    h_t = exp((delta_t + gap_t) A) h_(t-1) + delta_t B_t u_t        y_t = C_t h_t + D u_t        (out: y silu(z))

Source: Gu and Dao, arXiv 2312.00752. ``gap`` is what keeps a pruned scan aligned with the whole one (Zhan et al.,
arXiv 2409.18962): a token that is gone brings no input but lets the state decay, and the decay over any number of
them is one exponential of the sum of their steps. So a gap costs one number a channel, not a step of the scan.

``sequential_scan`` is the definition. ``selective_scan`` works in chunks: within one all decays and inputs are made
at once and a token costs one fused multiply-add; only the states between chunks are kept for the backward pass, which
makes the others again. Memory O(L) without the factor of the state, on any device, on a CPU too.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu, softplus

from vistok.core.tensors import upcast


def sequential_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, gap: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: y (B, D, L) without its ``D u``, and the last state (B, D, N).

    Shapes as in ``selective_scan``; ``delta`` is final. Differentiable any number of times; memory O(L D N).
    """
    h = u.new_zeros(u.shape[0], *A.shape) if state is None else state
    decay = delta if gap is None else delta + gap
    y = []
    for t in range(u.shape[2]):
        h = (decay[:, :, t, None] * A).exp() * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        y.append((h * C[:, None, :, t]).sum(2))
    return torch.stack(y, 2) if y else u.clone(), h


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    gap: Tensor | None = None,
    order: Tensor | None = None,
    mask: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 16,
    backend: Literal["torch", "triton"] = "torch",
) -> tuple[Tensor, Tensor]:
    """y (B, D, L) in the dtype of ``u``, and the last state (B, D, N), in float32 at least as all that is inside.

    ``u``, ``delta``, ``z`` (B, D, L), channel first; ``A`` (D, N), negative; ``B``, ``C`` (B, N, L); ``D`` and
    ``delta_bias`` (D). The bias is added to ``delta``, which then goes through a softplus if ``delta_softplus``.
    ``gap`` (B, D, L), 0 or more: the summed steps of the tokens that are gone before each one, in the order of the scan
    (``gaps`` makes it). ``order`` (L) or (B, L) int64: the scan visits tokens in this order; results stand where the
    tokens do. ``mask`` (B, L) bool, False at padding: it leaves the state as it is, and its y is 0.
    ``state`` (B, D, N): where the scan starts, by default 0. ``chunk`` tokens are worked on at a time, few enough to
    stay in a cache; a state a chunk is kept for the backward pass.
    ``backend`` "triton" makes the forward pass one kernel (a CUDA device, float32; backward as in torch).
    Raises ValueError for shapes that do not fit. The first derivative is exact; for a second use ``sequential_scan``.
    """
    _check(
        u, A, {"delta": delta, "z": z, "gap": gap}, {"B": B, "C": C}, {"D": D, "delta_bias": delta_bias}, mask, state
    )
    b, _, length = u.shape
    if order is not None and order.shape not in ((length,), (b, length)):
        raise ValueError(f"order: got {tuple(order.shape)}, must be ({length},) or ({b}, {length})")
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, must be 1 or more")
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend: got {backend!r}, must be 'torch' or 'triton'")
    x, delta, A, B, C = (upcast(t) for t in (u, delta, A, B, C))
    delta = delta if delta_bias is None else delta + upcast(delta_bias)[:, None]
    delta = softplus(delta) if delta_softplus else delta
    decay = delta if gap is None else delta + upcast(gap)
    if mask is not None:
        delta, decay = (t.masked_fill(~mask[:, None], 0) for t in (delta, decay))
    first = x.new_zeros(len(x), *A.shape) if state is None else upcast(state)
    # Time first: one row of memory a step.
    given = [t.permute(2, 0, 1) for t in (delta * x, decay, B, C)]
    if order is not None:
        visit = order.expand(len(x), -1).T[..., None]
        given = [t.gather(0, visit.expand_as(t)) for t in given]
    y, last = _Scan.apply(*given, A, first, chunk, backend)
    if order is not None:
        y = torch.zeros_like(y).scatter(0, visit.expand_as(y), y)
    y = y.permute(1, 2, 0)
    y = y if D is None else y + x * upcast(D)[:, None]
    y = y if z is None else y * silu(upcast(z))
    return (y if mask is None else y.masked_fill(~mask[:, None], 0)).to(u.dtype), last


def gaps(places: Tensor, step: Tensor, order: Literal["forward", "backward"] = "forward", length: int = 0) -> Tensor:
    """(B, D, K): the summed steps of the places that no token stands at, passed before each of K tokens.

    ``places`` (B, K) int64, ascending: where the tokens stood. ``step`` (B, D, L): the step at every place, or (D): the
    same at all, and then ``length`` says L. Before the first token of a scan there is nothing to decay, but the
    steps are counted all the same: they matter to a scan that starts from a state. For ``selective_scan(gap=...)``.
    """
    if order not in ("forward", "backward"):
        raise ValueError(f"order: got {order!r}, must be 'forward' or 'backward'")
    b, k = places.shape
    length = step.shape[2] if step.dim() == 3 else length
    if k and not (int(places.min()) >= 0 and int(places.max()) < length):
        raise ValueError(f"places: got {int(places.min())}..{int(places.max())}, must lie in 0..{length - 1}")
    at = torch.cat([places.new_full((b, 1), -1), places, places.new_full((b, 1), length)], 1)
    missing = at.diff(dim=1) - 1
    missing = missing[:, :k] if order == "forward" else missing[:, 1:]
    if step.dim() == 1:
        return missing[:, None] * upcast(step)[:, None]
    gone = torch.ones(b, length, dtype=torch.bool, device=places.device).scatter(1, places, False)
    # Which token a place that is gone comes before: summing by token keeps what a difference of sums would cancel.
    before = torch.searchsorted(places.contiguous(), torch.arange(length, device=places.device).repeat(b, 1))
    before = before if order == "forward" else before - 1
    into = torch.where(gone & (before >= 0) & (before < k), before, k)[:, None].expand(-1, step.shape[1], -1)
    return upcast(step).new_zeros(b, step.shape[1], k + 1).scatter_add(2, into, upcast(step))[:, :, :k]


def step_bias(count: int) -> Tensor:
    """(count) biases that a network starts from: their softplus lies in 1e-3 .. 0.1, its logarithm evenly spread."""
    step = torch.empty(count).uniform_(math.log(1e-3), math.log(0.1)).exp()
    return step + (-torch.expm1(-step)).log()


class _Scan(torch.autograd.Function):
    """y (L, B, D) and the last state of x = delta u, decay (L, B, D), B, C (L, B, N), A (D, N), first state."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        decay: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        first: Tensor,
        chunk: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        length = len(x)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        states = first.new_empty(-(-length // chunk), *first.shape)  # the state before each chunk
        if backend == "triton":
            from vistok.core.scan_triton import scan

            last = scan(x, decay, B, C, A, first, y, states, chunk)
        else:
            last = first
            with torch.autocast(x.device.type, enabled=False):
                for i, part in enumerate(_parts(length, chunk)):
                    states[i] = last
                    h, _ = _chunk_states(x[part], decay[part], B[part], A, last)
                    torch.matmul(h, C[part].unsqueeze(3), out=y[part].unsqueeze(3))
                    last = h[-1].clone()
        ctx.save_for_backward(x, decay, B, C, A, states)
        ctx.chunk = chunk
        return y, last.clone() if last is first else last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return *_gradients(ctx.saved_tensors, ctx.chunk, dy, dlast), None, None


def _gradients(saved: tuple[Tensor, ...], chunk: int, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
    """Of x, decay, B, C, A and the first state; the states of each chunk are made again."""
    x, decay, B, C, A, states = saved
    dx, ddecay, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, decay, B, C))
    dA = torch.zeros_like(A)
    later = dlast  # the gradient of the state that a chunk leaves
    for i, part in reversed(list(enumerate(_parts(len(x), chunk)))):
        h, a = _chunk_states(x[part], decay[part], B[part], A, states[i])
        dC[part] = torch.einsum("lbd,lbdn->lbn", dy[part], h)
        dh = dy[part].unsqueeze(3) * C[part].unsqueeze(2)
        dh[-1] += later
        for t in range(len(dh) - 2, -1, -1):
            dh[t].addcmul_(a[t + 1], dh[t + 1])
        later = a[0] * dh[0]
        dx[part] = (dh @ B[part].unsqueeze(3)).squeeze(3)
        dB[part] = torch.einsum("lbd,lbdn->lbn", x[part], dh)
        before = torch.cat([states[i][None], h[:-1]])
        exponent = dh.mul_(before).mul_(a)  # gradient of decay * A
        ddecay[part] = torch.einsum("lbdn,dn->lbd", exponent, A)
        dA += torch.einsum("lbdn,lbd->dn", exponent, decay[part])
    return dx, ddecay, dB, dC, dA, later


def _chunk_states(x: Tensor, decay: Tensor, B: Tensor, A: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """States (T, B, D, N) after each of T tokens, from the state ``h`` before them; and the decays (T, B, D, N)."""
    a = (decay.unsqueeze(3) * A).exp_()
    states = x.unsqueeze(3) * B.unsqueeze(2)
    for t in range(len(x)):
        h = states[t].addcmul_(a[t], h)
    return states, a


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def _check(
    u: Tensor,
    A: Tensor,
    like_u: dict[str, Tensor | None],
    maps: dict[str, Tensor | None],
    by_channel: dict[str, Tensor | None],
    mask: Tensor | None,
    state: Tensor | None,
) -> None:
    """ValueError naming the first argument whose shape does not fit ``u`` (B, D, L) and ``A`` (D, N)."""
    b, d, length = u.shape
    if A.dim() != 2 or A.shape[0] != d:
        raise ValueError(f"A: got {tuple(A.shape)}, must be ({d}, N), a row a channel of u")
    n = A.shape[1]
    wanted: list[tuple[tuple[int, ...], dict[str, Tensor | None]]] = [
        ((b, d, length), like_u),
        ((b, n, length), maps),
        ((d,), by_channel),
        ((b, length), {"mask": mask}),
        ((b, d, n), {"state": state}),
    ]
    for shape, arguments in wanted:
        for name, t in arguments.items():
            if t is not None and t.shape != shape:
                raise ValueError(f"{name}: got {tuple(t.shape)}, must be {shape}")

"""Attention of tokens that lie on several ranks, forward and backward, by the schedules of ``vistok.parts.ring``.

In the backward pass of "ring" keys and values go round again, and gathered gradients of them a step behind. In that of
the others queries do, with the gradients above, and the gradients of queries come back; those of keys and values stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vistok.core.attention import Dense, attend, merge_lse
from vistok.core.tensors import upcast
from vistok.parts.ring import Program, Schedule, Share, Tensors, Work, World, keys_travel, rows_travel


def split(x: Tensor, share: Share) -> Tensor:
    """``x`` (B, H, N, ...) as (ranks, B, H, N / ranks, ...)."""
    return x[:, :, share.positions().to(x.device)].movedim(2, 0)


def join(parts: Tensor, share: Share) -> Tensor:
    """The inverse."""
    return parts.movedim(0, 2).flatten(2, 3)[:, :, share.positions().flatten().argsort().to(parts.device)]


def sharded_attention(
    q: Tensor, k: Tensor, v: Tensor, world: World, share: Share, schedule: Schedule, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the ranks that run here, R of them: ``q`` (R, B, H, n, d), ``k``, ``v`` (R, B, Hk, n, d), n tokens
    each. Output as ``q``, and the log-sum-exp (R, B, H, n), float32 at least. The first derivative is exact; all ranks
    must ask for it, in the same order."""
    if q.dim() != 5 or k.shape != v.shape or q.shape[3] != share.length or k.shape[3] != share.length:
        got = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q, k, v: got {got}, must have {share.length} tokens on each rank, and k and v alike")
    out, lse = _Sharded.apply(q, k, v, world, share, schedule, scale)
    return out, lse


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, world: World, share: Share, schedule: Schedule, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        sums = [_Merged() for _ in world.ranks]
        travel = _forward_ring if schedule == "ring" else _forward_rows
        ranks = enumerate(world.ranks)
        world.run([travel(share, rank, q[i], k[i], v[i], sums[i], scale) for i, rank in ranks])
        out = torch.stack([upcast(each.out) for each in sums]).to(q.dtype)
        lse = torch.stack([each.lse for each in sums])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.of = world, share, schedule, scale
        ctx.set_materialize_grads(True)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        world, share, schedule, scale = ctx.of
        delta = (upcast(dout) * upcast(out)).sum(4) - dlse
        sums = [[torch.zeros_like(x, dtype=upcast(x[:0]).dtype) for x in of] for of in zip(q, k, v, strict=True)]
        travel = _backward_ring if schedule == "ring" else _backward_rows
        above = [*zip(dout, lse, delta, strict=True)]
        ranks = enumerate(world.ranks)
        world.run([travel(share, rank, q[i], k[i], v[i], above[i], sums[i], scale) for i, rank in ranks])
        grads = (torch.stack(x).to(q.dtype) for x in zip(*sums, strict=True))
        return *grads, None, None, None, None


class _Merged:
    """A rank's output so far."""

    out: Tensor
    lse: Tensor

    def add(self, part: Tensors, rows: slice) -> None:
        out, lse = part
        if not hasattr(self, "out"):  # its own keys come first, and all of its rows see some
            self.out, self.lse = upcast(out).clone(), lse.clone()
            return
        merged = merge_lse([self.out[:, :, rows], upcast(out)], [self.lse[:, :, rows], lse])
        self.out[:, :, rows], self.lse[:, :, rows] = merged


def _block(q: Tensor, k: Tensor, v: Tensor, work: Work, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention of rows over the keys of ``work``."""
    k, v = k[:, :, work.keys], v[:, :, work.keys]
    pattern = Dense(q.shape[2], k.shape[2], work.causal)
    return attend(q, k, v, pattern, scale=scale, return_lse=True, executor="tiles")


def _gradients(q: Tensor, above: Tensors, k: Tensor, v: Tensor, work: Work, scale: float | None) -> list[Tensor]:
    """Of q, k and v in a block, whose output is a share of the whole: exp of its log-sum-exp less the whole's.

    ``above``: the gradient of the whole output, its log-sum-exp, and what both sum to by row.
    """
    dout, lse, delta = above
    given = [upcast(x).detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        part, own = _block(given[0], given[1], given[2], work, scale)
    weight = (own.detach() - lse).exp()
    dpart = upcast(dout) * weight[..., None]
    down = (dpart * part.detach()).sum(3) - weight * delta
    return [*torch.autograd.grad((part, own), given, (dpart, down))]


def _forward_rows(
    share: Share, rank: int, q: Tensor, k: Tensor, v: Tensor, total: _Merged, scale: float | None
) -> Program:
    like = torch.empty_like(q), torch.empty(q.shape[:3], dtype=upcast(q[:0]).dtype, device=q.device)
    return rows_travel(share, rank, (q,), like, lambda held, _, work: _block(held[0], k, v, work, scale), total.add)


def _forward_ring(
    share: Share, rank: int, q: Tensor, k: Tensor, v: Tensor, total: _Merged, scale: float | None
) -> Program:
    def compute(held: Tensors, owner: int) -> Tensors:
        if work := share.work(rank, owner):
            total.add(_block(q[:, :, work.rows], held[0], held[1], work, scale), work.rows)
        return ()

    return keys_travel(share, rank, (k, v), compute)


def _backward_rows(
    share: Share,
    rank: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    above: Tensors,
    total: list[Tensor],
    scale: float | None,
) -> Program:
    def compute(held: Tensors, owner: int, work: Work) -> Tensors:
        dq, dk, dv = _gradients(held[0], held[1:], k, v, work, scale)
        total[1] += dk
        total[2] += dv
        return (dq,)

    def collect(came: Tensors, rows: slice) -> None:
        total[0][:, :, rows] += came[0]

    return rows_travel(share, rank, (q, *above), (total[0],), compute, collect)


def _backward_ring(
    share: Share,
    rank: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    above: Tensors,
    total: list[Tensor],
    scale: float | None,
) -> Program:
    def compute(held: Tensors, owner: int) -> Tensors:
        work = share.work(rank, owner)
        if work is None:
            return torch.zeros_like(total[1]), torch.zeros_like(total[2])
        dq, dk, dv = _gradients(q, above, held[0], held[1], work, scale)
        total[0] += dq
        return dk, dv

    grads = yield from keys_travel(share, rank, (k, v), compute)
    total[1], total[2] = grads
    return grads

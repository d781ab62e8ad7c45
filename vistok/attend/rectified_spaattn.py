"""Rectified SpaAttn: what block-sparse attention leaves out is estimated from means, and put back where that helps.

What: in a softmax over few blocks of keys each counts too much, and the rest is lost. Tokens lie along a Hilbert curve,
so that a block is a piece of the video. The map between block means, its mass counted by block size and text keys apart
(IPAR), is an estimate of full attention. It chooses the blocks of each query block: the best until ``p_min`` of the
mass, at least a share of 1 - ``drop``, and given neighbours. Attention over these is scaled by their estimated mass. A
block that was dropped gives its estimated mass times its mean value, if pooling gains more than it errs (GAPR); if not,
its mass goes to the chosen ones. Text is seen by all and sees all. Source: Liu et al., 2025,
BienLuky/Rectified-SpaAttn. Where: every self-attention of a trained video or image diffusion transformer.

The text stands at the end, and counts as one entry in the choice: it can take one of the places. Gain and error are
those of the released code: products of means without scale or sign. Any batch; texts of different lengths by a mask,
and none at all; a last block that is short is pooled over what it has, and weighed by it. No gradient goes through the
choice. Left out: which steps and layers stay dense, and TeaCache beside it, both options of the released scripts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import BlockMask, CoarseKV, Dense, Executor, Pattern, attend
from vistok.core.attention.blocks import block_mean, block_sizes, random_blocks, similar_blocks
from vistok.core.attention.curves import hilbert_order
from vistok.core.flow import FLEXTOK
from vistok.core.tensors import ranking, upcast
from vistok.parts.mixed_attention import Mix, digit_pictures, learn_digits, velocity_error

CARD = Card(
    title="Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
    kind="training-free",
    site="self-attention of a trained video or image diffusion transformer",
    paper="Liu et al., 2025",
    repository="BienLuky/Rectified-SpaAttn",
    mechanism=("similarity", "attention"),
    modality="video",
    score="softmax of the products of block means, text keys one by one",
    allocate="blocks until a share of the mass, at least a share of the blocks",
    select="the best blocks of each block, their neighbours, all text",
    merge="dropped blocks by their mean value, where that gains more than it errs",
    claim="Rectified, sparse attention errs less than plain top-k at equal density.",
    departures=("no text at all is right", "a short last block is pooled over what it has", "any batch"),
)


@dataclass(frozen=True, eq=False)
class Stats:
    """What a call did, for each picture, head and block of queries."""

    mask: Tensor
    """(B, H, b, b) bool: the blocks that were computed."""
    kept: Tensor
    """(B, H, b): R, the estimated mass that is given to them and the text."""
    pooled: Tensor
    """(B, H, b, b): the estimated mass of each block that was put back by its mean, 0 elsewhere."""

    @property
    def density(self) -> float:
        """Share of the blocks that were computed, in [0, 1]."""
        return self.mask.float().mean().item()


def implicit_attention(q: Tensor, k: Tensor, text: Tensor, block: int, text_mask: Tensor | None = None) -> Tensor:
    """(B, H, b, b + 1), rows summing to 1: the estimated mass of each block of keys, and last of the text.

    ``q``, ``k`` (B, H, N, d) in blocks of ``block``; ``text`` keys (B, H, T, d), of which ``text_mask`` (B, T) bool
    says which there are.
    """
    pooled = upcast(block_mean(q, block)), upcast(block_mean(k, block))
    logits = torch.cat([pooled[0] @ keys.transpose(2, 3) for keys in (pooled[1], upcast(text))], 3) * q.shape[3] ** -0.5
    # A block counts as often as it has tokens; in logits that is exact, and nothing can overflow.
    blocks = pooled[1].shape[2]
    logits = logits + pad(block_sizes(k.shape[2], block, q.device).float().log(), (0, text.shape[2]))
    if text_mask is not None:
        logits = logits.masked_fill(pad(~text_mask, (blocks, 0))[:, None, None], -torch.inf)
    mass = logits.softmax(3)
    return torch.cat([mass[..., :blocks], mass[..., blocks:].sum(3, keepdim=True)], 3)


def choose_blocks(mass: Tensor, top_k: int, p_min: float) -> Tensor:
    """(B, H, b, b) bool: for each row of ``mass`` (B, H, b, b + 1) the entries that reach ``p_min`` of it, at least
    ``top_k``; the text's place is counted and not given. Ties to the lower block."""
    order = ranking(mass.detach().flatten(0, 2))
    ranked = mass.detach().flatten(0, 2).gather(1, order)
    count = ((ranked.cumsum(1) <= p_min).sum(1, keepdim=True) + 1).clamp_min(top_k)
    first = torch.arange(order.shape[1], device=order.device) < count
    return torch.zeros_like(first).scatter(1, order, first).view(mass.shape)[..., :-1]


def pooling_gains(q: Tensor, k: Tensor, block: int) -> Tensor:
    """(B, H, b, b) bool: whether a pair of blocks is told better by its means than not at all.

    The product of the means against what tokens differ from them, by channel (mean absolute deviations).
    """
    means = [block_mean(upcast(x), block) for x in (q, k)]
    spread = [
        block_mean((upcast(x) - m.repeat_interleave(block, 2)[:, :, : x.shape[2]]).abs(), block)
        for x, m in zip((q, k), means, strict=True)
    ]
    (mq, mk), (sq, sk) = means, spread
    return (mq @ mk.transpose(2, 3)).abs() > (sq @ mk.transpose(2, 3)).abs() + (mq @ sk.transpose(2, 3)).abs()


def rectified_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_len: int = 0,
    block: int = 128,
    drop: float = 0.8,
    p_min: float = 0.3,
    neighbors: Tensor | None = None,
    text_mask: Tensor | None = None,
    rectify: bool = True,
    executor: Executor = "auto",
) -> tuple[Tensor, Stats]:
    """(B, H, N, dv), and what was done, of ``q``, ``k`` (B, H, N, d), ``v`` (B, H, N, dv), all heads with keys of
    their own: visual tokens along a curve, then ``text_len`` of text.

    ``neighbors`` (b, b) bool: blocks that are always seen (``neighbor_blocks``). ``text_mask`` (B, text_len) bool: text
    that there is; rows of other text are of no use. ``rectify=False``: plain attention over the same blocks.
    """
    n = q.shape[2] - text_len
    if q.dim() != 4 or q.shape != k.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q, k, v: got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, must be (B, H, N, d) each"
        )
    if not 0 <= text_len < q.shape[2]:
        raise ValueError(f"text_len: got {text_len}, must be 0 or more, less than the {q.shape[2]} tokens")
    if text_mask is not None and text_mask.shape != (len(q), text_len):
        raise ValueError(f"text_mask: got {tuple(text_mask.shape)}, must be ({len(q)}, {text_len})")
    blocks = math.ceil(n / block)
    mass = implicit_attention(q[:, :, :n], k[:, :, :n], k[:, :, n:], block, text_mask)
    mask = choose_blocks(mass, max(1, int((1 - drop) * blocks)), p_min)
    if neighbors is not None:
        if neighbors.shape != (blocks, blocks):
            raise ValueError(f"neighbors: got {tuple(neighbors.shape)}, must be ({blocks}, {blocks})")
        mask = mask | neighbors.to(mask.device)
    pattern: Pattern = BlockMask(mask, n, n, (block, block))
    pattern = CoarseKV((pattern, Dense(n, text_len)), (0.0, 0.0)) if text_len else pattern
    bias = None
    if text_mask is not None:
        hidden = torch.zeros(len(q), 1, 1, n + text_len, dtype=q.dtype, device=q.device)
        bias = hidden.masked_fill(pad(~text_mask, (n, 0))[:, None, None], -torch.inf)
    out = attend(q[:, :, :n], k, v, pattern, bias, executor=executor)
    pooled = mass[..., :-1] * (pooling_gains(q[:, :, :n], k[:, :, :n], block) & ~mask)
    kept = 1 - pooled.sum(3)
    if rectify:
        means = pooled @ upcast(block_mean(v[:, :, :n], block))
        rows = [x.repeat_interleave(block, 2)[:, :, :n] for x in (kept[..., None], means)]
        out = (upcast(out) * rows[0] + rows[1]).to(v.dtype)
    if text_len:
        out = torch.cat([out, attend(q[:, :, n:], k, v, Dense(text_len, n + text_len), bias, executor=executor)], 2)
    return out, Stats(mask, kept, pooled)


def neighbor_blocks(shape: Sequence[int], order: Tensor, block: int, first_frame: bool = False) -> Tensor:
    """(b, b) bool: blocks with tokens next to one another on a grid of ``shape``, laid out by ``order`` (N,) int64.

    ``first_frame``: all see the blocks with tokens of the first frame, too, as for Wan.
    """
    blocks = torch.empty_like(order)
    blocks[order] = torch.arange(len(order), device=order.device) // block
    grid = blocks.view(*shape)
    count = math.ceil(len(order) / block)
    near = torch.eye(count, dtype=torch.bool, device=order.device)
    for axis in range(grid.dim()):
        one, other = grid.narrow(axis, 0, grid.shape[axis] - 1), grid.narrow(axis, 1, grid.shape[axis] - 1)
        near[one, other] = True
        near[other, one] = True
    if first_frame:
        near[:, grid[0].unique()] = True  # type: ignore[no-untyped-call]
    return near


@dataclass(frozen=True)
class RectifiedSpaAttn:
    """The operator for visual tokens in raster order, with text behind them."""

    block: int = 128
    """Tokens of a block along the curve."""
    drop: float = 0.8
    """Share of the blocks that may be dropped (0.8 for HunyuanVideo, 0.75 for Wan, 0.9 for FLUX at 4096 pixels)."""
    p_min: float = 0.3
    """Estimated mass that the chosen blocks reach at least."""
    near: bool = True
    """Whether a block always sees those with tokens next to its own."""
    first_frame: bool = False
    """Whether all see the first frame (Wan)."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1 or not 0 <= self.p_min <= 1:
            raise ValueError(f"drop, p_min: got {self.drop}, {self.p_min}, must be in [0, 1], drop below 1")
        if self.block < 1:
            raise ValueError(f"block: got {self.block}, must be 1 or more")
        if self.first_frame and not self.near:
            raise ValueError("first_frame: got True, must be False where near is")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, shape: Sequence[int], text_mask: Tensor | None = None
    ) -> tuple[Tensor, Stats]:
        """As ``rectified_block_attention``, of a grid of ``shape`` in raster order; what comes behind it is text."""
        n = math.prod(shape)
        if n > q.shape[2]:
            raise ValueError(f"shape: got {tuple(shape)}, must have at most the {q.shape[2]} tokens of q")
        order = hilbert_order(tuple(shape))
        near = neighbor_blocks(shape, order.order, self.block, self.first_frame) if self.near else None
        q, k, v = (torch.cat([order.permute(x[:, :, :n]), x[:, :, n:]], 2) for x in (q, k, v))
        how = self.block, self.drop, self.p_min
        out, stats = rectified_block_attention(q, k, v, q.shape[2] - n, *how, near, text_mask)
        return torch.cat([order.unpermute(out[:, :, :n]), out[:, :, n:]], 2), stats


def claim(trial: AttendTrial, steps: int = 120, width: int = 32, side: int = 32) -> Outcome:
    """The abstract: sparse attention that is rectified keeps the quality of full attention.

    A small diffusion transformer learns digits of 32 x 32 tokens. The change of its velocities by blocks of 16, where a
    tenth, two or three tenths of the blocks and of the mass are kept at least, at two times: mean of the six. Plain
    top-k by block means along the same curve, and random blocks, have the same density, layer by layer.
    """
    net = learn_digits(trial, steps, side, width)
    rng = torch.Generator().manual_seed(trial.seed + 1)
    noisy = []
    for time in (0.75, 0.25):
        data, t = digit_pictures(trial, rng, 4, side), torch.full((4,), time)
        noisy.append((FLEXTOK.mix(data, torch.randn(data.shape, generator=rng), t), t))
    errors: dict[str, list[float]] = {}
    densities: list[float] = []
    for least in (0.1, 0.2, 0.3):
        system = RectifiedSpaAttn(block=16, drop=1 - least, p_min=least)
        for name in ("rectified", "the same blocks, not rectified", "plain top-k", "random"):
            mix: Mix = partial(_mix, system=system, name=name, densities=densities, rng=rng)
            each = [velocity_error(net, x, t, [mix, mix]) for x, t in noisy]
            errors.setdefault(name, []).append(sum(each) / len(each))
    mean = {name: sum(of) / len(of) for name, of in errors.items()}
    note = f"density {min(densities):.0%} to {max(densities):.0%}"
    note += "".join(f"; {name} {mean[name]:.4f}" for name in [*mean][1::2])
    note += f"; by density {', '.join(f'{x:.4f}' for x in errors['rectified'])} against "
    note += f"{', '.join(f'{x:.4f}' for x in errors['plain top-k'])}"
    before, after = mean["plain top-k"], mean["rectified"]
    return Outcome("relative error of the velocity, against plain top-k", before, after, after < before, note)


def _mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: tuple[int, int],
    system: RectifiedSpaAttn,
    name: str,
    densities: list[float],
    rng: torch.Generator,
) -> Tensor:
    """One of the ways that the claim compares, at the density that the system has here."""
    out, stats = system(q, k, v, size)
    if name == "rectified":
        densities.append(stats.density)
        return out
    order, n = hilbert_order(size), q.shape[2]
    q, k, v = (order.permute(x) for x in (q, k, v))
    keep = max(1, round(stats.density * stats.mask.shape[3]))
    mask = stats.mask
    if name != "the same blocks, not rectified":
        plain = name == "plain top-k"
        mask = similar_blocks(q, k, system.block, keep) if plain else random_blocks(q, k, system.block, keep, rng)
    return order.unpermute(attend(q, k, v, BlockMask(mask, n, n, (system.block, system.block))))

"""PAROAttention: each head gets the order of frames, rows and columns in which its attention map falls into blocks.

What: in a video's map, flattened frame by frame, a head that looks along time is a set of far diagonals. In one of the
six orders of the axes it is a few full blocks, good for skipping blocks and for quantising them. Once per model, on
samples: for each head the order whose map has the fewest blocks with weight, and the most even ones; then a mask of
blocks that stays as it is. At run time queries, keys and values are permuted after their rotary positions, blocks are
skipped, and the output is put back. Text tokens stay in place, see all and are seen by all. Source: Zhao et al., arXiv
2506.16054, jamescsq47/PAROAtten. Where: every self-attention of a trained video or image diffusion transformer.

The softmax is over the kept blocks, as in the released kernel; its reference script masks after the softmax. What
is not released is ours: the score of an order, its constants, the budget by head. A mask always keeps its diagonal.
``quant="int8"`` gives what the INT8 kernel does: queries by 32 rows, keys by 64, integer products without error, a
softmax in float32, its weights and the values in float16. It shows the error, not the speed, and holds the whole map.
Text and image are cut into blocks each for itself. Left out: 4 bits, and heads that are marked empty; neither has code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import BlockMask, CoarseKV, Dense, Executor, Pattern, attend, attention_rows
from vistok.core.flow import FLEXTOK
from vistok.core.tensors import ranking, upcast
from vistok.parts.diffusion_transformer import DiffusionTransformer
from vistok.parts.mixed_attention import MixedAttention, projections, velocity_error, velocity_loss

CARD = Card(
    title="PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation",
    kind="calibrated",
    site="self-attention of a trained video or image diffusion transformer, head by head",
    paper="Zhao et al., 2025, arXiv 2506.16054",
    repository="jamescsq47/PAROAtten",
    needs=("queries and keys of a few samples, to calibrate on",),
    mechanism=("attention", "transformation"),
    modality="video",
    score="weight of a block in the maps of the samples, in the head's order of axes",
    select="the heaviest blocks of each head, fixed",
    claim="At equal density a sparse video model errs less where heads choose the order of axes.",
    departures=("any grid, text length and side of the text",),
)
Grid = tuple[int, int, int]
Sample = Tensor | tuple[Tensor, Tensor]
"""A map (B, H, N, N) after its softmax, or the queries and keys (B, H, N, d) that it comes from; text included."""
ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
"""Axes of an order, the slowest first; a plan holds their numbers."""


def axis_order(grid: Grid, order: int) -> Tensor:
    """(F * H * W,) int64: the token, in the order FHW, that stands at each place in the order ``ORDERS[order]``."""
    if not 0 <= order < len(ORDERS):
        raise ValueError(f"order: got {order}, must be 0 to {len(ORDERS) - 1}")
    return torch.arange(math.prod(grid)).view(grid).permute(["FHW".index(axis) for axis in ORDERS[order]]).flatten()


@dataclass(frozen=True, eq=False)
class Plan:
    """What calibration found for a layer: an order and masks for each head, of one grid only."""

    grid: Grid
    """Frames, rows and columns of tokens."""
    order: Tensor
    """(H,) int64 into ORDERS."""
    mask: Tensor
    """(T, H, b, b) bool: the blocks that each block sees, in the head's order; T groups of steps."""
    block: int = 64
    text: int = 0
    """Text tokens."""
    text_first: bool = True
    """Whether these stand in front of the image, or behind."""

    def __post_init__(self) -> None:
        blocks = -(-math.prod(self.grid) // self.block)
        if self.mask.dim() != 4 or self.mask.shape[1:] != (len(self.order), blocks, blocks):
            got, wanted = tuple(self.mask.shape), f"(T, {len(self.order)}, {blocks}, {blocks})"
            raise ValueError(f"mask: got {got}, must be {wanted} for {self.grid} in blocks of {self.block}")

    @property
    def density(self) -> float:
        """Kept blocks over all blocks of the image, in [0, 1]."""
        return self.mask.float().mean().item()

    @property
    def image(self) -> slice:
        """Where the image stands in the sequence."""
        start = self.text if self.text_first else 0
        return slice(start, start + math.prod(self.grid))

    @property
    def written(self) -> slice:
        """Where the text stands."""
        return slice(0, self.text) if self.text_first else slice(self.image.stop, self.image.stop + self.text)

    @cached_property
    def index(self) -> Tensor:
        """(H, N) int64: the token at each place, for each head; text where it was."""
        found = torch.arange(math.prod(self.grid) + self.text).repeat(len(self.order), 1)
        orders = torch.stack([axis_order(self.grid, order) for order in self.order.tolist()])
        found[:, self.image] = orders + self.image.start
        return found

    def permute(self, x: Tensor) -> Tensor:
        """``x`` (B, H, N, d) in the order of each head. Raises ValueError for another length or number of heads."""
        if x.dim() != 4 or x.shape[1:3] != self.index.shape:
            heads, tokens = self.index.shape
            raise ValueError(f"x: got {tuple(x.shape)}, must be (B, {heads}, {tokens}, d) as in calibration")
        return self._rows(x, self.index)

    def unpermute(self, x: Tensor) -> Tensor:
        """The inverse."""
        return self._rows(x, self.index.argsort(1))

    def _rows(self, x: Tensor, index: Tensor) -> Tensor:
        return x[:, torch.arange(x.shape[1], device=x.device)[:, None], index.to(x.device)]


def paro_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    group: int = 0,
    quant: Literal["none", "int8"] = "none",
    executor: Executor = "auto",
) -> Tensor:
    """(B, H, N, dv): attention of ``q``, ``k`` (B, H, N, d), ``v`` (B, H, N, dv), text included, by ``plan``.

    ``group``: of steps, from 0; those beyond the plan's share its last. Raises ValueError for shapes that the plan is
    not for.
    """
    if quant not in ("none", "int8"):
        raise ValueError(f"quant: got {quant!r}, must be 'none' or 'int8'")
    if group < 0:
        raise ValueError(f"group: got {group}, must be 0 or more")
    q, k, v = (plan.permute(x) for x in (q, k, v))
    n = math.prod(plan.grid)
    mask = plan.mask[min(group, len(plan.mask) - 1)][None].to(q.device)
    pattern: Pattern = BlockMask(mask, n, n, (plan.block, plan.block))
    if plan.text:
        pattern = CoarseKV((pattern, Dense(n, plan.text)), (0.0, 0.0))
    # Keys of the image first, wherever the text stands: a CoarseKV holds one set after the other.
    keys, values = ([x[:, :, part] for part in (plan.image, plan.written)] for x in (k, v))
    out = torch.empty_like(v)
    for part, seen in ((plan.image, pattern), (plan.written, Dense(plan.text, plan.text + n))):
        if part.stop == part.start:
            continue
        if quant == "int8":
            out[:, :, part] = int8_attention(q[:, :, part], keys, values, seen, plan.block)
        else:
            out[:, :, part] = attend(q[:, :, part], torch.cat(keys, 2), torch.cat(values, 2), seen, executor=executor)
    return plan.unpermute(out)


def quantize_rows(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(..., N, d) int8 of ``x``, and the step (..., N, 1) of each row: a 127th of the largest of its ``rows`` rows."""
    short = -x.shape[-2] % rows
    most = pad(upcast(x).abs().amax(-1), (0, short)).unflatten(-1, (-1, rows)).amax(-1)
    steps = (most / 127).repeat_interleave(rows, -1)[..., : x.shape[-2], None]
    codes = (upcast(x) / steps.clamp_min(torch.finfo(steps.dtype).tiny)).round()
    return codes.to(torch.int8), steps


def int8_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], seen: Pattern, block: int) -> Tensor:
    """(B, H, Nq, dv): what an INT8 kernel gives for ``q`` (B, H, Nq, d) over all of ``keys`` and ``values``, which are
    quantised set by set. Integer products are made in float64, which holds them without error; no gradient."""
    codes, steps = quantize_rows(q, max(1, block // 2))
    key_codes, key_steps = (torch.cat(x, 2) for x in zip(*(quantize_rows(k, block) for k in keys), strict=True))
    products = (codes.double() @ key_codes.double().transpose(2, 3)).float()
    logits = (products * steps * key_steps.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(
        ~seen.to_dense(q.device), -torch.inf
    )
    weights = (logits - logits.amax(3, keepdim=True).nan_to_num(neginf=0)).exp()
    mixed = weights.half().float() @ torch.cat(list(values), 2).half().float()
    return (mixed / weights.sum(3, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).to(q.dtype)


def choose_order(mass: Tensor, incoherence: Tensor, alpha: float = 0.5, light: float = 0.1) -> Tensor:
    """(H,) int64: for each head the order with the fewest heavy blocks, weighed ``alpha``, and the most even ones.

    ``mass`` (orders, H, b, b): weight in each block. ``incoherence`` (orders, H): largest over mean entry of a block.
    A block is heavy with ``light`` or more of the mean block's weight. Both terms count over their mean of the orders.
    """
    heavy = (mass >= light * mass.mean((2, 3), keepdim=True)).float().mean((2, 3))
    terms = (alpha, heavy), (1 - alpha, incoherence)
    cost = torch.stack([weight * (term / term.mean(0)) for weight, term in terms]).sum(0)
    return ranking(-cost.T)[:, 0]


def block_statistics(
    rows: Callable[[Tensor], Tensor], grid: Grid, block: int, orders: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """``mass`` and ``incoherence`` for ``choose_order``, mean over the batch.

    ``rows``: positions (r,) int64 of the image to their rows (B, H, r, F * H * W) of the map, a block at a time.
    """
    found = []
    for order in orders:
        index = axis_order(grid, order)
        short = -len(index) % block
        width = pad(torch.ones(len(index)), (0, short)).view(-1, block).sum(1)
        mass, uneven = [], []
        for own in index.split(block):
            part = pad(rows(own)[..., index], (0, short)).unflatten(-1, (-1, block))
            total = part.sum((2, 4))
            mean = total / (len(own) * width.to(part.device))
            mass.append(total.mean(0))
            uneven.append((part.amax((2, 4)) / mean.clamp_min(torch.finfo(mean.dtype).tiny)).mean((0, 2)))
        found.append((torch.stack(mass, 1), torch.stack(uneven).mean(0)))
    return torch.stack([m for m, _ in found]), torch.stack([u for _, u in found])


@dataclass(frozen=True)
class PAROAttention:
    """The calibration, and attention by its plans."""

    density: float = 0.25
    """Share of the blocks of the image that each head keeps (paper: 0.2 to 0.3)."""
    block: int = 64
    """Tokens of a block of queries, and of keys."""
    alpha: float = 0.5
    """Weight of sparsity in the choice of an order; the rest is that of evenness."""
    light: float = 0.1
    """Share of the mean block's weight below which a block counts as empty, in that choice."""
    orders: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Orders to choose from; (0,): as the tokens are."""
    quant: Literal["none", "int8"] = "none"
    """"int8": what the INT8 kernel gives, simulated."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density: got {self.density}, must be above 0, 1 at most")
        if self.block < 2 or self.block % 2:
            raise ValueError(f"block: got {self.block}, must be even, 2 or more")

    def calibrate(
        self, samples: Sequence[Sequence[Sample]], grid: Grid, text: int = 0, text_first: bool = True
    ) -> Plan:
        """The plan of a layer. ``samples``: for each group of steps, in order, those of some prompts.

        Each head keeps the heaviest blocks of a group and its diagonal, ties to the lower block.
        """
        if not samples or not all(samples):
            raise ValueError("samples: got a group of steps without any, must be one at least in each")
        start = text if text_first else 0
        groups = []
        for group in samples:
            rows = [_rows_of(sample, start, math.prod(grid), text) for sample in group]
            each = [block_statistics(of, grid, self.block, self.orders) for of in rows]
            groups.append([torch.stack(x).mean(0) for x in zip(*each, strict=True)])
        mass, uneven = (torch.stack(x) for x in zip(*groups, strict=True))
        chosen = choose_order(mass.mean(0), uneven.mean(0), self.alpha, self.light)
        heads = torch.arange(len(chosen), device=chosen.device)
        best = mass[:, chosen, heads]
        blocks = best.shape[3]
        best.diagonal(dim1=2, dim2=3).fill_(torch.inf)
        keep = max(blocks, round(self.density * blocks * blocks))
        kept = ranking(best.flatten(2).flatten(0, 1))[:, :keep]
        mask = torch.zeros(len(kept), blocks * blocks, dtype=torch.bool, device=kept.device).scatter(1, kept, True)
        order = torch.tensor(self.orders)[chosen.cpu()]
        return Plan(grid, order, mask.view(best.shape), self.block, text, text_first)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, group: int = 0) -> Tensor:
        """See ``paro_attention``."""
        return paro_attention(q, k, v, plan, group, self.quant)


def _rows_of(sample: Sample, start: int, n: int, text: int) -> Callable[[Tensor], Tensor]:
    """Rows of a sample's map at positions of the image, which has ``n`` tokens from ``start``, over the image."""
    given = sample if isinstance(sample, Tensor) else sample[0]
    if given.dim() != 4 or given.shape[2] != n + text:
        raise ValueError(f"samples: got {tuple(given.shape)}, must be of {n + text} tokens, {text} of them text")
    if isinstance(sample, Tensor):
        return lambda own: upcast(sample[:, :, own + start, start : start + n])
    q, k = sample
    return lambda own: attention_rows(q[:, :, own + start], k)[..., start : start + n]


def videos(trial: AttendTrial, rng: torch.Generator, count: int, frames: int = 8) -> Tensor:
    """(count, 1, frames * 8, 8): digits that move by up to a pixel a frame along each axis, round the border.

    Frames stand one below another, so that tokens of a pixel each are in the order FHW.
    """
    pictures, _ = trial.draw(rng, count)
    pace = torch.randint(-1, 2, (count, 2), generator=rng).tolist()
    clips = zip(pictures, pace, strict=True)
    return torch.stack([torch.cat([p.roll((f * y, f * x), (1, 2)) for f in range(frames)], 1) for p, (y, x) in clips])


def claim(trial: AttendTrial, steps: int = 200, width: int = 48, clips: int = 16) -> Outcome:
    """The abstract: near full precision at a density of 20 to 30%, by reordering.

    A small diffusion transformer learns videos of 8 x 8 x 8 tokens. Its velocities of other clips, at two times, with a
    quarter of the blocks of 16, against its own dense ones: heads in the order they choose, or all in FHW. Both
    plans are calibrated on the same clips.
    """
    torch.manual_seed(trial.seed)
    net = DiffusionTransformer(1, 1, width, 3, 4, MixedAttention)
    trial.fit(net, steps, loss=lambda of, rng: velocity_loss(of, videos(trial, rng, 8), rng))
    rng = torch.Generator().manual_seed(trial.seed + 1)
    noisy = [_noisy(trial, rng, time, clips) for time in (0.75, 0.25) for _ in range(2)]
    watched = [projections(net, *sample) for sample in noisy[::2]]

    def plans(system: PAROAttention) -> list[Plan]:
        return [system.calibrate([[seen[layer][:2]] for seen in watched], (8, 8, 8)) for layer in range(3)]

    def error(found: list[Plan], quant: Literal["none", "int8"] = "none") -> float:
        each = []
        for group, sample in enumerate(noisy[1::2]):
            mixes = [partial(_mix, plan=plan, group=group, quant=quant) for plan in found]
            each.append(velocity_error(net, *sample, mixes))
        return sum(each) / len(each)

    raster, ours = plans(PAROAttention(block=16, orders=(0,))), plans(PAROAttention(block=16))
    orders = torch.cat([plan.order for plan in ours])
    before, after, int8 = error(raster), error(ours), error(ours, "int8")
    note = f"density {ours[0].density:.0%} both; {int8:.4f} in INT8; {int((orders > 0).sum())} of {len(orders)} heads"
    note += f" reordered; {steps} steps, one seed"
    return Outcome("relative error of the velocity", before, after, after < before, note)


def _mix(q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int], **how: Any) -> Tensor:
    return paro_attention(q, k, v, **how)


def _noisy(trial: AttendTrial, rng: torch.Generator, time: float, count: int) -> tuple[Tensor, Tensor]:
    """``count`` clips at ``time``, and it."""
    clips, t = videos(trial, rng, count), torch.full((count,), time)
    return FLEXTOK.mix(clips, torch.randn(clips.shape, generator=rng), t), t

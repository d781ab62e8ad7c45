"""Codes of the same vectors at several resolutions, coarse to fine, each of what the coarser ones left over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vistok.core.codes import CodeFormat
from vistok.core.quantize import pass_through
from vistok.parts.quantize.base import Bottleneck, mean_square
from vistok.parts.quantize.stacks import mean_terms
from vistok.parts.quantize.vector import TableQuantizer


class MultiScale(Bottleneck):
    """Multi-scale residual codes of a square map (VAR, arXiv 2404.02905) or of a sequence (VAT), with one codebook.

    ``scales``: sides of the square maps, or with ``ndim`` 1 lengths, coarse to fine; the last is the resolution of the
    vectors themselves. What is left is averaged down to a scale ("area"), its codes are interpolated back up (bicubic,
    of a sequence linear) and added. ids (B, sum of the scales' tokens), row after row, scale after scale.

    ``gradient`` "whole" (VAR): passed straight through the whole sum, losses on the running sum; "each" (TokenFlow):
    every scale passes its own by the rule of ``inner``, only what is subtracted is held fixed, losses are those of
    ``inner``; means over scales both. ``mixers`` convolutions (VAR: 4) smooth what is added, (1 - ``mix``) h + ``mix``
    conv(h), each used by the scales nearest to it. ``drop``: the probability that a training forward leaves out a scale
    other than the first; its ids are then -1.
    """

    def __init__(
        self,
        inner: TableQuantizer,
        scales: Sequence[int],
        *,
        ndim: Literal[1, 2] = 2,
        gradient: Literal["whole", "each"] = "whole",
        mixers: int = 0,
        mix: float = 0.5,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if not scales or min(scales) < 1 or list(scales) != sorted(set(scales)):
            raise ValueError(f"scales: got {tuple(scales)}, must rise from 1 or more")
        if ndim not in (1, 2):
            raise ValueError(f"ndim: got {ndim}, must be 1 (a sequence) or 2 (a map)")
        if gradient not in ("whole", "each"):
            raise ValueError(f"gradient: got {gradient!r}, must be 'whole' or 'each'")
        if not 0 <= drop <= 1 or (drop and len(scales) < 2):
            raise ValueError(f"drop: got {drop}, must be a probability, and 0 with one scale")
        self.inner, self.scales, self.ndim = inner, tuple(scales), ndim
        self.dim, self.sizes = inner.dim, inner.sizes
        self.gradient, self.mix, self.drop = gradient, mix, drop
        conv = nn.Conv2d if ndim == 2 else nn.Conv1d
        self.mixers = nn.ModuleList(conv(self.dim, self.dim, 3, padding=1) for _ in range(mixers))
        self.lengths = tuple(side**ndim for side in self.scales)

    def format(self, grid: tuple[int, int] | None = None) -> CodeFormat:
        return dataclasses.replace(super().format(grid), scales=self.lengths)

    def renew(self, z: Tensor, mask: Tensor | None) -> None:
        self.inner.renew(z, mask)

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self._check(z.shape[1], grid)
        if mask is not None:
            raise ValueError("mask: got one, must be None: tokens of several scales are of the whole picture")
        each = self.gradient == "each"
        rest = z.detach() if not each else z
        total, ids, losses = torch.zeros_like(self._map(z)), [], []
        whole = self._map(rest)
        kept = self._kept(z.device)
        for s in range(len(self.scales)):
            out, found, terms = self.inner.quantize(self._tokens(self._down(whole, s)), None, None)
            if not each:
                out = self.inner.lookup(found, None)  # the table's own gradient, by the running sum
            added = self._added(out, s)
            if kept is not None:
                added, found = added * kept[s], torch.where(kept[s] > 0, found, -1)
                terms = {name: term * kept[s] for name, term in terms.items()}
            total, whole = total + added, whole - added.detach()
            ids.append(found)
            losses.append(terms if each else self._running(z, self._tokens(total)))
        out = self._tokens(total)
        return out if each else pass_through(z, out), torch.cat(ids, 1), mean_terms(losses)

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        return self._tokens(self._sums(ids)[-1])

    def next_inputs(self, ids: Tensor) -> Tensor:
        """(B, n_2 + ... + n_S, D): what a next-scale model reads for each scale after the first, teacher-forced.

        The running sum up to the scale before, averaged down to the scale.
        """
        sums = self._sums(ids)
        return torch.cat([self._tokens(self._down(t, s + 1)) for s, t in enumerate(sums[: len(self.scales) - 1])], 1)

    def _sums(self, ids: Tensor) -> list[Tensor]:
        """The map after each scale of which ``ids`` has tokens."""
        ids = ids if ids.dim() == 2 else ids[..., 0]
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        if ids.shape[1] not in ends:
            raise ValueError(f"ids: got {ids.shape[1]} tokens, must end on a scale: {', '.join(map(str, ends))}")
        found: list[Tensor] = []
        for s, (start, end) in enumerate(pairwise([0, *ends[: ends.index(ids.shape[1]) + 1]])):
            part = ids[:, start:end]
            added = self._added(self.inner.lookup(part, None), s) * (part[:, :1, None] >= 0).transpose(1, 2).view(
                -1, 1, *(1,) * self.ndim
            )
            found.append((found[-1] if found else torch.zeros_like(added)) + added)
        return found

    def _added(self, codes: Tensor, s: int) -> Tensor:
        """What the codes (B, n_s, D) of scale ``s`` add to the map."""
        fine = self.scales[-1]
        small = codes.transpose(1, 2).unflatten(2, (self.scales[s],) * self.ndim)
        if self.scales[s] != fine:
            mode = "bicubic" if self.ndim == 2 else "linear"
            small = interpolate(small, (fine,) * self.ndim, mode=mode, align_corners=False)
        if not len(self.mixers):
            return small.contiguous()
        mixed: Tensor = self.mixers[self._mixer(s)](small)
        return (1 - self.mix) * small + self.mix * mixed

    def _mixer(self, s: int) -> int:
        """The convolution of scale ``s``: the one whose place in the middle of its share is nearest."""
        k, last = len(self.mixers), len(self.scales) - 1
        first = 1 / 3 / k if k == 4 else 1 / 2 / k
        step = ((1 - first) - first) / max(k - 1, 1)  # in this order, as a tie of VAR's schedule is decided by rounding
        places = [first + i * step for i in range(k)]
        at = s / last if last else 0.0
        return min(range(k), key=lambda i: abs(places[i] - at))

    def _down(self, x: Tensor, s: int) -> Tensor:
        if self.scales[s] == self.scales[-1]:
            return x
        return interpolate(x, (self.scales[s],) * self.ndim, mode="area")

    def _running(self, z: Tensor, total: Tensor) -> dict[str, Tensor]:
        return {
            "codebook": self.inner.codebook_weight * mean_square(total, z.detach(), None),
            "commitment": self.inner.commitment * mean_square(z, total.detach(), None),
        }

    def _kept(self, device: torch.device) -> list[Tensor] | None:
        """1 or 0 for each scale, in training; None where all are kept."""
        if not self.training or not self.drop:
            return None
        left_out = torch.randint(1, len(self.scales), (), device=device)
        some = torch.rand((), device=device) < self.drop
        return [(~(some & (left_out == s))).float() for s in range(len(self.scales))]

    def _map(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (self.scales[-1],) * self.ndim)

    def _tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def _check(self, n: int, grid: tuple[int, int] | None) -> None:
        if n != self.lengths[-1] or (grid is not None and (self.ndim == 1 or grid[0] != grid[1])):
            shape = f"{self.scales[-1]} x {self.scales[-1]}" if self.ndim == 2 else f"a sequence of {self.scales[-1]}"
            raise ValueError(f"z: got {n} tokens and grid {grid}, must be {shape}, the last of scales")

"""Bottlenecks made of others: each on what the last left (residual), side by side (product), or by stretches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pad

from vistok.core.quantize import pass_through
from vistok.parts.quantize.base import Bottleneck


class Residual(Bottleneck):
    """Codes of what the codes before left over (Lee et al., arXiv 2203.01941); a token has ``depth`` ids.

    ``stages``: a bottleneck for each depth, or one that all share, of one id each. Losses are means over depths; the
    gradient is passed straight through the whole sum.
    """

    def __init__(self, stages: Sequence[Bottleneck], depth: int | None = None) -> None:
        super().__init__()
        depth = len(stages) if depth is None else depth
        if len(stages) not in (1, depth) or depth < 1:
            raise ValueError(f"stages: got {len(stages)}, must be 1 or as many as depth, {depth}")
        if any(len(stage.sizes) != 1 or stage.dim != stages[0].dim for stage in stages):
            raise ValueError("stages: must each give one id, and have the same channels")
        self.stages, self.depth = nn.ModuleList(stages), depth
        self.dim = stages[0].dim
        self.sizes = tuple(self.stage(d).sizes[0] for d in range(depth))
        self.bit_order = stages[0].bit_order

    def stage(self, depth: int) -> Bottleneck:
        """The bottleneck of depth 0, 1, ..."""
        found: Bottleneck = self.stages[depth % len(self.stages)]  # type: ignore[assignment]
        return found

    def renew(self, z: Tensor, mask: Tensor | None) -> None:
        self.stage(0).renew(z, mask)

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = torch.zeros_like(z)
        ids, losses = [], []
        for d in range(self.depth):
            rest = z - total.detach()
            if self.training and 0 < d < len(self.stages):
                # Its dead codes become what is left over at its depth, but not where a fresh code left nothing.
                some = rest.detach().norm(dim=-1) > 1e-3 * z.detach().norm(dim=-1)
                self.stage(d).renew(rest.detach(), some if mask is None else some & mask)
            out, column, terms = self.stage(d).quantize(rest, mask, grid)
            assert column is not None
            total = total + out.detach()
            ids.append(column)
            losses.append(terms)
        return pass_through(z, total), torch.stack(ids, -1), mean_terms(losses)

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        return self.partial_sums(ids, grid)[-1]

    def partial_sums(self, ids: Tensor, grid: tuple[int, int] | None = None) -> list[Tensor]:
        """(B, N, D) for each of the depths of ``ids`` (B, N, C): the sum of the codes up to it."""
        columns = (ids if ids.dim() == 3 else ids[..., None]).unbind(-1)
        found = [torch.zeros(())]
        for d, column in enumerate(columns):
            code = self.stage(d).lookup(column, grid)
            found.append((torch.zeros_like(code) if d == 0 else found[-1]) + code)
        return found[1:]


class Product(Bottleneck):
    """Bottlenecks side by side, each on its own channels; their ids follow one another in a token.

    Two ``Residual`` are DualToken's stacks, several tables FQGAN's and MedITok's factors. ``reduce``: losses are summed
    (FQGAN) or averaged (MedITok) over books. ``disentangle`` times the mean squared cosine of each pair of results
    (FQGAN; books of one width): its gradient reaches the vectors, never the tables.
    """

    def __init__(
        self, books: Sequence[Bottleneck], *, reduce: Literal["sum", "mean"] = "sum", disentangle: float = 0.0
    ) -> None:
        super().__init__()
        if len(books) < 1 or any(not book.sizes for book in books):
            raise ValueError("books: must be one or more bottlenecks with ids")
        if disentangle and len({book.dim for book in books}) > 1:
            raise ValueError("disentangle: needs books of the same number of channels")
        if reduce not in ("sum", "mean"):
            raise ValueError(f"reduce: got {reduce!r}, must be 'sum' or 'mean'")
        self.books: Sequence[Bottleneck] = nn.ModuleList(books)  # type: ignore[assignment]
        self.widths = [book.dim for book in books]
        self.columns = [len(book.sizes) for book in books]
        self.dim = sum(self.widths)
        self.sizes = tuple(size for book in books for size in book.sizes)
        orders = {book.bit_order for book in books}
        if len(orders) > 1:
            raise ValueError("books: must have one order of bits")
        self.bit_order = orders.pop()
        self.reduce, self.disentangle = reduce, disentangle

    def renew(self, z: Tensor, mask: Tensor | None) -> None:
        for book, part in zip(self.books, z.split(self.widths, -1), strict=True):
            book.renew(part, mask)

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        outs, ids, losses = [], [], []
        for book, part in zip(self.books, z.split(self.widths, -1), strict=True):
            out, columns, terms = book.quantize(part, mask, grid)
            assert columns is not None
            outs.append(out)
            ids.append(columns if columns.dim() == 3 else columns[..., None])
            losses.append(terms)
        found = mean_terms(losses)
        if self.reduce == "sum":
            found = {name: len(losses) * term for name, term in found.items()}
        if self.disentangle:
            weight = z.new_ones(z.shape[:2]) if mask is None else mask.to(z.dtype)
            pairs = [cosine_similarity(a, b, dim=-1).square() for a, b in combinations(outs, 2)]
            mean = sum(pairs, torch.zeros_like(weight)) / len(pairs)
            found["disentangle"] = self.disentangle * (mean * weight).sum() / weight.sum().clamp_min(1)
        return torch.cat(outs, -1), torch.cat(ids, -1), found

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        if ids.dim() != 3 or ids.shape[2] != len(self.sizes):
            raise ValueError(f"ids: got shape {tuple(ids.shape)}, must be (B, N, {len(self.sizes)})")
        parts = ids.split(self.columns, -1)
        return torch.cat([book.lookup(part, grid) for book, part in zip(self.books, parts, strict=True)], -1)


class Stretches(Bottleneck):
    """A bottleneck of one id for each stretch of a sequence, ``lengths`` tokens each, side by side in time.

    Narrower codes stand in the first channels of the widest, zeros behind. Losses are summed; bits are counted by the
    largest book.
    """

    def __init__(self, books: Sequence[Bottleneck], lengths: Sequence[int]) -> None:
        super().__init__()
        if len(books) != len(lengths) or any(len(book.sizes) != 1 for book in books):
            raise ValueError(f"books: got {len(books)} for {len(lengths)} stretches, must be one each, of one id")
        self.books: Sequence[Bottleneck] = nn.ModuleList(books)  # type: ignore[assignment]
        self.lengths = list(lengths)
        self.dim = max(book.dim for book in books)
        self.sizes = (max(book.sizes[0] for book in books),)

    def renew(self, z: Tensor, mask: Tensor | None) -> None:
        for book, part, seen in self._stretches(z, mask):
            book.renew(part, seen)

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        found = [book.quantize(part, seen, None) for book, part, seen in self._stretches(z, mask)]
        losses = {f"{name}_{i}": loss for i, (_, _, terms) in enumerate(found) for name, loss in terms.items()}
        ids = [column for _, column, _ in found if column is not None]
        return torch.cat([self._wide(out) for out, _, _ in found], 1), torch.cat(ids, 1), losses

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        ids = ids if ids.dim() == 2 else ids[..., 0]
        if ids.shape[1] != sum(self.lengths):
            raise ValueError(f"ids: got {ids.shape[1]} tokens, must be {sum(self.lengths)}")
        parts = zip(self.books, ids.split(self.lengths, 1), strict=True)
        return torch.cat([self._wide(book.ids_to_z(part)) for book, part in parts], 1)

    def _wide(self, x: Tensor) -> Tensor:
        return pad(x, (0, self.dim - x.shape[2]))

    def _stretches(self, z: Tensor, mask: Tensor | None) -> list[tuple[Bottleneck, Tensor, Tensor | None]]:
        masks = [None] * len(self.lengths) if mask is None else mask.split(self.lengths, 1)
        parts = [part[..., : book.dim] for book, part in zip(self.books, z.split(self.lengths, 1), strict=True)]
        return list(zip(self.books, parts, masks, strict=True))


def mean_terms(losses: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each named term over those in the list; terms that some lack count as 0 there."""
    names = dict.fromkeys(name for terms in losses for name in terms)
    zero = torch.zeros(())
    return {
        name: torch.stack(
            [terms.get(name, zero.to(next(iter(terms.values()), zero).device)) for terms in losses]
        ).mean()
        for name in names
    }

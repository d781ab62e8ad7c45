"""Vector quantisers: a table of codes, and the nearest of them. What moves the table differs between the members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vistok.core.quantize import (
    GradientRule,
    Metric,
    RuleName,
    count_ids,
    ema_update,
    entropies,
    nearest_code,
    replacements,
    rule_of,
    soft_lookup,
)
from vistok.parts.distributed import of_first, summed
from vistok.parts.quantize.base import Bottleneck, mean_square, rows_of, without

Norm: TypeAlias = Literal["none", "both", "input", "lookup"]


class TableQuantizer(Bottleneck):
    """The nearest of ``size`` codes in a table that ``rows`` gives.

    Losses: ``codebook`` times the mean square of (code - sg(vector)), ``commitment`` times that of (vector -
    sg(code)), ``entropy`` times the entropy regulariser at ``temperature`` (see ``vistok.core.quantize.entropies``).

    ``norm``: "both" scales vectors and codes to length 1, also in the losses and in the result, so that the gradient
    passes through the normalisation: none along the vector, the rest over its length. "input" scales the vectors only
    (LaViT), "lookup" only for the choice (VAR's znorm). ``parts``: widths of the groups of channels that are
    normalised each by itself, with ``weights`` of their distances: two parts are two codebooks that share their ids
    (TokenFlow). ``gradient``: a rule or its name. ``metric``: "dot" takes the largest product (IBQ).
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        norm: Norm = "none",
        parts: Sequence[int] = (),
        weights: Sequence[float] = (),
        metric: Metric = "euclidean",
        gradient: RuleName | GradientRule = "straight-through",
        codebook: float = 1.0,
        commitment: float = 0.25,
        entropy: float = 0.0,
        temperature: float = 0.01,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size: got {size}, must be 1 or more")
        if norm not in ("none", "both", "input", "lookup"):
            raise ValueError(f"norm: got {norm!r}, must be 'none', 'both', 'input' or 'lookup'")
        self.parts = tuple(parts) or (dim,)
        if sum(self.parts) != dim:
            raise ValueError(f"parts: got {self.parts}, must add up to the {dim} channels")
        if weights and (len(weights) != len(self.parts) or min(weights) < 0):
            raise ValueError(f"weights: got {tuple(weights)}, must be {len(self.parts)} numbers of 0 or more")
        self.dim, self.sizes = dim, (size,)
        self.norm, self.metric, self.weights = norm, metric, tuple(weights)
        self.gradient = rule_of(gradient)
        self.codebook_weight, self.commitment, self.entropy, self.temperature = (
            codebook,
            commitment,
            entropy,
            temperature,
        )
        self.count_up_to(size)

    def rows(self) -> Tensor:
        """(K, D): the table as it is held."""
        raise NotImplementedError

    def table(self) -> Tensor:
        """(K, D) float32: what each id stands for, with its gradient to ``rows``."""
        # Of a copy, so that renewing the rows later leaves what an earlier forward saved for its backward pass.
        return self.unit(self.rows().clone()) if self.norm == "both" else self.rows()

    def unit(self, x: Tensor) -> Tensor:
        """``x`` (..., D) with each part scaled to length 1."""
        if len(self.parts) == 1:
            return normalize(x, dim=-1)
        return torch.cat([normalize(part, dim=-1) for part in x.split(self.parts, -1)], -1)

    def nearest(self, z: Tensor, table: Tensor) -> Tensor:
        """(...) int64: the choice for ``z`` (..., D), which is normalised already if ``norm`` says so."""
        if self.norm == "lookup":
            z, table = self.unit(z), self.unit(table)
        if self.weights:
            scale = torch.cat([z.new_full((n,), w**0.5) for n, w in zip(self.parts, self.weights, strict=True)])
            z, table = z * scale, table * scale
        return nearest_code(z, table, self.metric)

    def soft(self, logits: Tensor, sharpness: float = 1.0) -> Tensor:
        """(..., D): the expected code under ``logits`` (..., K)."""
        return soft_lookup(logits, self.table(), sharpness)

    def quantize(
        self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x = self.unit(z) if self.norm in ("both", "input") else z
        table = self.table()
        chosen = self.nearest(x, table)
        out = self.gradient(x, table, chosen)
        ids = without(chosen, mask)
        if self.training:
            self.count(ids)
            self.learn_from(x.detach(), ids)
        return out, ids, self.losses_of(x, out, table, chosen, mask)

    def lookup(self, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        return rows_of(ids if ids.dim() == 2 else ids[..., 0], self.table())

    def losses_of(self, x: Tensor, out: Tensor, table: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Weighted losses; a term of weight 0 is not computed."""
        q = nn.functional.embedding(ids, table)
        losses = {}
        if self.codebook_weight:
            losses["codebook"] = self.codebook_weight * mean_square(q, x.detach(), mask)
        if self.commitment:
            losses["commitment"] = self.commitment * mean_square(x, q.detach(), mask)
        if self.entropy:
            sample, batch = entropies(x, table, self.temperature, self.metric, mask)
            losses["entropy"] = self.entropy * (sample - batch)
        return losses

    def learn_from(self, x: Tensor, ids: Tensor) -> None:
        """In training: vectors (B, N, D) and the ids they chose, -1 where masked."""


class RenewedQuantizer(TableQuantizer):
    """A table ``codebook`` (K, D) whose dead codes are put back into use.

    A code that no vector chose in ``restart_after`` training forwards (None: never restart) becomes a vector of the
    batch, drawn by ``seed`` without replacement. All begin dead, so the first batches fill the table.
    """

    codebook: Tensor
    age: Tensor
    step: Tensor

    def __init__(self, size: int, dim: int, *, restart_after: int | None = 100, seed: int = 0, **how: Any) -> None:
        super().__init__(size, dim, **how)
        if restart_after is not None and restart_after < 1:
            raise ValueError(f"restart_after: got {restart_after}, must be 1 or more, or None")
        self.restart_after, self.seed = restart_after, seed
        self.hold(torch.randn(size, dim) * dim**-0.5)
        self.register_buffer("age", torch.full((size,), restart_after or 0))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def hold(self, table: Tensor) -> None:
        """Make ``codebook`` of its first values."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        return self.codebook

    @torch.no_grad()
    def renew(self, z: Tensor, mask: Tensor | None) -> None:
        if self.restart_after is None:
            return
        rows = z.reshape(-1, self.dim)
        if self.norm in ("both", "input"):
            rows = self.unit(rows)
        new = replacements(
            self.age >= self.restart_after, rows, self.seed, self.step, None if mask is None else mask.reshape(-1)
        )
        fresh, rows = of_first(new) >= 0, of_first(rows[new.clamp_min(0)])
        self.put(fresh, rows)
        self.age.add_(1).masked_fill_(fresh, 0)
        self.step.add_(1)

    @torch.no_grad()
    def fill(self, table: Tensor) -> None:
        """Take a table (K, D) that was made elsewhere; all its codes count as alive."""
        self.put(torch.ones_like(self.age, dtype=torch.bool), table.to(self.codebook))
        self.age.zero_()

    def put(self, fresh: Tensor, rows: Tensor) -> None:
        """Codes where ``fresh`` (K,) become ``rows`` (K, D)."""
        self.codebook.copy_(torch.where(fresh[:, None], rows, self.codebook))

    def learn_from(self, x: Tensor, ids: Tensor) -> None:
        self.age.masked_fill_(summed(count_ids(ids, len(self.age))) > 0, 0)


class VectorQuantizer(RenewedQuantizer):
    """VQ (van den Oord et al., arXiv 1711.00937): the table learns by gradient."""

    def hold(self, table: Tensor) -> None:
        self.codebook = nn.Parameter(table)


class EMAQuantizer(RenewedQuantizer):
    """VQ whose codes are moving averages of the vectors that chose them; the table gets no gradient.

    What a forward saw moves the table at the beginning of the next training forward, or when ``update`` is called.
    ``decay``, ``eps``, ``write_back``: see ``vistok.core.quantize.ema_update``.
    """

    count_average: Tensor
    sum_average: Tensor
    hits: Tensor
    sums: Tensor

    def __init__(
        self, size: int, dim: int, *, decay: float = 0.99, eps: float = 1e-5, write_back: bool = False, **how: Any
    ) -> None:
        super().__init__(size, dim, **{"codebook": 0.0, **how})
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, must be at least 0 and below 1")
        self.decay, self.eps, self.write_back = decay, eps, write_back

    def hold(self, table: Tensor) -> None:
        self.register_buffer("codebook", table)
        # One hit each at the start: averages that begin at 0 throw the first used codes far away.
        self.register_buffer("count_average", torch.ones(len(table)))
        self.register_buffer("sum_average", table.clone())
        self.register_buffer("hits", torch.zeros(len(table)))
        self.register_buffer("sums", torch.zeros_like(table))

    @torch.no_grad()
    def update(self) -> None:
        """Move the table by what has been seen since the last update; nothing if nothing was."""
        some = self.hits.sum() > 0
        found = ema_update(
            self.count_average, self.sum_average, self.hits, self.sums, self.decay, self.eps, self.write_back
        )
        for held, new in zip((self.count_average, self.sum_average, self.codebook), found, strict=True):
            held.copy_(torch.where(some, new, held))
        self.hits.zero_()
        self.sums.zero_()

    def renew(self, z: Tensor, mask: Tensor | None) -> None:
        self.update()
        super().renew(z, mask)

    def put(self, fresh: Tensor, rows: Tensor) -> None:
        super().put(fresh, rows)
        self.count_average.masked_fill_(fresh, 1)
        self.sum_average.copy_(torch.where(fresh[:, None], rows, self.sum_average))

    def learn_from(self, x: Tensor, ids: Tensor) -> None:
        super().learn_from(x, ids)
        flat = ids.reshape(-1)
        seen = x.reshape(-1, self.dim) * (flat >= 0)[:, None]
        self.hits.add_(summed(count_ids(ids, len(self.hits)).to(self.hits.dtype)))
        self.sums.add_(summed(torch.zeros_like(self.sums).index_add_(0, flat.clamp_min(0), seen)))


class IBQuantizer(VectorQuantizer):
    """IBQ (Shi et al., arXiv 2412.02692): the largest product wins, and the gradient passes the softmax to all codes.

    Not the nearest code: long ones win. ``both`` times the mean square of (result - vector) is a third loss, to both.
    Of the other two the authors weight the codebook's down, not the commitment. No restart by default: a code put back
    at a vector of the batch loses to longer ones at once, and the gradient moves unused codes anyway.
    """

    def __init__(self, size: int, dim: int, *, both: float = 1.0, restart_after: int | None = None, **how: Any) -> None:
        told = {"metric": "dot", "gradient": "index", "codebook": 0.25, "commitment": 1.0, **how}
        super().__init__(size, dim, restart_after=restart_after, **told)
        self.both = both

    def losses_of(self, x: Tensor, out: Tensor, table: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        losses = super().losses_of(x, out, table, ids, mask)
        return losses | {"both": self.both * mean_square(out, x, mask)} if self.both else losses


class SimVQuantizer(TableQuantizer):
    """SimVQ (Zhu et al., arXiv 2411.02038): a frozen Gaussian table times a linear map that learns.

    Every code moves when any is used, so none dies and none is restarted.
    """

    frozen: Tensor

    def __init__(self, size: int, dim: int, **how: Any) -> None:
        super().__init__(size, dim, **how)
        self.register_buffer("frozen", torch.randn(size, dim) * dim**-0.5)
        self.transform = nn.Linear(dim, dim, bias=False)

    def rows(self) -> Tensor:
        made: Tensor = self.transform(self.frozen)
        return made

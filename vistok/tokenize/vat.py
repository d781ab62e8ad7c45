"""VAT: a solid as few ordered tokens, coarse to fine, of Gaussian latents.

What: points of a surface become an unordered set of features (queries that read them by attention); learned latents
join the set in a transformer and are all that is kept; they are made Gaussian, and quantised as a sequence at growing
lengths, each scale coding what the coarser ones left over. In the decoder queries of three planes read the latents, the
planes are enlarged, and a point's occupancy is read from the sum of what it meets on them. Source: Zhang et al., arXiv
2412.02202; no code was released, this follows the abstract.

Choices that the abstract leaves open: all sizes; scales double, and what a scale adds is constant over the places that
its token stands for. So the coarse scales never make it worse where the table has a zero: of interpolated codes that
cannot be said. The generator over the scales is not here; ``next_inputs`` of the bottleneck is what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import pi
from typing import Any, cast

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, grid_sample, pixel_shuffle, silu

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes
from vistok.parts.quantize import Gaussian, MultiScale, VectorQuantizer
from vistok.parts.query_transformer import QueryTransformer
from vistok.world.sampling import derive_seed
from vistok.world.solids import make_solid

CARD = Card(
    title="3D representation in 512-Byte: Variational tokenizer is the key for autoregressive 3D generation",
    kind="trained",
    site="points of a surface to discrete tokens of growing scales, and to occupancy of space",
    paper="Zhang et al., 2024, arXiv 2412.02202",
    repository="sparse-mvs-2/VAT",
    mechanism=("transformation",),
    modality="3d",
    merge="learned latents that read the set of point features by attention",
    claim="Residual scales of Gaussian latents hold a solid better than those of latents without noise.",
)


class Steps(MultiScale):
    """Residual codes of a sequence whose scales divide one another; each token adds to all places it stands for."""

    def _added(self, codes: Tensor, s: int) -> Tensor:
        return codes.transpose(1, 2).repeat_interleave(self.scales[-1] // self.scales[s], 2)


class VATNetwork(nn.Module):
    """Points (B, N, 6), positions in [-1, 1] and normals, to codes; codes to three planes; planes to occupancy."""

    def __init__(self, recipe: VAT) -> None:
        super().__init__()
        width, dim, scales, kl, plane = recipe.width, recipe.dim, recipe.scales, recipe.kl, recipe.plane
        if any(b % a for a, b in pairwise(scales)):
            raise ValueError(f"scales: got {scales}, must each divide the next")
        norm = partial(nn.LayerNorm, eps=1e-5)

        def blocks() -> nn.Sequential:
            return nn.Sequential(
                *(Block(width, recipe.heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(recipe.depth)),
                norm(width),
            )

        scale, self.plane, self.enlarge, self.bands = width**-0.5, plane, recipe.enlarge, recipe.bands
        self.points = QueryTransformer(width, 1, recipe.heads, 6 * recipe.bands + 6, recipe.features)
        self.latents = nn.Parameter(scale * torch.randn(scales[-1], width))
        self.encoder, self.decoder = blocks(), blocks()
        self.gaussian = None if kl is None else Gaussian(dim, kl)
        self.down, self.up = nn.Linear(width, dim if kl is None else 2 * dim), nn.Linear(dim, width)
        self.bottleneck = Steps(VectorQuantizer(recipe.codes, dim, restart_after=recipe.restart_after), scales, ndim=1)
        self.latent_positions = nn.Parameter(scale * torch.randn(scales[-1], width))
        self.planes = nn.Parameter(scale * torch.randn(3 * plane**2, width))
        self.draw = nn.Conv2d(width, recipe.channels * recipe.enlarge**2, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(recipe.channels, width), nn.SiLU(), nn.Linear(width, 1))

    def latent(self, points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, L, dim) float32: what is quantised, a draw in training and the mean otherwise; and the loss of it.

        Raises ValueError for points of another shape.
        """
        if points.dim() != 3 or points.shape[2] != 6:
            raise ValueError(f"points: got shape {tuple(points.shape)}, must be (B, N, 6): positions and normals")
        tokens = self.points(fourier(points, self.bands))
        x = self.encoder(torch.cat([self.latents.expand(len(points), -1, -1), tokens], 1))
        z = self.down(x[:, : len(self.latents)])
        if self.gaussian is None:
            return z.float(), {}
        drawn = self.gaussian(z)
        assert drawn.z is not None
        return drawn.z, dict(drawn.losses)

    def encode(self, points: Tensor) -> Codes:
        """Codes of points (B, N, 6): ids (B, sum of the scales), scale after scale; their order does not matter."""
        return cast(Codes, self.bottleneck(self.latent(points)[0]))

    def decode(self, codes: Codes) -> Tensor:
        """(B, 3, channels, R, R): the planes of ``codes``, or of their first scales (``codes.prefix(k)``)."""
        z = codes.z
        if z is None:
            assert codes.ids is not None
            z = self.bottleneck.ids_to_z(codes.ids)
        x = self.up(z.to(self.up.weight.dtype)) + self.latent_positions
        x = self.decoder(torch.cat([self.planes.expand(len(x), -1, -1), x], 1))[:, : len(self.planes)]
        maps = x.unflatten(1, (3, self.plane, self.plane)).flatten(0, 1).permute(0, 3, 1, 2)
        return pixel_shuffle(self.draw(maps), self.enlarge).unflatten(0, (-1, 3))

    def occupancy(self, planes: Tensor, xyz: Tensor) -> Tensor:
        """(B, Q) logits, above 0 inside, at ``xyz`` (B, Q, 3) in [-1, 1]: read off the planes xy, yz and zx."""
        where = torch.stack([xyz[..., [0, 1]], xyz[..., [1, 2]], xyz[..., [2, 0]]], 1)
        met = grid_sample(planes.flatten(0, 1), where.flatten(0, 1)[:, None].to(planes.dtype), align_corners=False)
        together = met[:, :, 0].unflatten(0, (-1, 3)).sum(1).transpose(1, 2)
        return self.head(silu(together))[..., 0]

    def objective(self, points: Tensor, xyz: Tensor, inside: Tensor) -> Tensor:
        """A scalar: cross-entropy of occupancy at ``xyz`` (B, Q, 3), ``inside`` (B, Q) bool, and the codes' losses."""
        z, losses = self.latent(points)
        codes = self.bottleneck(z)
        logits = self.occupancy(self.decode(codes), xyz)
        wrong = binary_cross_entropy_with_logits(logits.float(), inside.float())
        return wrong + codes.loss + sum(losses.values(), torch.zeros_like(wrong))

    def bytes(self, scales: int | None = None) -> float:
        """Of a solid's ids, or of those of its first ``scales`` scales."""
        return sum(self.bottleneck.lengths[:scales]) * self.bottleneck.bits() / 8


def fourier(points: Tensor, bands: int) -> Tensor:
    """(B, N, 6 bands + 6): sines and cosines of positions at pi 2^i, then ``points`` (B, N, 6) as they are."""
    turns = points[..., :3, None] * (pi * 2.0 ** torch.arange(bands, device=points.device, dtype=points.dtype))
    return torch.cat([turns.sin().flatten(-2), turns.cos().flatten(-2), points], -1)


@dataclass(frozen=True)
class VAT:
    """A tokenizer of solids by its size."""

    features: int = 1024
    """Features of the set that the points become."""
    width: int = 768
    """Channels of the transformers."""
    depth: int = 12
    """Blocks of encoder and decoder each."""
    heads: int = 12
    """Heads of a block."""
    codes: int = 256
    """Codes of the table that all scales share; 256 are a byte a token."""
    dim: int = 16
    """Channels of a code."""
    scales: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Tokens of each scale, coarse to fine, each dividing the next; the last is the number of latents."""
    plane: int = 32
    """Side of a plane in tokens."""
    enlarge: int = 8
    """How many times larger the planes' sides become."""
    channels: int = 32
    """Channels of the planes."""
    bands: int = 8
    """Frequencies at which positions are told."""
    kl: float | None = 1e-3
    """Weight of the latents' divergence from a normal distribution; None: they are not random."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""

    def network(self) -> VATNetwork:
        """An untrained tokenizer: its solids are no pictures, so it is no ``Tokenizer``."""
        return VATNetwork(self)


def solids(n: int, split: str, points: int = 192, queries: int = 384) -> tuple[Tensor, Tensor, Tensor]:
    """``n`` solids of the world: surfaces (n, points, 6), places (n, queries, 3) and whether inside, (n, queries)."""
    found: list[tuple[Any, ...]] = []
    for i in range(n):
        solid = make_solid(derive_seed(0, i, split))
        found.append((np.concatenate(solid.surface(points), 1), *solid.samples(queries)))
    surface, places, inside = (np.stack(x) for x in zip(*found, strict=True))
    return torch.from_numpy(surface).float(), torch.from_numpy(places).float(), torch.from_numpy(inside)


@torch.no_grad()
def iou(model: VATNetwork, surface: Tensor, places: Tensor, inside: Tensor) -> float:
    """Mean over solids of intersection over union of what is inside, at ``places``, in [0, 1]."""
    model.eval()
    made = model.occupancy(model.decode(model.encode(surface)), places) > 0
    return float(((made & inside).sum(1) / (made | inside).sum(1).clamp_min(1)).mean())


def claim(trial: TokenizeTrial, steps: int = 400) -> Outcome:
    """Overlap with held-out solids of 15 tokens of a byte, of latents without noise and of Gaussian ones.

    Both networks see the same solids for ``steps`` steps. Holds if the Gaussian ones are better by 0.01.
    """
    known, held = solids(2 * trial.pictures, "train"), solids(trial.pictures, "test")
    found = []
    for kl in (None, 1e-3):
        torch.manual_seed(trial.seed)
        model = VAT(32, 96, 2, 3, 256, 8, (1, 2, 4, 8), 4, 4, 16, 4, kl, 20).network()
        order = torch.Generator().manual_seed(trial.seed)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(steps):
            batch = torch.randint(len(known[0]), (16,), generator=order)
            loss = model.objective(*(x[batch] for x in known))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(iou(model, *held))
    return Outcome("overlap with the solid", found[0], found[1], found[1] >= found[0] + 0.01)

"""Patchification scaling: one architecture at smaller and smaller patches, down to the pixel, and the law of its error.

What: all is kept but the side of a patch; a picture of side S becomes N = (S / p)^2 tokens, up to 50,176. Thousands of
tokens ask for a mixer of linear cost: Adventurer is a causal state space model (Mamba-2) whose sequence begins with
the mean of all tokens, ends with the class token, and is turned round in every other pair of blocks. Source: Wang et
al., arXiv 2502.03738, wangf3014/Patch_Scaling; Adventurer: arXiv 2410.07599. Where: the patch embedding.

``PatchSweep`` trains any model once a patch size and seed on equal pictures and tells error, loss and operations;
``fit_power_law`` fits ``a N^-b + c`` (which form the paper fits is not known). The mean in front sees all patches: the
blocks are causal but for it. Norms are layer norms as described (released models: RMS norms).
``parity="authors"``: the released test of the schedule, which turns blocks 2 and 3 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import DropPath, PatchEmbed, SwiGLU, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import (
    affine_grid,
    avg_pool2d,
    binary_cross_entropy_with_logits,
    grid_sample,
    pad,
    pixel_shuffle,
    silu,
    softplus,
)
from torch.utils.flop_counter import FlopCounterMode

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.scan import step_bias
from vistok.core.ssd import chunked_scan
from vistok.world import derive_seed, make_object

CARD = Card(
    title="Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More",
    kind="trained",
    site="patch embedding",
    paper="Wang et al., 2025, arXiv 2502.03738",
    repository="wangf3014/Patch_Scaling",
    mechanism=("transformation",),
    claim="Error does not rise as patches shrink, all else equal.",
    departures=("every other pair of blocks is turned round, not the second alone",),
)


class CausalMixer(nn.Module):
    """(B, L, C) to the same, each token from those before it: Mamba-2 (Dao and Gu, arXiv 2405.21060)."""

    def __init__(self, dim: int, state: int = 64, expand: int = 2, head_dim: int = 64, conv: int = 4) -> None:
        super().__init__()
        inner = expand * dim
        if inner % head_dim:
            raise ValueError(f"head_dim: got {head_dim}, must divide the {inner} channels inside")
        self.head_dim, self.parts = head_dim, (inner, inner + 2 * state, inner // head_dim)
        self.in_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.conv1d = nn.Conv1d(self.parts[1], self.parts[1], conv, groups=self.parts[1])
        self.dt_bias = nn.Parameter(step_bias(self.parts[2]))
        self.A_log = nn.Parameter(torch.empty(self.parts[2]).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.parts[2]))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z, u, dt = self.in_proj(x).split(self.parts, 2)
        u = silu(self.conv1d(pad(u.transpose(1, 2), (self.conv1d.kernel_size[0] - 1, 0)))).transpose(1, 2)
        state = (self.parts[1] - self.parts[0]) // 2
        u, b, c = u.split((self.parts[0], state, state), 2)
        u = u.unflatten(2, (-1, self.head_dim))
        y = chunked_scan(u, softplus(dt.float() + self.dt_bias), -self.A_log.float().exp(), b, c)
        y = (y + u * self.D[:, None]).flatten(2)
        return self.out_proj(self.norm(y * silu(z)))


class AdventurerBlock(nn.Module):
    """(B, N + 1, C) to the same, patches first and the class token last; ``mixer``: any causal map of (B, L, C).

    The mixer is given one token more, in front: the mean of all. ``flip``: it goes through the patches backwards.
    """

    def __init__(self, dim: int, mixer: nn.Module, flip: bool = False, drop_path: float = 0.0) -> None:
        super().__init__()
        self.flip, self.mixer = flip, mixer
        self.norm, self.norm_mlp = nn.LayerNorm(dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.mlp = SwiGLU(dim, int(2.5 * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        u = flip_patches(u) if self.flip else u
        u = self.mixer(torch.cat([u.mean(1, keepdim=True), u], 1))[:, 1:]
        x = x + self.drop_path(flip_patches(u) if self.flip else u)
        return x + self.drop_path(self.mlp(self.norm_mlp(x)))


class Adventurer(nn.Module):
    """Pictures (B, 3, size, size) to logits (B, num_classes), read from the class token at the end of the sequence.

    Dims of the paper: tiny 256 (the default), small 512, base 768, each of 12 blocks, large 1024 of 24.
    ``num_classes`` 0: no head. ``mixer``: makes a block's mixer from the width, by default ``CausalMixer``.
    ``drop_path`` rises from 0 to this rate.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        num_classes: int = 1000,
        size: int = 224,
        patch: int = 16,
        dim: int = 256,
        depth: int = 12,
        mixer: Callable[[int], nn.Module] = CausalMixer,
        drop_path: float = 0.0,
        parity: Literal["paper", "authors"] = "paper",
    ) -> None:
        super().__init__()
        if parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {parity!r}, must be 'paper' or 'authors'")
        tokens, self.embed_dim = count_patches(size, patch), dim
        self.patch_embed = PatchEmbed(size, patch, 3, dim)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens + 1, dim), std=0.02))
        flips = flip_schedule(depth, parity)
        rates = [drop_path * n / max(depth - 1, 1) for n in range(depth)]
        self.blocks = nn.Sequential(
            *(AdventurerBlock(dim, mixer(dim), flip, rate) for flip, rate in zip(flips, rates, strict=True))
        )
        self.norm_f = nn.LayerNorm(dim, eps=1e-5)
        self.head: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward_features(self, pictures: Tensor) -> Tensor:
        """(B, 1 + N, C) normed: the class token, then the patches in raster order."""
        x = self.patch_embed(pictures)
        x = torch.cat([x, self.cls_token.expand(len(x), -1, -1)], 1) + self.pos_embed
        return self.norm_f(self.blocks(x)).roll(1, 1)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Logits of what ``forward_features`` gives."""
        return self.head(tokens[:, 0])

    def forward(self, pictures: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pictures))


@dataclass(frozen=True)
class PowerLaw:
    """``a N^-b + c``: ``c`` is what no number of tokens takes away."""

    a: float
    b: float
    c: float

    def __call__(self, tokens: float) -> float:
        return self.a * tokens**-self.b + self.c


@dataclass(frozen=True)
class SweepPoint:
    """One training of a sweep."""

    patch: int
    """Side in pixels."""
    tokens: int
    """N, without the class token."""
    seed: int
    flops: int
    """Of a forward pass of one picture."""
    loss: float
    """On held-out pictures."""
    error: float
    """Share that is wrong there, in [0, 1]."""


@dataclass(frozen=True)
class PatchSweep:
    """One architecture at several patch sizes, all else equal."""

    model_fn: Any = "adventurer"
    """"adventurer" or "vit" (the paper's tiny ones), or (size, patch) -> model."""
    patch_sizes: tuple[int, ...] = (16, 8, 4, 2, 1)
    """Sides of a patch in pixels."""
    size: int = 224
    """Side of a picture in pixels."""

    def __post_init__(self) -> None:
        if self.model_fn not in ("adventurer", "vit") and not callable(self.model_fn):
            raise ValueError(f"model_fn: got {self.model_fn!r}, must be 'adventurer', 'vit' or a function of two sides")
        for patch in self.patch_sizes:
            count_patches(self.size, patch)

    def build(self, patch: int) -> nn.Module:
        """An untrained model for patches of that side."""
        if self.model_fn == "adventurer":
            return Adventurer(size=self.size, patch=patch)
        if self.model_fn == "vit":
            return VisionTransformer(self.size, patch, embed_dim=192, num_heads=3)
        return self.model_fn(self.size, patch)

    def run(
        self,
        fit: Callable[[Any, int], Any],
        judge: Callable[[Any], tuple[float, float]],
        seeds: Sequence[int] = (0, 1, 2),
    ) -> Iterator[SweepPoint]:
        """Train each model and yield a point as soon as it is there, patch sizes in turn within a seed.

        ``fit(model, seed)`` trains it in place, on the same pictures and for as many steps for all models of a seed;
        ``judge(model)`` gives its (loss, error) on held-out pictures.
        """
        for seed in seeds:
            for patch in self.patch_sizes:
                torch.manual_seed(seed)
                model = self.build(patch)
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    model(torch.zeros(1, 3, self.size, self.size))
                fit(model, seed)
                tokens = count_patches(self.size, patch)
                yield SweepPoint(patch, tokens, seed, counter.get_total_flops(), *judge(model))


def count_patches(size: int, patch: int) -> int:
    """N of a picture of side ``size``. ValueError where ``patch`` does not divide it."""
    if patch < 1 or size % patch:
        raise ValueError(f"patch: got {patch}, must be 1 or more and divide the picture's side, {size}")
    return (size // patch) ** 2


def flip_schedule(depth: int, parity: Literal["paper", "authors"] = "paper") -> list[bool]:
    """Which blocks go backwards: every other pair; as released, the second pair alone."""
    return [n // 2 == 1 if parity == "authors" else n // 2 % 2 == 1 for n in range(depth)]


def flip_patches(x: Tensor) -> Tensor:
    """``x`` (B, N + 1, C) with its patches in reverse; the class token stays last."""
    return torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1)


def resize_patch_embed(weight: Tensor, patch: int) -> Tensor:
    """``weight`` (D, C, p, p) of a patch embedding for patches of another side: (D, C, patch, patch).

    A larger patch that is a smaller one enlarged (bilinear, antialiased) embeds as the smaller one did; shrinking is
    the least-squares best. Source: pseudo-inverse resize of Beyer et al., arXiv 2212.08013.
    """
    if patch < 1:
        raise ValueError(f"patch: got {patch}, must be 1 or more")
    return resample_patch_embed(weight, [patch, patch], interpolation="bilinear")


def fit_power_law(tokens: Sequence[float], loss: Sequence[float]) -> PowerLaw:
    """The least-squares ``a N^-b + c`` with a, c >= 0 and 0 < b <= 4. ValueError for fewer than 3 different N."""
    if len(tokens) != len(loss) or len({*tokens}) < 3 or min(tokens) <= 0:
        raise ValueError(f"tokens: got {list(tokens)}, must be 3 different numbers above 0 at least, one a loss")
    n, y = (torch.tensor(values, dtype=torch.float64) for values in (tokens, loss))
    n = n / n.min()
    low, high = 1e-3, 4.0
    for _ in range(4):  # each time 200 values of b between the neighbours of the best
        b = torch.linspace(low, high, 200, dtype=torch.float64)
        x = n ** -b[:, None]
        flat = x.mean(1, keepdim=True)
        a = ((x - flat) * (y - y.mean())).sum(1) / (x - flat).square().sum(1)
        a = torch.where(y.mean() - a * flat[:, 0] < 0, x @ y / x.square().sum(1), a).clamp(min=0)
        c = (y.mean() - a * flat[:, 0]).clamp(min=0)
        best = int((a[:, None] * x + c[:, None] - y).square().sum(1).argmin())
        low, high = float(b[max(best - 1, 0)]), float(b[min(best + 1, 199)])
    exponent = float(b[best])
    return PowerLaw(float(a[best]) * min(tokens) ** exponent, exponent, float(c[best]))


class _PixelMap(nn.Module):
    """A backbone, and a linear map of each of its patches to a logit for each pixel in it: (B, size, size)."""

    def __init__(self, backbone: Any, patch: int) -> None:
        super().__init__()
        self.backbone, self.patch = backbone, patch
        self.head = nn.Linear(backbone.embed_dim, patch * patch)

    def forward(self, pictures: Tensor) -> Tensor:
        rows = self.head(self.backbone.forward_features(pictures)[:, self.backbone.num_prefix_tokens :])
        side = pictures.shape[2] // self.patch
        return pixel_shuffle(rows.transpose(1, 2).unflatten(2, (side, side)), self.patch)[:, 0]


def glimpse(images: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(B, 3, size, size) in -1 .. 1, a square around each object, a quarter wider than it, made that small; and the
    object's share of each pixel, (B, size, size) in 0 .. 1.

    ``images`` (B, H, W, 3) uint8 and the objects' ``mask`` (B, H, W). Beyond the picture its border goes on.
    """
    ends = []
    for along in (2, 1):  # of the mask: columns, then rows
        seen = mask.bool().any(3 - along)
        first, last = (s.int().argmax(1) for s in (seen, seen.flip(1)))
        ends.append((first, seen.shape[1] - last, seen.shape[1]))
    side = 1.25 * torch.stack([last - first for first, last, _ in ends]).amax(0)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    for axis, (first, last, whole) in enumerate(ends):
        theta[:, axis, axis] = side / whole
        theta[:, axis, 2] = (first + last) / whole - 1
    grid = affine_grid(theta, [len(images), 4, 2 * size, 2 * size], align_corners=False)
    pixels = torch.cat([images.permute(0, 3, 1, 2).float() / 127.5 - 1, mask[:, None].float()], 1)
    seen = avg_pool2d(grid_sample(pixels, grid, padding_mode="border", align_corners=False), 2)
    return seen[:, :3], seen[:, 3]


def small_adventurer(size: int, patch: int) -> nn.Module:
    """What the claim trains: which pixels of a glimpse are the object's, (B, size, size) logits."""
    return _PixelMap(Adventurer(0, size, patch, 48, 4, lambda dim: CausalMixer(dim, 16, head_dim=32)), patch)


def sweep_glimpses(
    trial: ViTTrial, sweep: PatchSweep, steps: int, seeds: Sequence[int], pictures: int = 256
) -> Iterator[SweepPoint]:
    """``sweep`` on glimpses of the world's objects, ``steps`` steps by ``trial.fit`` each, judged on held-out ones.

    The models say which pixels are the object's; loss and error are a pixel's.
    """
    drawn = [make_object(derive_seed(1, number, "test")) for number in range(pictures)]
    images = torch.stack([torch.tensor(one.image) for one in drawn])
    held_out, truth = glimpse(images, torch.stack([torch.tensor(one.things[0].mask) for one in drawn]), sweep.size)

    def loss(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        pixels, share = glimpse(batch.images, batch.truth, sweep.size)
        logits = model(pixels).float()
        return binary_cross_entropy_with_logits(logits, share), ((logits > 0) == (share > 0.5)).float().mean()

    def judge(model: Any) -> tuple[float, float]:
        with torch.no_grad():
            logits = torch.cat([model(part) for part in held_out.split(64)])
        wrong = ((logits > 0) != (truth > 0.5)).float().mean()
        return binary_cross_entropy_with_logits(logits, truth).item(), wrong.item()

    return sweep.run(lambda model, seed: trial.fit(model, steps, loss=loss, peak_lr=2e-3, seed=seed), judge, seeds)


def claim(trial: ViTTrial, steps: int = 100, pictures: int = 256) -> Outcome:
    """The abstract: smaller patches keep predicting better, also in dense tasks with plain heads.

    A small Adventurer is to tell which pixels of a 16 px glimpse are the object's, at patches of 8, 4 and 2 pixels.
    Holds where no patch size has a larger error than the one twice as large.
    """
    points = list(sweep_glimpses(trial, PatchSweep(small_adventurer, (8, 4, 2), 16), steps, [trial.seed], pictures))
    error = [point.error for point in points]
    told = ", ".join(f"{p.tokens} tokens ({p.flops / 1e6:.1f} MFLOPs): {p.error:.3f}" for p in points)
    holds = error == sorted(error, reverse=True)
    return Outcome("error, smallest against largest patch", error[0], error[-1], holds, f"{told}; {steps} steps each")

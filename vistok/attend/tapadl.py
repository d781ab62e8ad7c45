"""TAP and ADL: attention sees each token averaged with its neighbours, and a loss keeps its rows from being alike.

What: attention of vision transformers leans on few tokens, and under noise on others. Token-aware average pooling (TAP)
gives each token, in front of attention, a mix of itself and of means over 3 x 3 tokens of growing dilation; a small
gate weighs them, token by token. What is added to goes on unpooled. The attention diversification loss (ADL) is the
mean cosine of the rows of a map to their mean, of what is above ``threshold`` / N. Source: Guo et al., arXiv
2304.00287, guoyongcs/TAPADL. Where: in front of the norm of every block's attention; the loss on the maps of all. Here
on timm's plain vision transformers; the paper's hosts are FAN and RVT.

Beyond the map are zeros, and every mean is of nine. Class and register tokens stay as they are. For a batch of one the
released loss takes the mean along the wrong axis and is 0, and its mean over layers divides by 1e-6 too much; not here
(``parity="authors"`` does both). Maps need not be square.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, cosine_similarity, cross_entropy
from torch.utils.checkpoint import checkpoint

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import attention_rows

Parity = Literal["paper", "authors"]
CARD = Card(
    title="Robustifying Token Attention for Vision Transformers (TAP and ADL)",
    kind="trained",
    site="in front of the attention of every block; a loss on the attention maps",
    paper="Guo et al., 2023, arXiv 2304.00287",
    repository="guoyongcs/TAPADL",
    mechanism=("attention", "transformation"),
    score="a gate of two convolutions, for each token",
    merge="mean of 3 x 3 tokens at several dilations, weighed by the gate",
    claim="Pooled attention inputs and diverse rows make a vision transformer more accurate on corrupted pictures.",
    departures=("the loss of a batch of one is not 0", "maps need not be square"),
)


class TokenAwarePooling(nn.Module):
    """TAP: (B, prefix + H * W, dim) to the same. ``scales``: branches, the token itself and scales - 1 dilations."""

    def __init__(self, dim: int, scales: int = 4) -> None:
        super().__init__()
        if scales < 1:
            raise ValueError(f"scales: got {scales}, must be 1 or more")
        self.scales = scales
        self.proj = nn.Sequential(
            nn.Conv2d(dim, scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )

    def gate(self, x: Tensor) -> Tensor:
        """(B, scales, H, W), summing to 1 over the scales, of a map (B, dim, H, W)."""
        return self.proj(x).softmax(1)

    def pool(self, x: Tensor) -> Tensor:
        """The pooled map of ``x`` (B, dim, H, W)."""
        weights = self.gate(x).split(1, 1)
        kernel = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
        out = weights[0] * x
        for s in range(1, self.scales):
            out = out + weights[s] * conv2d(x, kernel, padding=s, dilation=s, groups=x.shape[1])
        return out

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        prefix = x.shape[1] - grid[0] * grid[1]
        if prefix < 0:
            raise ValueError(f"grid: got {grid[0]} x {grid[1]}, must have at most the {x.shape[1]} tokens of x")
        pooled = self.pool(x[:, prefix:].transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :prefix], pooled], 1)


class PooledNorm(nn.Module):
    """A block's first norm with TAP in front, of tokens on ``grid``: what attention sees, and nothing else."""

    def __init__(self, norm: nn.Module, tap: TokenAwarePooling, grid: tuple[int, int]) -> None:
        super().__init__()
        self.norm, self.tap, self.grid = norm, tap, grid

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.tap(x, self.grid))


def adl_loss(maps: Sequence[Tensor], threshold: float = 2.0, parity: Parity = "paper") -> Tensor:
    """The attention diversification loss, in [0, 1], of ``maps`` (B, heads, N, N), one a layer, after the softmax.

    Mean over layers, pictures and rows of the cosine between a row and the mean row, heads averaged, entries up to
    ``threshold`` / N set to 0 in both. A row with nothing left counts 0.
    """
    if not maps:
        raise ValueError("maps: got none, must be one at least")
    each = []
    for weights in maps:
        rows = weights.mean(1)
        squeezed = parity == "authors" and len(rows) == 1
        each.append(_cosines(rows, rows.mean(2 if squeezed else 1), threshold).mean())
    return torch.stack(each).sum() / (len(maps) + (1e-6 if parity == "authors" else 0))


def adl_of_products(
    q: Tensor, k: Tensor, threshold: float = 2.0, scale: float | None = None, block: int = 256
) -> Tensor:
    """``adl_loss`` of one layer from its ``q`` and ``k`` (B, heads, N, d), in memory O(heads * block * N).

    ``block`` rows of the map are made at a time, and again for the gradient. Two passes: the mean row, the cosines.
    """
    n = q.shape[2]
    starts = range(0, n, block)

    def rows(part: Tensor) -> Tensor:
        return attention_rows(part, k, scale).mean(1)

    def total(part: Tensor) -> Tensor:
        return rows(part).sum(1)

    def cosines(part: Tensor, mean: Tensor) -> Tensor:
        return _cosines(rows(part), mean, threshold).sum()

    def again(of: Any, *given: Tensor) -> Any:
        return checkpoint(of, *given, use_reentrant=False)

    mean = torch.stack([again(total, q[:, :, i : i + block]) for i in starts]).sum(0) / n
    return torch.stack([again(cosines, q[:, :, i : i + block], mean) for i in starts]).sum() / (len(q) * n)


def _cosines(rows: Tensor, mean: Tensor, threshold: float) -> Tensor:
    """(B, M) of ``rows`` (B, M, N) to ``mean`` (B, N), both without what is at most threshold / N."""
    least = threshold / rows.shape[2]
    rows, mean = (x * (x > least) for x in (rows, mean))
    return cosine_similarity(rows, mean[:, None], dim=2)


@contextmanager
def diversity(vit: VisionTransformer, threshold: float = 2.0) -> Iterator[list[Tensor]]:
    """Inside, every forward pass of ``vit`` adds the loss of each layer to the list: their mean is the ADL."""
    found: list[Tensor] = []

    def see(attention: Any, _: Any, qkv: Tensor) -> None:
        q, k, _ = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append(adl_of_products(attention.q_norm(q), attention.k_norm(k), threshold, attention.scale))

    hooks = [
        block.attn.qkv.register_forward_hook(lambda _, given, qkv, of=block.attn: see(of, given, qkv))
        for block in vit.blocks
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class RobustAttention:
    """TAP in a vision transformer, and the loss to train it with."""

    scales: int = 4
    """Branches of TAP: the token itself, and means of dilation 1 to scales - 1."""
    threshold: float = 2.0
    """Of the loss: attention up to threshold / N counts as none."""
    weight: float = 1.0
    """Of the loss, beside cross-entropy."""

    def build(self, vit: VisionTransformer) -> VisionTransformer:
        """A copy of timm's ``vit`` with TAP, untrained, in each of its blocks; pictures must be of the size it has."""
        net = copy.deepcopy(vit)
        grid = tuple(net.patch_embed.grid_size)
        for block in net.blocks:
            block.norm1 = PooledNorm(block.norm1, TokenAwarePooling(net.embed_dim, self.scales), grid)
        return net

    def loss(self, net: VisionTransformer, pictures: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of ``labels`` (B,) plus the weighed ADL; ``net`` may be any vision transformer of timm."""
        with diversity(net, self.threshold) as found:
            logits = net(pictures)
        return cross_entropy(logits, labels) + self.weight * torch.stack(found).mean()


def plain_vit(seed: int) -> VisionTransformer:
    """What the claim trains: a token for each 2 x 2 pixels of a digit of 8 x 8."""
    torch.manual_seed(seed)
    how: dict[str, Any] = dict(class_token=False, global_pool="avg", num_classes=10)
    return VisionTransformer(8, 2, 1, embed_dim=48, depth=3, num_heads=3, **how)


def corruptions(seed: int) -> dict[str, Any]:
    """Pictures (B, 1, 8, 8) in -1 .. 1 to worse ones: noise, blur, less contrast, single pixels that are wrong."""
    rng = torch.Generator().manual_seed(seed)

    def impulse(x: Tensor) -> Tensor:
        wrong = torch.rand(x.shape, generator=rng)
        return torch.where(wrong < 0.1, (wrong < 0.05) * 2.0 - 1, x)

    return {
        "noise": lambda x: x + 0.6 * torch.randn(x.shape, generator=rng),
        "blur": lambda x: avg_pool2d(x + 1, 3, 1, 1) - 1,
        "contrast": lambda x: 0.3 * x,
        "impulse": impulse,
    }


def claim(trial: AttendTrial, steps: int = 250) -> Outcome:
    """The abstract: more robust to corruptions, and more accurate without. Holds where the mean of ``corruptions`` is.

    A small vision transformer, with and without TAP and ADL, trained for ``steps`` steps each from the same start.
    """
    system, found = RobustAttention(), []
    for robust in (False, True):
        net = plain_vit(trial.seed)
        net = system.build(net) if robust else net
        trial.fit(net, steps, loss=(lambda of, rng: system.loss(of, *trial.draw(rng))) if robust else None)
        worse = [trial.accuracy(net, change) for change in corruptions(trial.seed).values()]
        found.append((sum(worse) / len(worse), trial.accuracy(net)))
    (plain, plain_clean), (ours, ours_clean) = found
    kept = f"of it is kept: {plain / plain_clean:.0%}, {ours / ours_clean:.0%} with it"
    note = f"on clean digits {plain_clean:.1%}, {ours_clean:.1%} with it; {kept}; {steps} steps each, one seed"
    return Outcome("accuracy on corrupted digits", plain, ours, ours > plain, note)

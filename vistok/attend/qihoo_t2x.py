"""PT-DiT: in a diffusion transformer, few proxies of windows attend to one another, and all tokens to the proxies.

What: tokens of a window attend alike, so global attention is made of proxies: means of cells of a window. A block adds
to the proxies their self-attention, to the tokens what they read from the proxies by cross-attention, through a layer
of zeros; then come attention within windows, attention within windows moved by half, through a layer of zeros too,
attention to the text, and the MLP. Time shifts, scales and gates by one table a block (adaLN-single). Source: Wang et
al., arXiv 2409.04005; the block as released in Ascend/MindSpeed-MM, whose parameter names it bears but for ``to_out.0``
and the MLP's. Where: a diffusion transformer of pictures, videos or views.

The released code cuts an axis of a window into (cell, proxies), so that a proxy is the mean of places far from one
another; here cells are whole (``layout="interleaved"``: as released). It repeats the modulation of a batch in another
order than windows come in, so that samples get the times of others; not here. ``parity="authors"`` does both. What the
first version of the paper does, one random token of a cell, is ``mode="random"``. Windows of the border stay apart when
moved: the mask of the release. Text attention has neither norm nor gate, as released. Widths are those of PixArt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core import flops
from vistok.core.attention import Pattern, Window, attend
from vistok.core.flow import NOISE_FIRST
from vistok.parts.diffusion_transformer import TimeEmbedding, grid_sinusoids, unpatch

Size = tuple[int, int, int]
Mode = Literal["mean", "first", "random"]
Layout = Literal["cell", "interleaved"]
Parity = Literal["paper", "authors"]
CARD = Card(
    title="Qihoo-T2X: An Efficiency-Focused Diffusion Transformer via Proxy Tokens for Text-to-Any-Task (PT-DiT)",
    kind="trained",
    site="the blocks of a diffusion transformer",
    paper="Wang et al., 2024, arXiv 2409.04005",
    repository="Ascend/MindSpeed-MM",
    mechanism=("transformation", "attention"),
    modality="video",
    select="windows, and windows moved by half",
    merge="mean of the tokens of a cell, its proxy",
    claim="At equal cost, proxies and windows learn to denoise as well as attention to all tokens.",
    departures=("a proxy is the mean of a whole cell", "each sample is modulated by its own time"),
)


def proxy_tokens(
    x: Tensor, window: Size, cell: tuple[int, int], mode: Mode = "mean", layout: Layout = "cell"
) -> Tensor:
    """Of tokens (B, F, H, W, C) the proxies (B, P, C), in raster order: one a cell, and in time one a window.

    ``layout`` "interleaved": of tokens whose places are equal modulo window / cell. ``mode``: their mean, the first, or
    a random one (PyTorch's generator).
    """
    (frames, *sides), (f, h, w) = window, x.shape[1:4]
    if any(n % side for n, side in zip((f, h, w), window, strict=True)):
        raise ValueError(f"window: got {window}, must divide the {f} x {h} x {w} tokens")
    if any(side % c for side, c in zip(sides, cell, strict=True)):
        raise ValueError(f"cell: got {cell}, must divide the window, {window}")
    if mode not in ("mean", "first", "random") or layout not in ("cell", "interleaved"):
        raise ValueError(f"mode, layout: got {mode!r}, {layout!r}, must be mean, first or random; cell or interleaved")
    whole = layout == "cell"
    for axis in (3, 2):
        side, c = sides[axis - 2], cell[axis - 2]
        x = x.unflatten(axis, (-1, side // c, c) if whole else (-1, c, side // c))
        x = x if whole else x.transpose(axis + 1, axis + 2)
    # (B, F, windows, proxies, cell, windows, proxies, cell, C)
    x = x.unflatten(1, (-1, frames)).permute(0, 1, 3, 4, 6, 7, 2, 5, 8, 9).flatten(6, 8).flatten(1, 5)
    if mode == "mean":
        return x.mean(2)
    if mode == "first":
        return x[:, :, 0]
    which = torch.randint(x.shape[2], x.shape[:2], device=x.device)
    return x.gather(2, which[..., None, None].expand(-1, -1, 1, x.shape[3]))[:, :, 0]


class ProjectedAttention(nn.Module):
    """Attention of ``x`` (B, N, dim) to ``context`` (B, M, dim), or to itself by ``pattern``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, pattern: Pattern | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            layer(of).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, of in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        out = scaled_dot_product_attention(q, k, v) if pattern is None else attend(q, k, v, pattern)
        return self.to_out(out.transpose(1, 2).flatten(2))


class PTDiTBlock(nn.Module):
    """Tokens (B, F * H * W, dim) in raster order to the same."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Size = (1, 8, 8),
        cell: tuple[int, int] = (4, 4),
        shift: bool = True,
        text: bool = True,
        mode: Mode = "mean",
        layout: Layout = "cell",
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        if parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {parity!r}, must be 'paper' or 'authors'")
        self.window, self.cell, self.shift, self.mode, self.layout, self.parity = (
            window,
            cell,
            shift,
            mode,
            layout,
            parity,
        )
        self.proxy_attn1, self.pvisual_attn2, self.attn1 = (ProjectedAttention(dim, heads) for _ in range(3))
        self.linear_1_visual = _zeros(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        if shift:
            self.attn3, self.linear_2 = ProjectedAttention(dim, heads), _zeros(dim)
            self.proxy_scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)
        if text:
            self.attn2 = ProjectedAttention(dim, heads)
        self.ff = Mlp(dim, 4 * dim, act_layer=partial(nn.GELU, approximate="tanh"))

    def forward(self, x: Tensor, size: Size, modulation: Tensor, text: Tensor | None = None) -> Tensor:
        """``size`` (F, H, W); ``modulation`` (B, 6 * dim): of the time, one for all blocks; ``text`` (B, T, dim)."""
        given = self._by_token(modulation.unflatten(1, (6, -1)), size)
        shift, scale, gate, shift2, scale2, gate2 = (given + self.scale_shift_table).unbind(2)
        proxies = proxy_tokens(x.unflatten(1, size), self.window, self.cell, self.mode, self.layout)
        proxies = proxies + self.proxy_attn1(_norm(proxies))
        x = x + self.linear_1_visual(self.pvisual_attn2(_norm(x), _norm(proxies)))
        x = x + gate * self.attn1(_norm(x) * (1 + scale) + shift, pattern=Window(size, self.window))
        if self.shift:
            shift, scale, gate = (given[:, :, :3] + self.proxy_scale_shift_table).unbind(2)
            moved = Window(size, self.window, half(self.window))
            x = x + self.linear_2(gate * self.attn3(_norm(x) * (1 + scale) + shift, pattern=moved))
        if text is not None:
            x = x + self.attn2(x, text)
        return x + gate2 * self.ff(_norm(x) * (1 + scale2) + shift2)

    def _by_token(self, given: Tensor, size: Size) -> Tensor:
        """(B, 1 or N, 6, dim): the modulation (B, 6, dim) that each token gets."""
        if self.parity == "paper":
            return given[:, None]
        number = torch.zeros(1, dtype=torch.int64, device=given.device)
        for n, side in zip(size, self.window, strict=True):
            along = torch.arange(n, device=given.device) // side
            number = (number[:, None] * (n // side) + along).flatten()
        rows = torch.arange(len(given), device=given.device)[:, None] * (int(number[-1]) + 1) + number
        return given[rows % len(given)]


class PlainBlock(PTDiTBlock):
    """Attention to all tokens in place of proxies and windows: PixArt's block, which the claim starts from."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, shift=False, text=False)
        del self.proxy_attn1, self.pvisual_attn2, self.linear_1_visual

    def forward(self, x: Tensor, size: Size, modulation: Tensor, text: Tensor | None = None) -> Tensor:
        given = modulation.unflatten(1, (6, -1))[:, None]
        shift, scale, gate, shift2, scale2, gate2 = (given + self.scale_shift_table).unbind(2)
        x = x + gate * self.attn1(_norm(x) * (1 + scale) + shift)
        return x + gate2 * self.ff(_norm(x) * (1 + scale2) + shift2)


def half(window: Size) -> Size:
    """By how much windows are moved."""
    frames, rows, columns = window
    return frames // 2, rows // 2, columns // 2


def _norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def _zeros(dim: int, to: int | None = None) -> nn.Linear:
    layer = nn.Linear(dim, dim if to is None else to)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def block_flops(size: Size, dim: int, window: Size, cell: tuple[int, int], shift: bool = True, text: int = 0) -> int:
    """Of one block on one sample, counted as in ``vistok.core.flops``; ``text``: tokens of it."""
    n, inside = math.prod(size), math.prod(window)
    proxies = n // (window[0] * math.prod(cell))
    total = flops.linear(proxies, *[dim] * 5) + flops.attention(proxies, proxies, 1, dim)
    total += flops.linear(n, *[dim] * 4) + flops.linear(proxies, *[dim] * 3) + flops.attention(n, proxies, 1, dim)
    total += flops.linear(n, *[dim] * 5) + flops.attention(n, inside, 1, dim)
    if shift:
        pairs = Window(size, window, half(window)).pairs
        total += flops.linear(n, *[dim] * 6) + round(4 * pairs * dim)
    if text:
        total += flops.linear(n, *[dim] * 3) + flops.linear(text, *[dim] * 3) + flops.attention(n, text, 1, dim)
    return total + flops.linear(n, dim, 4 * dim, dim)


class PTDiTNet(nn.Module):
    """Latents (B, channels, F, H, W), or pictures without F, at times (B,) in [0, 1] to velocities of their shape."""

    def __init__(self, channels: int, patch: int, width: int, blocks: Sequence[PTDiTBlock], text_dim: int = 0) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv3d(channels, width, (1, patch, patch), (1, patch, patch))
        self.time = TimeEmbedding(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.text = Mlp(text_dim, width, width) if text_dim else None
        self.blocks = nn.ModuleList(blocks)
        self.table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.head = _zeros(width, patch * patch * channels)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
        """``text`` (B, T, text_dim)."""
        if (text is None) != (self.text is None):
            raise ValueError(
                f"text: got {'none' if text is None else 'some'}, must be given if text_dim is, and only then"
            )
        pictures = x.dim() == 4
        tokens = self.embed(x[:, :, None] if pictures else x)
        size = (tokens.shape[2], tokens.shape[3], tokens.shape[4])
        tokens = tokens.flatten(2).transpose(1, 2)
        tokens = tokens + grid_sinusoids(size, tokens.shape[2], x.device).to(tokens.dtype)
        time = self.time(t)
        modulation = self.modulation(silu(time))
        words = None if text is None or self.text is None else self.text(text)
        for block in self.blocks:
            tokens = block(tokens, size, modulation, words)
        shift, scale = (self.table + time[:, None]).chunk(2, 1)
        tokens = self.head(_norm(tokens) * (1 + scale) + shift).unflatten(1, (size[0], -1)).flatten(0, 1)
        out = unpatch(tokens, size[1:], self.patch).unflatten(0, (len(x), -1)).transpose(1, 2)
        return out[:, :, 0] if pictures else out


@dataclass(frozen=True)
class PTDiT:
    """A diffusion transformer with proxies."""

    width: int = 1152
    """Channels."""
    depth: int = 28
    """Blocks."""
    heads: int = 16
    """Of every attention."""
    patch: int = 2
    """Side of a token in latents."""
    window: tuple[int, int, int] = (1, 8, 8)
    """Tokens of a window along time, height and width."""
    cell: tuple[int, int] = (4, 4)
    """Tokens of a proxy along height and width."""
    shift: bool = True
    """Whether there is attention within windows moved by half."""
    mode: Literal["mean", "first", "random"] = "mean"
    """What a proxy is of the tokens of its cell."""
    layout: Literal["cell", "interleaved"] = "cell"
    """Whether the tokens of a proxy lie together."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": proxies are interleaved, and samples are modulated by the times of others."""

    def build(self, channels: int = 4, text_dim: int = 0) -> PTDiTNet:
        """An untrained network; ``text_dim``: channels of the text's tokens, 0 for none."""
        layout = "interleaved" if self.parity == "authors" else self.layout
        how = (self.window, self.cell, self.shift, bool(text_dim), self.mode, layout, self.parity)
        blocks = [PTDiTBlock(self.width, self.heads, *how) for _ in range(self.depth)]
        return PTDiTNet(channels, self.patch, self.width, blocks, text_dim)


def shapes(count: int, rng: torch.Generator, side: int = 16) -> Tensor:
    """(count, 1, side, side) in -1 .. 1: a bright disc or square on dark ground, anywhere."""
    at, radius, kind = (torch.rand(count, n, generator=rng) for n in (2, 1, 1))
    apart = (torch.arange(side) - (2 + at * (side - 4))[..., None]).abs()
    y, x = apart[:, 0, :, None], apart[:, 1, None, :]
    far = torch.where(kind[..., None] < 0.5, torch.hypot(x, y), torch.maximum(x, y))
    return (2 * (2.5 + radius[..., None] * side / 6 - far).clamp(0, 1) - 1)[:, None]


def claim(trial: AttendTrial, steps: int = 250, batch: int = 16) -> Outcome:
    """The abstract: competitive at less compute. Holds where the error is not greater, at no more operations.

    Small networks of 256 tokens learn the flow from noise to shapes of 16 x 16 pixels; their error on shapes, times and
    noise that are the same for both. One proxy for a window of 4 x 4. But for attention the networks are the same.
    """

    def error(net: nn.Module, rng: torch.Generator, count: int = batch) -> Tensor:
        data = shapes(count, rng)
        noise, t = torch.randn(data.shape, generator=rng), torch.rand(count, generator=rng)
        found = NOISE_FIRST.velocity(net(NOISE_FIRST.mix(data, noise, t), t))
        return NOISE_FIRST.loss(found, NOISE_FIRST.target(data, noise))

    system = PTDiT(48, 3, 3, 1, (1, 4, 4), (4, 4))
    errors, nets = [], {}
    for name in ("plain", "proxies"):
        torch.manual_seed(trial.seed)
        nets[name] = PTDiTNet(1, 1, 48, [PlainBlock(48, 3) for _ in range(3)]) if name == "plain" else system.build(1)
        trial.fit(nets[name], steps, loss=error)
        with torch.no_grad():
            errors.append(error(nets[name], torch.Generator().manual_seed(trial.seed + 1), 256).item())
    full = 3 * flops.transformer_layer(256, 48, 192, 3)
    ours = 3 * block_flops((1, 16, 16), 48, system.window, system.cell)
    some, t = shapes(16, torch.Generator().manual_seed(2)), torch.full((16,), 0.5)
    taken = trial.milliseconds({name: partial(net, some, t) for name, net in nets.items()})
    note = f"{ours / 1e6:.1f} of {full / 1e6:.1f} million operations in the blocks, "
    note += f"{taken['proxies']:.1f} against {taken['plain']:.1f} ms for 16 pictures; {steps} steps each"
    return Outcome("error of the flow", errors[0], errors[1], errors[1] <= errors[0] and ours <= full, note)

"""PlainMamba: a state space model scans a picture along four winding paths, and is told which way each step goes.

What: a raster scan jumps from the end of a row to the start of the next, and a state of one dimension cannot know
which way it moved. Four orders here go from neighbour to neighbour: rows to and fro, that backwards, columns up and
down, that backwards. What a token writes into the state gets a learned vector for the direction in which it was
entered. The four scans share all else, and are summed. Source: Yang et al., arXiv 2403.17695,
ChenhongyiYang/PlainMamba; parameters of the operator bear the authors' names. Where: a backbone of one width and
resolution, with no MLP.

In the released code the inputs follow an order, but the steps and what is written and read stay in raster order, so
that most tokens are scanned with what is another's; and the bias of the steps is added twice. Here all follow, and the
bias is added once (``parity="authors"`` does as released). Tables of orders are made once for a size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, pad, silu

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.scan import selective_scan, step_bias
from vistok.core.tensors import upcast
from vistok.parts.pyramid import MapNorm, Pyramid, drop_rates
from vistok.parts.token_stage import TokenStage

Parity = Literal["paper", "authors"]
CARD = Card(
    title="PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
    kind="trained",
    site="a backbone: in place of attention and MLP",
    paper="Yang et al., 2024, arXiv 2403.17695",
    repository="ChenhongyiYang/PlainMamba",
    mechanism=("transformation",),
    score="state space model along four winding paths",
    select="all tokens, in four orders",
    claim="Told the direction of every step, the scans can tell a neighbour on the left from one on the right.",
    departures=("steps, B and C follow the order of the scan too", "the bias of the steps is added once"),
)


@lru_cache(maxsize=32)
def serpentine_orders(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """``order``, ``inverse`` and ``direction``, (4, height * width) int64 each; not to be written to.

    ``order[o, t]``: the token, in raster order, that scan o visits at step t; ``inverse[o, i]``: when it visits token
    i; ``direction[o, t]``: how that token was entered, 0 start, 1 rightwards, 2 leftwards, 3 upwards, 4 downwards.
    Scans: rows from the top, the first one rightwards; that backwards; columns from the left, the first one downwards;
    that backwards.
    """
    tokens = torch.arange(height * width).view(height, width)
    rows, columns = tokens.clone(), tokens.T.clone()
    for grid in (rows, columns):
        grid[1::2] = grid[1::2].flip(1)
    paths = [rows.flatten(), rows.flatten().flip(0), columns.flatten(), columns.flatten().flip(0)]
    order = torch.stack(paths)
    down, right = (order // width).diff(dim=1), (order % width).diff(dim=1)
    moved = (right == 1) * 1 + (right == -1) * 2 + (down == -1) * 3 + (down == 1) * 4
    return order, order.argsort(1), pad(moved, (1, 0))


class PlainMamba2D(nn.Module):
    """(B, H * W, dim) to the same: convolution, four scans, gate. ``conv``: side of the convolution."""

    def __init__(
        self,
        dim: int,
        state: int = 16,
        conv: int = 7,
        expand: int = 2,
        bias: bool = True,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        if conv % 2 == 0:
            raise ValueError(f"conv: got {conv}, must be odd")
        if parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {parity!r}, must be 'paper' or 'authors'")
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.sizes, self.parity = (rank, state, state), parity
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv2d = nn.Conv2d(inner, inner, conv, padding=conv // 2, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state + 1.0).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.direction_Bs = nn.Parameter(nn.init.trunc_normal_(torch.empty(5, state), std=0.02))
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step_bias(inner))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if x.shape[1] != size[0] * size[1]:
            raise ValueError(f"size: got {size[0]} x {size[1]}, must have the {x.shape[1]} tokens of x")
        u, z = self.in_proj(x).chunk(2, 2)
        u = silu(self.conv2d(u.transpose(1, 2).unflatten(2, size)).flatten(2))
        dt, b, c = self.x_proj(u.transpose(1, 2)).split(self.sizes, 2)
        steps = (dt @ self.dt_proj.weight.T).transpose(1, 2)
        y = self.scan(u, steps, b.transpose(1, 2), c.transpose(1, 2), size)
        return self.out_proj(y.transpose(1, 2) * silu(z))

    def scan(self, u: Tensor, steps: Tensor, b: Tensor, c: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, inner, L), the sum of the scans of ``u`` (B, inner, L).

        ``steps`` (B, inner, L) without their bias, ``b`` and ``c`` (B, state, L), in raster order.
        """
        order, inverse, direction = (t.to(u.device) for t in serpentine_orders(*size))
        a, bias = -upcast(self.A_log).exp(), self.dt_proj.bias
        # All scans at once: they are short, and as many pictures more.
        four = [t.repeat_interleave(4, 0) for t in (u, steps, b, c)]
        visit, back, entered = (t.repeat(len(u), 1) for t in (order, inverse, direction))
        if self.parity == "authors":
            four[0] = four[0].gather(2, visit[:, None].expand_as(four[0]))
            written = four[2] + self.direction_Bs[entered].transpose(1, 2)
            y, _ = selective_scan(four[0], four[1], a, written, four[3], self.D, None, 2 * bias, True)
            y = y.gather(2, back[:, None].expand_as(y))
        else:
            written = four[2] + self.direction_Bs[entered.gather(1, back)].transpose(1, 2)
            y, _ = selective_scan(four[0], four[1], a, written, four[3], self.D, None, bias, True, order=visit)
        return y.unflatten(0, (-1, 4)).sum(1)


class PlainMambaLayer(nn.Module):
    """The operator behind a norm, added. ``convolved``: a 3x3 depthwise convolution, batch norm and GELU after it."""

    def __init__(self, dim: int, mixer: PlainMamba2D, drop_path: float = 0.0, convolved: bool = False) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(dim), mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.after = nn.Sequential(conv, nn.BatchNorm2d(dim), nn.GELU()) if convolved else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm(x), size))
        if self.after is None:
            return x
        return self.after(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)


class PatchEmbed(nn.Module):
    """Pictures (B, 3, H, W) to maps (B, dim, H / 16, W / 16) with positions learned on ``side`` x ``side``, resized.

    A 7x7 convolution by 2, ``convs`` of 3x3, one of 8x8 by 8; zeros at the right and at the bottom to whole patches.
    """

    def __init__(self, dim: int, convs: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(convs + 1):
            conv = nn.Conv2d(64, 64, 3, 1, 1, bias=False) if i else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            layers += [conv, nn.BatchNorm2d(64), nn.ReLU()]
        self.stem, self.projection = nn.Sequential(*layers), nn.Conv2d(64, dim, 8, 8)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim, side, side), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.projection(pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8)))
        place: Tensor = self.pos_embed
        if x.shape[2:] != place.shape[2:]:
            place = interpolate(place, x.shape[2:], mode="bicubic")
        return x + place


SIDE = 4
"""Of the grid of numbers in the claim."""


class Shifter(nn.Module):
    """What the claim trains: numbers (B, SIDE, SIDE) to the same. ``told``: whether it gets directions."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.inputs, self.mixer, self.outputs = nn.Linear(1, 8), PlainMamba2D(8, 8, 1), nn.Linear(8, 1)
        if not told:
            nn.init.zeros_(self.mixer.direction_Bs).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.outputs(self.mixer(self.inputs(x.flatten(1)[..., None]), (SIDE, SIDE)))
        return mixed.view_as(x)


SIZES = {"l1": (192, 24, 1, True), "l2": (384, 24, 2, False), "l3": (448, 36, 2, False)}
"""Channels, layers, 3x3 convolutions of the embedding, and whether the first layer has a convolution after it."""


@dataclass(frozen=True)
class PlainMamba:
    """The backbone."""

    size: str = "l1"
    """l1, l2 or l3."""
    image: int = 224
    """Side of the pictures of training."""
    state: int = 16
    """Numbers of the state for each channel."""
    conv: int = 7
    """Side of the operator's convolution."""
    drop_path: float = 0.2
    """Rate of stochastic depth of the last layer (of l1)."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": steps, B and C in raster order in every scan, and their bias twice, as in the released weights."""

    def build(self, num_classes: int = 1000, features_only: bool = False) -> Pyramid:
        """An untrained network; with ``features_only`` it gives four maps, a quarter of the layers apart."""
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be {', '.join(SIZES)}")
        return self.of(*SIZES[self.size], num_classes, features_only)

    def of(
        self,
        dim: int,
        depth: int,
        convs: int = 1,
        convolved: bool = False,
        num_classes: int = 1000,
        features_only: bool = False,
    ) -> Pyramid:
        """As ``build``, of any width and depth, a multiple of 4."""
        if depth % 4:
            raise ValueError(f"depth: got {depth}, must be a multiple of 4")
        stages = []
        for i, rates in enumerate(drop_rates(self.drop_path, [depth // 4] * 4)):
            embed = nn.Identity() if i else PatchEmbed(dim, convs, -(-self.image // 16))
            layers = [self._layer(dim, rate, convolved and not i and not j) for j, rate in enumerate(rates)]
            stages.append(TokenStage(embed, layers))
        return Pyramid(stages, [dim] * 4, [16] * 4, MapNorm(dim, eps=1e-6), num_classes, features_only)

    def _layer(self, dim: int, rate: float, convolved: bool) -> PlainMambaLayer:
        mixer = PlainMamba2D(dim, self.state, self.conv, parity=self.parity)
        return PlainMambaLayer(dim, mixer, rate, convolved)


def claim(trial: AttendTrial, steps: int = 600) -> Outcome:
    """Section 3: a state that is told directions knows how tokens lie in two dimensions.

    One operator without a convolution, with the vectors of the directions and with zeros in their place, learns to
    give for each of 4 x 4 random numbers the one on its left (0 in the first column). The figure is the squared error
    over that of giving 0, on numbers not seen. Holds if a tenth of it or more is gone.
    """
    found = []
    for told in (False, True):
        torch.manual_seed(trial.seed)
        model = Shifter(told)
        trial.fit(model, steps, loss=_missed, peak_lr=5e-2)
        with torch.no_grad():
            found.append(_missed(model, torch.Generator().manual_seed(trial.seed + 1), 512).item())
    blind, ours = (error / (1 - 1 / SIDE) for error in found)
    return Outcome("share of the error left, directions told", blind, ours, ours <= 0.9 * blind, f"{steps} steps each")


def _missed(model: nn.Module, rng: torch.Generator, count: int = 64) -> Tensor:
    x = torch.randn(count, SIDE, SIDE, generator=rng)
    return mse_loss(model(x), pad(x[:, :, :-1], (1, 0)))

"""Hita's parts: two books in one sequence, the causal decoder that is read early, and a model of the codes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vistok.core.visibility import carriers_first, shifted_readout
from vistok.parts.causal import CausalModel


class Stack(nn.Module):
    """A norm and pre-norm blocks with gated MLPs of 2/3 ``mlp`` hidden channels, rounded up to a multiple of 8."""

    def __init__(self, width: int, depth: int, heads: int, mlp: int, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = (int(mlp * 2 / 3) + 7) // 8 * 8
        ratio = (hidden + 0.5) / width  # the block rounds down
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                ratio,
                qkv_bias=True,
                attn_drop=dropout,
                mlp_layer=SwiGLU,
                act_layer=nn.SiLU,
                norm_layer=nn.LayerNorm,
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, attn_mask=mask, is_causal=causal)
        return x


class FusionDecoder(nn.Module):
    """Carriers (B, C, width) and patches (B, side^2, width) to the map's slots (B, side^2, width), causal and early.

    ``semantic``: channels of a vision model's features that the carriers alone give back; 0: none.
    """

    def __init__(self, carriers: int, side: int, shift: int, width: int, semantic: int = 0, **stack: Any) -> None:
        super().__init__()
        if not 0 <= shift <= carriers:
            raise ValueError(f"shift: got {shift}, must be between 0 and the {carriers} carriers")
        self.carriers, self.side, self.shift = carriers, side, shift
        self.positions = nn.Parameter(width**-0.5 * torch.randn(1, side**2, width))
        self.carrier_positions = nn.Parameter(width**-0.5 * torch.randn(1, carriers, width))
        self.stack = Stack(width, **stack)
        if semantic:
            self.mask_token = nn.Parameter(width**-0.5 * torch.randn(1, 1, width))
            self.norm_semantic, self.semantic = nn.LayerNorm(width), nn.Linear(width, semantic)

    def forward(self, carriers: Tensor, patches: Tensor) -> Tensor:
        x = torch.cat([carriers + self.carrier_positions, patches + self.positions], 1)
        return shifted_readout(self.stack(x, causal=True), self.carriers, self.shift)

    def features(self, carriers: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, rows * columns, semantic): what a vision model with patches on ``grid`` would see."""
        places = self.positions.transpose(1, 2).unflatten(2, (self.side, self.side))
        places = interpolate(places, grid, mode="bicubic").flatten(2).transpose(1, 2)
        hidden = (self.mask_token + places).expand(len(carriers), -1, -1)
        seen = carriers_first(self.carriers, hidden.shape[1], "full").to(carriers.device)
        x = self.stack(self.norm_semantic(torch.cat([carriers, hidden], 1)), seen)
        return self.semantic(x[:, self.carriers :])


class HolisticGenerator(CausalModel):
    """A causal model of [carriers | patches] whose input has a table for each kind; ``first``: which is read first.

    The generator of the paper besides gives positions of patches in two directions.
    """

    def __init__(
        self, codes: int, carriers: int, tokens: int, first: Literal["carriers", "patches"] = "carriers", **how: Any
    ) -> None:
        super().__init__(codes, tokens, **how)
        self.embed = nn.Embedding(2 * codes, self.embed.embedding_dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        order = torch.arange(tokens)
        order = order if first == "carriers" else order.roll(-carriers)
        self.register_buffer("order", order)
        self.register_buffer("offset", codes * (order >= carriers))

    def forward(self, before: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(before + self.get_buffer("offset")[: before.shape[1]], label)

    def nats(self, ids: Tensor, label: Tensor | None = None) -> Tensor:
        return super().nats(ids[:, self.get_buffer("order")], label)

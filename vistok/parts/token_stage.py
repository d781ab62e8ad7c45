"""A stage of a backbone whose blocks work on tokens: from a map to tokens, and back to a map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class TokenStage(nn.Module):
    """A map (B, C, H, W) through ``embed``, which may make it smaller, then as tokens through ``blocks``; a map again.

    Each block gets tokens (B, H * W, C) and the size (H, W). ``norm``: of the tokens that the last one gives.
    """

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.embed, self.blocks = embed, nn.ModuleList(blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        size = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, size)
        return self.norm(x).transpose(1, 2).unflatten(2, size)

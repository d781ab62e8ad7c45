"""A frozen vision transformer as the encoder or the teacher of a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class FrozenVision(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] of any size to the patch features (B, N, D) of a timm vision transformer.

    The model is in evaluation mode and stays there, and its weights do not learn; gradients reach the pictures.
    Pictures are resized (bicubic) to its input size and normalised as its ``pretrained_cfg`` says. ``prefix``: with
    its class token (and registers) in front.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, prefix: bool = False) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.prefix = prefix
        told = model.pretrained_cfg
        self.size: tuple[int, int] = tuple(told["input_size"][1:])
        self.register_buffer("mean", torch.tensor(told["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(told["std"]).view(3, 1, 1), persistent=False)

    @property
    def dim(self) -> int:
        """Channels of a feature."""
        return int(self.model.num_features)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        rows, columns = self.model.patch_embed.grid_size
        return rows, columns

    def forward(self, images: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        x = images.float()
        if x.shape[2:] != self.size:
            x = interpolate(x, self.size, mode="bicubic", antialias=True)
        found = self.model.forward_features(((x - self.mean) / self.std).to(dtype))
        return found if self.prefix else found[:, self.model.num_prefix_tokens :]

    def train(self, mode: bool = True) -> FrozenVision:
        """Stays in evaluation mode."""
        return super().train(False)

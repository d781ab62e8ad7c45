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
        # Saved with the weights, which are of no use under another normalisation.
        self.register_buffer("mean", torch.tensor(told["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(told["std"]).view(3, 1, 1))

    @classmethod
    def of(cls, name: str, *, prefix: bool = False, pretrained: bool = False, **arguments: Any) -> FrozenVision:
        """timm's model ``name`` without its head, made with ``arguments`` (``img_size=32``, ``depth=2``, ...).

        Its weights are random unless ``pretrained``; a tokenizer's folder brings its own. A recipe keeps ``name`` and
        ``arguments`` as hyper-parameters and registers what it builds, so that its weights are saved and loaded with
        the rest. Raises ValueError for a name that timm does not know, or that is no vision transformer.
        """
        import timm

        if not timm.is_model(name):
            near = timm.list_models(f"*{name.partition('_')[0]}*")[:3]
            raise ValueError(f"name: got {name!r}, must be a model of timm" + f", e.g. {', '.join(near)}" * bool(near))
        model = timm.create_model(name, pretrained=pretrained, **{"num_classes": 0, **arguments})
        if not hasattr(model, "num_prefix_tokens"):
            raise ValueError(f"name: got {name!r}, must be a vision transformer: it has no patch tokens")
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, *model.patch_embed.img_size)}
        return cls(model, prefix)

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

"""Pictures of objects for claims that go through the same ones many times, in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vistok.world import derive_seed, make_object

DRAWN = 64
"""Side at which they are drawn, the smallest that the world draws."""


def objects(split: str, n: int, size: int) -> tuple[Tensor, Tensor]:
    """The first ``n`` pictures of a split ("train" or "test"), (n, 3, size, size) in [0, 1], and their labels (n,)."""
    drawn = [make_object(derive_seed(0, i, split), DRAWN) for i in range(n)]
    images = torch.stack([torch.from_numpy(picture.image) for picture in drawn]).permute(0, 3, 1, 2).float() / 255
    labels = torch.tensor([picture.things[0].attributes["label"] for picture in drawn])
    return adaptive_avg_pool2d(images, size), labels

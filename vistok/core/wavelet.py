"""Haar wavelets of pictures: half as many places, four times the channels, nothing lost."""

from __future__ import annotations

import torch
from torch import Tensor


def haar(x: Tensor, times: int = 1) -> Tensor:
    """(B, C, H, W) to (B, 4^times C, H / 2^times, W / 2^times): means, then differences down, across, and both.

    Of each 2 x 2 places: a quarter of their sum with signs (+ + / + +), (+ + / - -), (+ - / + -), (+ - / - +); all
    channels of one sign pattern stand together. Applied again to all channels. ValueError where sides are not even.
    """
    for _ in range(times):
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x: got {x.shape[2]} x {x.shape[3]}, must be even for every one of {times} times")
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        x = torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 1) / 4
    return x


def inverse_haar(x: Tensor, times: int = 1) -> Tensor:
    """What ``haar`` made of a picture, back to it: (B, 4^times C, h, w) to (B, C, 2^times h, 2^times w)."""
    for _ in range(times):
        if x.shape[1] % 4:
            raise ValueError(f"x: got {x.shape[1]} channels, must be a multiple of {4**times}")
        m, v, h, d = x.chunk(4, 1)
        top = torch.stack([m + v + h + d, m + v - h - d], -1).flatten(-2)
        bottom = torch.stack([m - v + h - d, m - v - h + d], -1).flatten(-2)
        x = torch.stack([top, bottom], -2).flatten(2, 3)
    return x

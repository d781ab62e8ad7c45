"""Pictures stored as ids: what that saves, and augmentations that work on codes (SeiT++)."""

from __future__ import annotations

import io
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vistok.core.codes import bits_of
from vistok.core.quantize import count_ids
from vistok.core.statistics import huffman_bits
from vistok.core.token_maps import augmented, patched, unpatched


class TokenStore:
    """Ids (N, h, w) of pictures, held in as few bytes as whole bytes allow."""

    def __init__(self, ids: Tensor, size: int) -> None:
        if ids.dim() != 3 or not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(f"ids: got {tuple(ids.shape)}, must be (N, h, w) and in 0 .. {size - 1}")
        self.size = size
        self.ids = ids.to(torch.uint8 if size <= 2**8 else torch.int16 if size <= 2**15 else torch.int32)

    def crop(self, which: Tensor, side: int, generator: torch.Generator | None = None) -> Tensor:
        """(B, side, side) int64: pictures ``which`` (B,), each cut at a place of its own."""
        h, w = self.ids.shape[1:]
        if side > min(h, w):
            raise ValueError(f"side: got {side}, must be at most {min(h, w)}")
        top, left = (torch.randint(most - side + 1, (len(which), 1), generator=generator) for most in (h, w))
        line = torch.arange(side)
        return self.ids[which[:, None, None], (top + line)[:, :, None], (left + line)[:, None]].long()

    def bytes_per_picture(self, coded: bool = True) -> float:
        """Mean bytes of a picture's ids: in whole bits, or with a Huffman code of the whole store (its table not)."""
        counts = count_ids(self.ids.long(), self.size)
        return self.ids[0].numel() * (huffman_bits(counts) if coded else bits_of(self.size)) / 8


def jpeg_bytes(images: Tensor, quality: int = 75) -> float:
    """Mean bytes of pictures (B, 3, H, W) in [0, 1] as JPEG files."""
    from PIL import Image

    total = 0
    for one in (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(one).save(file, format="JPEG", quality=quality)
        total += file.tell()
    return total / len(images)


def token_blocks(width: int, depth: int, heads: int) -> nn.Sequential:
    """Transformer blocks and a norm at the end."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    return nn.Sequential(*(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)), norm(width))


class TokenAdapt(nn.Module):
    """Augmentations of pictures for codes: conversion to a map of twice the side, an affine map of it, inversion."""

    def __init__(self, size: int, dim: int, width: int = 384, heads: int = 6) -> None:
        super().__init__()
        self.into, self.up = nn.Linear(dim, width), nn.Linear(width, 4 * dim)
        self.conversion, self.inversion = token_blocks(width, 1, heads), token_blocks(width, 1, heads)
        self.down, self.head = nn.Linear(4 * dim, width), nn.Linear(width, size)

    def convert(self, codes: Tensor) -> Tensor:
        """(B, D, 2 h, 2 w) of codes (B, D, h, w), h = w."""
        x = self.up(self.conversion(self.into(codes.flatten(2).transpose(1, 2))))
        return unpatched(x.unflatten(2, (4, -1)), 2 * codes.shape[2]).movedim(-1, 1)

    def invert(self, maps: Tensor) -> Tensor:
        """(B, K, h, w) logits of ids, of maps (B, D, 2 h, 2 w)."""
        x = self.head(self.inversion(self.down(patched(maps.movedim(1, -1)).flatten(2))))
        return x.transpose(1, 2).unflatten(2, (maps.shape[2] // 2, -1))

    def forward(self, codes: Tensor, affine: Tensor, side: int) -> Tensor:
        """(B, K, side, side) logits of the ids of the augmented picture; their ``argmax(1)`` are its ids."""
        return self.invert(augmented(self.convert(codes), affine, 2 * side))

    def loss(self, codes: Tensor, affine: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy to ``target`` (B, side, side): the tokenizer's ids of the picture under the same ``affine``."""
        return cross_entropy(self(codes, affine, target.shape[1]), target)

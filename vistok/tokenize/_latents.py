"""TiTok's networks, and One-D-Piece's: patches to a few latent tokens, latent tokens to patches, patches to pixels."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

SIZES = {"T": (96, 4, 3), "S": (512, 8, 8), "B": (768, 12, 12), "L": (1024, 24, 16)}
"""Width, blocks and heads of each of the two networks; T is this project's."""


class LatentEncoder(nn.Module):
    """Pictures (B, 3, H, W) to (B, ``tokens``, ``dim``): K learned tokens read the patches through a plain ViT.

    Sequence [class | patches | latents], each with its own positions; the latents' outputs are kept. ``legacy``: the
    published networks reshape (K, width) to (width, K) without a transpose, so that each token mixes all slots.
    """

    def __init__(
        self, image: int, patch: int, width: int, depth: int, heads: int, tokens: int, dim: int, legacy: bool = False
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"patch: got {patch}, must divide image, {image}")
        if width % heads:
            raise ValueError(f"heads: got {heads}, must divide width, {width}")
        self.legacy = legacy
        scale = width**-0.5
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(scale * torch.randn(1, width))
        self.positions = nn.Parameter(scale * torch.randn(1 + (image // patch) ** 2, width))
        self.latents = nn.Parameter(scale * torch.randn(tokens, width))
        self.latent_positions = nn.Parameter(scale * torch.randn(tokens, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = _blocks(width, depth, heads)
        self.out = nn.Linear(width, dim)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        b, k = len(patches), len(self.latents)
        x = torch.cat([self.class_token.expand(b, 1, -1), patches], 1) + self.positions
        x = self.norm_in(torch.cat([x, (self.latents + self.latent_positions).expand(b, -1, -1)], 1))
        for block in self.blocks:
            x = block(x)
        x = self.norm_out(x[:, -k:])
        if self.legacy:
            x = x.reshape(b, -1, k).transpose(1, 2)
        return self.out(x)


class MaskDecoder(nn.Module):
    """(B, K, ``dim``) to a map of patches (B, width, h, w): copies of one mask token read the latents.

    Sequence [class | mask tokens | latents]; K may be any number up to ``tokens``. ``mask`` (B, K) bool hides keys,
    which is the same as cutting them off.
    """

    def __init__(self, side: int, width: int, depth: int, heads: int, tokens: int, dim: int) -> None:
        super().__init__()
        scale = width**-0.5
        self.side = side
        self.embed = nn.Linear(dim, width)
        self.class_token = nn.Parameter(scale * torch.randn(1, width))
        self.mask_token = nn.Parameter(scale * torch.randn(1, 1, width))
        self.positions = nn.Parameter(scale * torch.randn(1 + side**2, width))
        self.latent_positions = nn.Parameter(scale * torch.randn(tokens, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = _blocks(width, depth, heads)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(z)
        b, k = x.shape[:2]
        own = torch.cat([self.class_token.expand(b, 1, -1), self.mask_token.expand(b, self.side**2, -1)], 1)
        x = self.norm_in(torch.cat([own + self.positions, x + self.latent_positions[:k]], 1))
        seen = None
        if mask is not None:
            seen = torch.cat([mask.new_ones(b, own.shape[1]), mask], 1)[:, None, None]
        for block in self.blocks:
            x = block(x, attn_mask=seen)
        x = self.norm_out(x[:, 1 : own.shape[1]])
        return x.transpose(1, 2).unflatten(2, (self.side, self.side))


def _blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    norm = partial(nn.LayerNorm, eps=1e-5)
    return nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth))


class RGBHead(nn.Module):
    """A map of patches (B, width, h, w) to pixels, channels of a patch in the order (row, column, colour)."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.add_module("0", nn.Conv2d(width, 3 * patch**2, 1))
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("0")(x)
        x = x.unflatten(1, (self.patch**2, 3)).transpose(1, 2).flatten(1, 2)
        return self.smooth(pixel_shuffle(x, self.patch))


def proxy_head(width: int, codes: int) -> nn.Sequential:
    """A map of patches to logits of the proxy's ids."""
    return nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, codes, 1))


_NAMES = {
    "class_embedding": "class_token",
    "latent_token_positional_embedding": "latent_positions",
    "positional_embedding": "positions",
    "ln_pre.": "norm_in.",
    "ln_post.": "norm_out.",
    "decoder_embed.": "embed.",
    "transformer.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of 1d-tokenizer's TiTok or of One-D-Piece under our names (repository bytedance/1d-tokenizer)."""
    found = {}
    for key, value in state.items():
        if key == "latent_tokens":
            key = "encoder.latents"
        elif key == "quantize.embedding.weight":
            key = "bottleneck.codebook"
        elif key.startswith("encoder.conv_out."):
            key, value = key.replace("conv_out", "out"), value.flatten(1) if value.dim() > 1 else value
        elif key.startswith("decoder.ffn.") or key.startswith("decoder.conv_out."):
            key = key.replace("decoder.ffn.", "head.").replace("decoder.conv_out.", "head.smooth.")
        else:
            for theirs, ours in _NAMES.items():
                key = key.replace(theirs, ours)
        found[key] = value
    return found

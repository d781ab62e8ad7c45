"""TiTok: a picture as few tokens without a grid, which learned latents read from the patches.

What: K learned latents join the patches in a ViT and are all that is kept; quantised on the sphere; a second ViT draws
the picture from them with one mask token a patch. Source: Yu et al., arXiv 2406.07550; bytedance/1d-tokenizer.

Training in one stage, the repository's later variant, is on pixels. In two (``build(proxy)``) the decoder first learns
the ids of a frozen tokenizer with a grid (``proxy_loss``); then that tokenizer's decoder is trained on the expected
codes (``begin_second_stage``), which needs no choice and so has a gradient. The generator's masks and sampler are
``vistok.core.masked``.

Defect of the released code: the encoder reshapes (K, width) to (width, K) without a transpose, so that a token mixes
slices of all slots. Published VQ weights need it (``parity="authors"``); the default transposes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes
from vistok.parts.quantize import TableQuantizer, VectorQuantizer
from vistok.parts.tokenizer import Tokenizer
from vistok.tokenize._latents import SIZES, LatentEncoder, MaskDecoder, RGBHead, proxy_head, renamed
from vistok.tokenize.vq_grid import VQGrid

CARD = Card(
    title="An Image is Worth 32 Tokens for Reconstruction and Generation",
    kind="trained",
    site="pixels to K discrete tokens without a grid, and back",
    paper="Yu et al., 2024, arXiv 2406.07550",
    repository="bytedance/1d-tokenizer",
    mechanism=("transformation",),
    merge="learned latents that read the patches by attention",
    claim="Tokens without a grid reconstruct better than as many tokens of a grid.",
    departures=("the released encoder reshapes its latents without a transpose, mixing the slots",),
)


class TiTokNetwork(Tokenizer):
    """The tokenizer. ``proxy`` is the frozen tokenizer whose ids the decoder predicts, None for pixels."""

    def __init__(
        self,
        image: int = 256,
        patch: int = 16,
        width: int = 512,
        depth: int = 8,
        heads: int = 8,
        tokens: int = 32,
        codes: int = 4096,
        dim: int = 12,
        legacy: bool = False,
        proxy: Tokenizer | None = None,
        **quantizer: Any,
    ) -> None:
        super().__init__()
        self.image, self._tokens = image, tokens
        self.encoder = LatentEncoder(image, patch, width, depth, heads, tokens, dim, legacy)
        self.bottleneck: VectorQuantizer = VectorQuantizer(codes, dim, norm="both", **quantizer)
        self.decoder = MaskDecoder(image // patch, width, depth, heads, tokens, dim)
        self.proxy = None if proxy is None else copy.deepcopy(proxy).eval().requires_grad_(False)
        self.head: nn.Module
        if self.proxy is None:
            self.head = RGBHead(width, patch)
        else:
            if self.proxy.grid != (image // patch,) * 2 or not isinstance(self.proxy.bottleneck, TableQuantizer):
                raise ValueError(f"proxy: must have one table and a grid of {image // patch} x {image // patch} tokens")
            self.head = proxy_head(width, self.proxy.bottleneck.sizes[0])

    @property
    def tokens(self) -> int:
        return self._tokens

    def latents(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, K', h, w): of the proxy's ids at each place; or the pixels, without a proxy."""
        return self.head(self.decoder(z, mask))

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        made = self.logits(z, mask)
        if self.proxy is None:
            return made
        table: Any = self.proxy.bottleneck
        expected = table.soft(made.flatten(2).transpose(1, 2))
        return self.proxy.render(expected.to(self.dtype))

    def kept(self, codes: Codes) -> Codes:
        """What training shows the decoder of ``codes``: all."""
        return codes

    def forward(self, images: Tensor) -> tuple[Tensor, Codes]:
        codes = self.encode(images)
        return self.render_codes(self.kept(codes) if self.training else codes), codes

    def proxy_loss(self, images: Tensor) -> Tensor:
        """First stage: cross-entropy of the proxy's ids for the same pictures, and the bottleneck's losses."""
        if self.proxy is None:
            raise ValueError("proxy: got None, must be a tokenizer with a grid: build(proxy)")
        with torch.no_grad():
            target = self.proxy.eval().encode(images).ids
        assert target is not None
        codes = self.encode(images)
        shown = self.kept(codes) if self.training else codes
        assert shown.z is not None
        logits = self.logits(shown.z.to(self.dtype), shown.mask).flatten(2)
        return cross_entropy(logits.float(), target) + codes.loss

    def begin_second_stage(self) -> None:
        """Freeze encoder, latents and codebook; the decoder, and the proxy's own decoder, learn from pixels."""
        self.encoder.requires_grad_(False)
        self.bottleneck.requires_grad_(False).eval()
        if self.proxy is not None:
            self.proxy.requires_grad_(True).bottleneck.requires_grad_(False)

    def train(self, mode: bool = True) -> TiTokNetwork:
        """A frozen codebook stays as it is: no restarts in the second stage."""
        super().train(mode)
        if mode and not any(p.requires_grad for p in self.bottleneck.parameters()):
            self.bottleneck.eval()
        if self.proxy is not None:
            self.proxy.eval()
        return self

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Weights under the names of 1d-tokenizer (or One-D-Piece); those of its pixel decoder are not read."""
        own = {k: v for k, v in renamed(state).items() if not k.startswith(("pixel_decoder.", "pixel_quantize."))}
        table = own.pop("bottleneck.codebook", None)
        missing, unexpected = self.load_state_dict(own, strict=False)
        lacks = [key for key in missing if not key.startswith(("proxy.", "bottleneck."))]
        if lacks or unexpected or table is None:
            lacks += [] if table is not None else ["bottleneck.codebook"]
            raise ValueError(f"state: lacks {lacks}, has besides {unexpected}; must be of this size and head")
        self.bottleneck.fill(table)


@dataclass(frozen=True)
class TiTok:
    """A tokenizer by its size."""

    size: Literal["T", "S", "B", "L"] = "S"
    """Width, blocks and heads of encoder and decoder: see ``vistok.tokenize._latents.SIZES``."""
    tokens: int = 128
    """How many tokens a picture has."""
    image: int = 256
    """Side of a picture in pixels."""
    patch: int = 16
    """Side of a patch in pixels."""
    codes: int = 4096
    """Codes of the codebook."""
    dim: int = 12
    """Channels of a code."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""
    parity: Literal["paper", "authors"] = "paper"
    """ "authors": the released encoder, whose tokens mix all slots."""

    def build(self, proxy: Tokenizer | None = None) -> TiTokNetwork:
        """An untrained tokenizer; with ``proxy``, a trained one with a grid, for training in two stages."""
        made = TiTokNetwork(proxy=proxy, **self.shape())
        made.recipe = self
        return made

    def shape(self) -> dict[str, Any]:
        """Arguments of the network. Raises ValueError for an unknown size."""
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be one of {', '.join(SIZES)}")
        width, depth, heads = SIZES[self.size]
        return dict(
            image=self.image,
            patch=self.patch,
            width=width,
            depth=depth,
            heads=heads,
            tokens=self.tokens,
            codes=self.codes,
            dim=self.dim,
            legacy=self.parity == "authors",
            restart_after=self.restart_after,
        )


def claim(trial: TokenizeTrial, steps: int = 300) -> Outcome:
    """PSNR on held-out pictures, of 16 tokens of a grid and of as many without one, networks of one size.

    Both are trained for ``steps`` steps with 512 codes. Holds if the tokens without a grid are better by 0.2 dB.
    """
    grid, tokens = (
        VQGrid("T", trial.size, trial.size // 4, 512, 8, 20),
        TiTok("T", 16, trial.size, trial.size // 8, 512, 8, 20),
    )
    found = []
    for recipe in (grid, tokens):
        torch.manual_seed(trial.seed)
        model = recipe.build()
        trial.fit(model, steps)
        found.append(trial.psnr(model))
    return Outcome("PSNR of 16 tokens, dB", found[0], found[1], found[1] >= found[0] + 0.2)

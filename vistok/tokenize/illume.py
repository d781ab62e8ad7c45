"""ILLUME: codes of what a picture means, learned from features, and with its successor codes of how it looks.

What: the features of a frozen vision transformer become a few codes, from which the features are learned again, not
the pixels (ILLUME). In the successor's DualViTok a convolutional branch adds codes of the pixels; the pixel decoder
reads both maps side by side and is modulated by them once more in all its norms. Both tables are SimVQ: frozen codes
times a linear map that learns. Source: Wang et al., arXiv 2412.06673, and Huang et al., arXiv 2504.01934;
illume-unified-mllm/ILLUME_plus (the second alone has been released).

Self-enhancement: the language model writes an assessment of a picture that it drew itself; ``assessed`` lays out such
a sample, with the loss on the answer alone. ILLUME draws from the features by a fine-tuned Stable Diffusion model; here
``features`` is the interface to one, and none is loaded.

Departures: the features that are given back are those that come in, averaged over ``merge`` x ``merge`` patches, where
the released targets are Qwen2-VL's after its projector; timm lacks that encoder, so that another of as many channels
stands in its place. Pixels send no gradient to the semantic side (of ILLUME it is stated, of DualViTok unknown). The
share of places under noise is unknown. Perceptual and adversarial losses are the trainer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes
from vistok.core.losses import distillation, pixel
from vistok.parts.conv import ConvDecoder, ConvEncoder
from vistok.parts.quantize import SimVQuantizer, Stretches
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision
from vistok.parts.visual_vocabulary import Piece, VisualVocabulary
from vistok.tokenize._dual import OneCodebook, Transformer, compared, laid, rows

CARD = Card(
    title="ILLUME: Illuminating Your LLMs to See, Draw, and Self-Enhance",
    kind="trained",
    site="features and pixels to semantic, then pixel tokens, and back; a language model's vocabulary",
    paper="Wang et al., 2024, arXiv 2412.06673",
    repository="illume-unified-mllm/ILLUME_plus",
    needs=("features of a frozen vision transformer",),
    mechanism=("transformation",),
    merge="mean over square blocks of patches",
    claim="Semantic beside pixel codes tell more of what a picture shows than one book of as many bits for both.",
)


class IllumeNetwork(Tokenizer):
    """The tokenizer; its tokens are the semantic ones, row after row, then the pixel ones."""

    bottleneck: Stretches

    def __init__(self, recipe: Illume, vision: FrozenVision) -> None:
        super().__init__()
        self.recipe, self.image, self.vision = recipe, recipe.image, vision
        dim, depth, heads = recipe.dim, recipe.depth, max(1, vision.dim // 64)
        if vision.grid[0] % recipe.merge or vision.grid[1] % recipe.merge:
            raise ValueError(f"merge: got {recipe.merge}, must divide the grid of the vision model, {vision.grid}")
        self.places = (vision.grid[0] // recipe.merge, vision.grid[1] // recipe.merge)
        count = self.places[0] * self.places[1]
        self.semantic_encoder = Transformer(vision.dim, vision.dim, dim, count, depth, heads)
        self.semantic_decoder = Transformer(dim, vision.dim, vision.dim, count, depth, heads)
        self.encoder = ConvEncoder(dim, recipe.width, recipe.mults, recipe.blocks)
        self.side = recipe.image // self.encoder.factor
        books = [SimVQuantizer(n, dim, gradient=recipe.gradient) for n in (recipe.semantic_codes, recipe.pixel_codes)]
        self.bottleneck = Stretches(books, (count, self.side**2))
        self.decoder = ConvDecoder(2 * dim, recipe.decoder_width, recipe.mults, recipe.blocks, norm="spatial")

    @property
    def tokens(self) -> int:
        return sum(self.bottleneck.lengths)

    def target(self, images: Tensor) -> Tensor:
        """(B, M, D): the frozen features that the semantic codes stand for."""
        return rows(avg_pool2d(laid(self.vision(images), self.vision.grid), self.recipe.merge))

    def latents(self, images: Tensor) -> Tensor:
        return self.joined(images, self.target(images))

    def joined(self, images: Tensor, features: Tensor) -> Tensor:
        """(B, M + P, dim): the latents of ``images`` with their ``features``."""
        meaning = self.semantic_encoder(features.to(self.dtype))
        return torch.cat([meaning, rows(self.encoder(2 * images.to(self.dtype) - 1))], 1)

    def semantic(self, z: Tensor) -> Tensor:
        """(B, M, dim): the semantic tokens of codes ``z``."""
        return z[:, : self.bottleneck.lengths[0]]

    def detail(self, z: Tensor) -> Tensor:
        """(B, P, dim): the pixel tokens of codes ``z``."""
        return z[:, self.bottleneck.lengths[0] :]

    def features(self, z: Tensor) -> Tensor:
        """(B, M, D): features of codes ``z``, what a diffusion model would be told."""
        return self.semantic_decoder(self.semantic(z).to(self.dtype))

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        size = (self.side, self.side)
        meaning = laid(self.semantic(z).detach(), self.places).float()
        meaning = interpolate(meaning, size, mode="bicubic").to(z.dtype)
        return (self.decoder(torch.cat([meaning, laid(self.detail(z), size)], 1)) + 1) / 2

    def noisy(self, z: Tensor) -> Tensor:
        """Codes ``z`` (B, N, dim) with pixel tokens of some pictures lost, or those of the picture before.

        Which ones is drawn from torch's random state.
        """
        fine, b = self.detail(z), len(z)
        some = torch.rand(b, 1, 1, device=z.device) < self.recipe.noise_rate
        hit = some & (torch.rand(b, fine.shape[1], 1, device=z.device) < self.recipe.noise_share)
        lost = torch.rand(b, 1, 1, device=z.device) < 0.5
        other = torch.where(lost, torch.zeros_like(fine), fine.roll(1, 0))
        return torch.cat([self.semantic(z), torch.where(hit, other, fine)], 1)

    def render_codes(self, codes: Codes) -> Tensor:
        """``render``, in training of codes under noise."""
        assert codes.z is not None
        return self.render((self.noisy(codes.z) if self.training else codes.z).to(self.dtype))

    def objective(self, images: Tensor) -> Tensor:
        """Squared error of pixels, 1 - cosine of features, and the books' losses."""
        wanted = self.target(images)
        codes = self.bottleneck(self.joined(images, wanted))
        assert codes.z is not None
        return pixel(self.render_codes(codes), images) + distillation(self.features(codes.z), wanted) + codes.loss

    def vocabulary(self, text: int) -> VisualVocabulary:
        """Ids of a language model of ``text`` ids with the codes behind them: its pictures are semantic, then pixel."""
        books = (self.recipe.semantic_codes, self.recipe.pixel_codes)
        return VisualVocabulary(text, tuple(zip(books, self.bottleneck.lengths, strict=True)))


def assessed(prompt: Tensor, picture: Tensor, verdict: Tensor, analysis: Tensor) -> list[Piece]:
    """A sample of self-assessment: does ``picture`` show what ``prompt`` asks for? Ids (L,) int64 each.

    The model reads prompt and picture (``VisualVocabulary.wrap``), and learns to write the verdict and its reasons.
    """
    return [Piece(prompt, False), Piece(picture, False), Piece(verdict), Piece(analysis)]


@dataclass(frozen=True)
class Illume:
    """A tokenizer by its sizes."""

    image: int = 256
    """Side of a picture in pixels."""
    vision: str = "vit_huge_patch14_clip_224"
    """The frozen vision transformer, by its name in timm."""
    vision_arguments: dict[str, Any] | None = None
    """What timm is told besides, e.g. {"img_size": 32}."""
    merge: int = 2
    """Rows and columns of patches that become one semantic token."""
    semantic_codes: int = 32768
    """Codes of the semantic book."""
    pixel_codes: int = 98304
    """Codes of the pixel book."""
    dim: int = 32
    """Channels of a code."""
    depth: int = 4
    """Blocks before and behind the semantic book."""
    gradient: Literal["straight-through", "rotation"] = "straight-through"
    """How the gradient passes the books; the released class has "rotation", its configurations switch it off."""
    width: int = 128
    """Channels of the convolutional encoder at full resolution."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Times as many at each level, in the decoder too."""
    blocks: int = 2
    """Residual blocks of a level of the encoder."""
    decoder_width: int = 384
    """Channels of the pixel decoder at full resolution."""
    noise_rate: float = 0.1
    """Share of the pictures of a training step whose pixel tokens are disturbed."""
    noise_share: float = 0.5
    """Share of their places."""

    def build(self, vision: FrozenVision | None = None) -> IllumeNetwork:
        """An untrained tokenizer; ``vision`` in place of the named one. ValueError for a merge that does not fit."""
        return IllumeNetwork(self, vision or FrozenVision.of(self.vision, **self.vision_arguments or {}))


def claim(trial: TokenizeTrial, steps: int = 100, codes: int = 64) -> Outcome:
    """Objects read out of the semantic tokens, against one book of no fewer bits for both (see ``compared``).

    On the zoo's vision transformer: 36 semantic and 64 pixel tokens of 6 bits, and 64 tokens of 10 bits of one SimVQ of
    twice the channels on the convolutional map, from which the same features are learned.
    """
    vision = trial.vision()
    recipe = Illume(trial.size, "", None, 2, codes, codes, 16, 1, "straight-through", 16, (1, 2, 4), 1, 16)

    def one() -> OneCodebook:
        encoder = ConvEncoder(32, 16, recipe.mults, 1)
        places, book = (trial.size // encoder.factor) ** 2, SimVQuantizer(codes * 16, 32)
        reader, decoder = Transformer(32, 96, 96, places, 1, 1), ConvDecoder(32, 16, recipe.mults, 1, norm="spatial")
        return OneCodebook(trial.size, encoder, book, decoder, reader, recipe.build(vision).target)

    return compared(trial, one, lambda: recipe.build(vision), steps)

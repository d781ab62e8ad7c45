"""ViLex: a picture as a few words that no dictionary has, which a frozen text-to-image model reads.

What: queries pool the patches of a vision transformer into up to 75 vectors in the space of word embeddings, before the
text encoder; alone or in front of words they are a prompt of the frozen model, whose ordinary denoising loss on the
same picture teaches the vision transformer and the pooler, and nothing else. In training each picture keeps its first
k words only, k uniform (TailDrop), so that the first hold the most and any number may be used. Source: Wang et al.,
arXiv 2412.06774; no code was released.

The text-to-image model is given (``build(painter=...)``): word embeddings, a causal text encoder and a small flow model
(``_text_to_image``), learned from captions before. Without one, a new one learns together with the words. BOS stands
before the words and EOS behind them, at the end of what is there. Their length begins as that of the word embeddings.
Loading a large text-to-image model is not here. Sizes and schedule are unverified.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes
from vistok.core.drop import draw_lengths
from vistok.core.flow import NOISE_FIRST, Velocity, cfg, guided
from vistok.parts.flow_decoder import FlowTokenizer
from vistok.parts.quantize import Identity
from vistok.parts.query_transformer import QueryTransformer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._text_to_image import TextToImage

CARD = Card(
    title="Visual Lexicon: Rich Image Features in Language Space",
    kind="trained",
    site="pixels to up to 75 vectors among the word embeddings of a frozen text-to-image model",
    paper="Wang et al., 2024, arXiv 2412.06774",
    mechanism=("transformation",),
    merge="learned queries that read the patches by attention",
    select="the first k words, k a choice at decoding",
    claim="Drawing errs less the more words are read, and with few words less than without TailDrop.",
)


class ViLexNetwork(FlowTokenizer):
    """The tokenizer; ``painter`` is frozen where ``learns`` is False."""

    flow = NOISE_FIRST
    flexible = True

    def __init__(self, recipe: ViLex, vision: FrozenVision, painter: TextToImage, learns: bool) -> None:
        super().__init__(recipe.image, recipe.patch, recipe.seed)
        width, pooler, tokens = painter.words.embedding_dim, recipe.pooler, recipe.tokens
        if painter.places < tokens + 2:
            raise ValueError(f"painter: has {painter.places} places, must have {tokens + 2} for {tokens} words")
        self.recipe, self.tail_drop, self.steps = recipe, recipe.tail_drop, recipe.steps
        # Fine-tuned, as in the paper; it stays in evaluation mode, in which it drops nothing.
        self.vision = vision.requires_grad_(True)
        self.pooler = QueryTransformer(*pooler, vision.dim, tokens)
        self.out = nn.Linear(pooler[0], width)
        self.bottleneck = Identity(width)
        self.painter = painter.requires_grad_(learns)
        with torch.no_grad():
            # Words are short vectors: longer ones would saturate the text encoder.
            self.out.weight.mul_(painter.words.weight.std() / self.out.weight.std() / pooler[0] ** 0.5)
            self.out.bias.zero_()

    @property
    def tokens(self) -> int:
        made: int = self.recipe.tokens
        return made

    def latents(self, images: Tensor) -> Tensor:
        return self.out(self.pooler(self.vision(images)))

    def prompt(
        self, words: Tensor, text_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The frozen text encoder's output (B, places, width) for ``words`` (B, k, width), and which places are used.

        ``text_ids`` (B, T) come behind them; ``mask`` (B, k) bool: False is no word, and those behind move up.
        """
        there = words.new_ones(words.shape[:2], dtype=torch.bool) if mask is None else mask
        if text_ids is not None:
            words = torch.cat([words, self.painter.words(text_ids)], 1)
            there = torch.cat([there, there.new_ones(text_ids.shape)], 1)
        return self.painter.encode(words, there)

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.draw_prompt(self.prompt(z, mask=mask)[0])

    def draw_prompt(self, condition: Tensor) -> Tensor:
        """(B, 3, H, W): the pictures of ``prompt``, guided away from those of the empty prompt."""
        empty = self.prompt(condition.new_zeros(len(condition), 0, condition.shape[2]))[0]

        def ask(x: Tensor, t: Tensor, conditional: bool) -> Velocity:
            return self.flow.velocity(self.painter.velocity(x, t, condition if conditional else empty))

        model = guided(ask, lambda cond, uncond: cfg(cond, uncond, self.recipe.guidance), self.flow)
        return self.pixels(self.flow.sample(model, self.noise(len(condition)), self.steps))

    def kept(self, codes: Codes) -> Codes:
        """What a training step keeps: the first k words of each picture, k from torch's random state."""
        if not (self.training and self.tail_drop):
            return codes
        assert codes.z is not None
        return codes.prefix(draw_lengths(len(codes.z), self.tokens).to(codes.z.device))

    def loss(
        self, images: Tensor, t: Tensor | None = None, noise: Tensor | None = None, k: int | None = None
    ) -> Tensor:
        """The text-to-image model's loss on ``images`` told their own words: all, ``k``, or in training some."""
        codes = self.encode(images)
        codes = self.kept(codes) if k is None else codes.prefix(k)
        assert codes.z is not None
        return self.painter.loss(images, self.prompt(codes.z.to(self.dtype), mask=codes.mask)[0], t, noise)

    def objective(self, images: Tensor) -> Tensor:
        return self.loss(images)


@dataclass(frozen=True)
class ViLex:
    """A tokenizer by its sizes."""

    tokens: int = 75
    """Words of a picture at most."""
    image: int = 256
    """Side of a picture in pixels."""
    vision: str = "vit_base_patch16_siglip_256"
    """The vision transformer that is fine-tuned, by its name in timm."""
    vision_arguments: dict[str, Any] | None = None
    """What timm is told besides, e.g. {"img_size": 32}."""
    pooler: tuple[int, int, int] = (768, 1, 12)
    """Width, blocks and heads of the queries that pool the patches."""
    tail_drop: bool = True
    """Whether training keeps a random number of the first words."""
    words: int = 49408
    """Ids of the text-to-image model; its last two are BOS and EOS."""
    places: int = 77
    """Places of a prompt, BOS and EOS among them."""
    text: tuple[int, int, int] = (768, 12, 12)
    """Width, blocks and heads of the text encoder."""
    patch: int = 16
    """Side of a patch of the flow model, in pixels."""
    drawn: tuple[int, int, int] = (384, 6, 6)
    """Width, blocks and heads of the flow model."""
    steps: int = 20
    """Steps of sampling."""
    guidance: float = 1.0
    """Classifier-free guidance at sampling; 1: none."""
    seed: int = 0
    """Of the noise."""

    def painter(self) -> TextToImage:
        """An untrained text-to-image model of these sizes."""
        return TextToImage(self.words, self.places, self.text, self.patch, self.drawn)

    def build(self, vision: FrozenVision | None = None, painter: TextToImage | None = None) -> ViLexNetwork:
        """An untrained tokenizer; ``vision`` in place of the named one. ``painter``: a trained text-to-image model of
        these sizes, which is copied and stays as it is; None: a new one that learns too."""
        return ViLexNetwork(
            self,
            vision or FrozenVision.of(self.vision, **self.vision_arguments or {}),
            self.painter() if painter is None else copy.deepcopy(painter),
            painter is None,
        )


def claim(trial: TokenizeTrial, first: int = 200, steps: int = 140) -> Outcome:
    """Denoising error on held-out pictures with 2 of 16 words, without TailDrop and with it.

    A text-to-image model first learns from captions (``described``, ``first`` steps) and is frozen; then words are
    learned with and without TailDrop (``steps`` each), by a small vision transformer from scratch. The error is that of
    the noisier half of the times, where a prompt matters. Holds if TailDrop's with 2 words is lower by 2% and does not
    rise (by over 0.1%) as words are added: 1, 2, 4, 8, 16.
    """
    sizes: dict[str, Any] = dict(tokens=16, image=trial.size, pooler=(96, 1, 3), words=140, places=18, text=(96, 1, 3))
    sizes |= dict(vision="vit_tiny_patch16_224", patch=trial.size // 8, drawn=(96, 2, 3))
    arguments = dict(img_size=trial.size, patch_size=trial.size // 4, embed_dim=96, depth=2, num_heads=3)
    sizes["vision_arguments"] = arguments
    torch.manual_seed(trial.seed)
    painter = ViLex(**sizes).painter()
    trial.fit(painter, first, loss=lambda model, x, label: model.captioned(x, described(x, label)), peak_lr=4e-3)
    curves = []
    for tail_drop in (False, True):
        torch.manual_seed(trial.seed)
        model = ViLex(**sizes, tail_drop=tail_drop).build(painter=painter)
        trial.fit(model, steps, peak_lr=4e-3)
        curves.append({k: _error(model.eval(), trial, k) for k in (1, 2, 4, 8, 16)})
    told = "; ".join(f"{k} words: {curves[0][k]:.4f} and {curves[1][k]:.4f}" for k in curves[0])
    falls = list(curves[1].values())
    holds = curves[1][2] <= 0.98 * curves[0][2] and all(b <= 1.001 * a for a, b in pairwise(falls))
    return Outcome("denoising error with 2 of 16 words", curves[0][2], curves[1][2], holds, told)


def described(images: Tensor, label: Tensor) -> Tensor:
    """(B, 13) int64 below 138: captions of a word for the object and, for each quarter and colour, one of ten for its
    brightness."""
    bright = (10 * adaptive_avg_pool2d(images, 2).flatten(1)).long().clamp(0, 9)
    return torch.cat([label[:, None], 18 + 10 * torch.arange(12, device=bright.device) + bright], 1)


@torch.no_grad()
def _error(model: ViLexNetwork, trial: TokenizeTrial, k: int) -> float:
    """Mean over held-out pictures, each at a time and with a noise of its own that are the same in every call."""
    rng, found = torch.Generator().manual_seed(trial.seed), []
    for x, _ in trial.held_out():
        t, noise = torch.rand(len(x), generator=rng) / 2, torch.randn(x.shape, generator=rng)
        found += [model.loss(x, t, noise, k)] * len(x)
    return float(torch.stack(found).mean())

"""SEED: a picture as few discrete tokens that are read from left to right, like words.

What: causal queries read the features of a frozen vision transformer; each becomes one of K codes; a transformer makes
embeddings of the codes again, and a reverse query transformer makes of these the condition of a frozen text-to-image
model. Source: Ge et al., arXiv 2307.08041 (the first version); AILab-CVC/SEED.

Training on pictures alone (``objective``): the embeddings approach the continuous ones by cosine, and a small flow
model in place of the frozen one learns to draw from the condition. With captions, two terms more: ``contrast`` with
vectors of the captions (first stage) and ``generation``, the distance of the condition from the frozen text encoder's.

Departures. The queries are trained from scratch, in blocks with norms in front; the paper's begin as BLIP-2's. Any
text-to-image model can be given the condition (``decode_condition``), but none is loaded here. Defect of the released
quantiser: its beta of 0.25 stands at the codebook's term and not at the commitment's (``parity="authors"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import distillation
from vistok.parts.quantize import VectorQuantizer
from vistok.parts.query_transformer import QueryTransformer
from vistok.parts.vision import FrozenVision
from vistok.parts.visual_vocabulary import VisualVocabulary
from vistok.tokenize._causal import CausalTokenizer, CodeDecoder
from vistok.tokenize._pairs import caption_vectors
from vistok.tokenize.titok import TiTok

CARD = Card(
    title="Planting a SEED of Vision in Large Language Model",
    kind="trained",
    site="features of a frozen vision transformer to 32 causal discrete tokens, and to a condition for drawing",
    paper="Ge et al., 2023, arXiv 2307.08041",
    repository="AILab-CVC/SEED",
    mechanism=("transformation",),
    merge="causal queries that read the patches by attention",
    claim="The codes tell more of what a picture shows than as many codes of a tokenizer that learns pixels.",
    departures=("the released quantiser weights the codebook's loss by beta, not the commitment's",),
)


class SeedNetwork(CausalTokenizer):
    """The tokenizer; ``conditions`` queries of the reverse query transformer make a condition of ``dim`` channels."""

    def __init__(
        self,
        vision: FrozenVision,
        reader: tuple[int, int, int],
        tokens: int,
        conditions: tuple[int, int],
        restore_depth: int,
        **how: Any,
    ) -> None:
        width, depth, heads = reader
        causal = QueryTransformer(*reader, vision.dim, tokens, causal=True, cross_every=2)
        super().__init__(vision, causal, condition=conditions[1], **how)
        self.restore = CodeDecoder(self.bottleneck.dim, width, self.tokens, restore_depth, heads)
        self.reverse = QueryTransformer(width, depth, heads, width, conditions[0], cross_every=2)
        self.out = nn.Linear(width, conditions[1])

    def embed(self, ids: Tensor) -> Tensor:
        """(B, N, width): embeddings of stored ids (B, N)."""
        return self.restore(self.bottleneck.ids_to_z(ids).to(self.dtype))

    def condition(self, z: Tensor) -> Tensor:
        return self.out(self.reverse(self.restore(z)))

    def decode_condition(self, ids: Tensor) -> Tensor:
        """(B, M, C): what a text-to-image model is told, of stored ids (B, N)."""
        return self.condition(self.bottleneck.ids_to_z(ids).to(self.dtype))

    def objective(self, images: Tensor) -> Tensor:
        embedded, codes, z = self.quantized(images)
        restored = self.restore(z)
        drawing = self.drawing(images, self.out(self.reverse(restored)))
        return distillation(restored, embedded) + drawing + codes.loss

    def generation(self, images: Tensor, text: Tensor) -> Tensor:
        """Second stage: mean square of the condition less the frozen text encoder's of the caption, (B, M, C)."""
        made = self.condition(self.quantized(images)[2])
        if made.shape != text.shape:
            raise ValueError(f"text: got shape {tuple(text.shape)}, must be {tuple(made.shape)}")
        return (made.float() - text.detach().float()).square().mean()


@dataclass(frozen=True)
class Seed:
    """A tokenizer by its sizes."""

    tokens: int = 32
    """Causal queries: tokens of a picture."""
    codes: int = 8192
    """Codes of the codebook."""
    dim: int = 32
    """Channels of a code."""
    beta: float = 0.25
    """Weight of the commitment's loss."""
    image: int = 224
    """Side of a picture in pixels."""
    vision: str = "eva_giant_patch14_224"
    """The frozen vision transformer, by its name in timm."""
    vision_arguments: dict[str, Any] | None = None
    """What timm is told besides, e.g. {"img_size": 32}."""
    reader: tuple[int, int, int] = (768, 12, 12)
    """Width, blocks and heads of the causal query transformer and of the reverse one."""
    restore_depth: int = 4
    """Blocks between codes and embeddings."""
    conditions: tuple[int, int] = (77, 768)
    """Vectors of the condition and their channels, those of the text-to-image model."""
    patch: int = 16
    """Side of a patch of the small flow model, in pixels."""
    drawn: tuple[int, int, int] = (384, 6, 6)
    """Width, blocks and heads of the small flow model."""
    steps: int = 10
    """Steps of its sampling."""
    seed: int = 0
    """Of its noise."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""
    parity: Literal["paper", "authors"] = "paper"
    """ "authors": beta weights the codebook's loss, and the commitment has weight 1."""

    def build(self, vision: FrozenVision | None = None) -> SeedNetwork:
        """An untrained tokenizer; ``vision`` in place of the named one, with its class token in front."""
        weights = (1.0, self.beta) if self.parity == "paper" else (self.beta, 1.0)
        made = SeedNetwork(
            vision or FrozenVision.of(self.vision, prefix=True, **self.vision_arguments or {}),
            self.reader,
            self.tokens,
            self.conditions,
            self.restore_depth,
            image=self.image,
            bottleneck=VectorQuantizer(
                self.codes, self.dim, codebook=weights[0], commitment=weights[1], restart_after=self.restart_after
            ),
            patch=self.patch,
            drawn=self.drawn,
            steps=self.steps,
            seed=self.seed,
        )
        made.recipe = self
        return made

    def vocabulary(self, text: int) -> VisualVocabulary:
        """The ids of a language model that had ``text`` ids; ``vocabulary(n).extend(llm)`` gives it the new ones."""
        return VisualVocabulary(text, ((self.codes, self.tokens),))


def claim(trial: TokenizeTrial, steps: int = 120) -> Outcome:
    """Objects of held-out pictures that a linear read-out of 16 codes' vectors names right: TiTok's and SEED's.

    Both have 512 codes of 16 channels and learn for ``steps`` steps, TiTok from pixels, SEED from pictures and captions
    (a vector for each object) on top of the zoo's frozen vision transformer, which was trained to tell the objects, as
    the paper's was trained on captions. Holds if SEED is better by 10 points.
    """
    text = caption_vectors(18, 96, trial.seed)
    torch.manual_seed(trial.seed)
    titok = TiTok("T", 16, trial.size, trial.size // 8, 512, 16, 20).build()
    trial.fit(titok, steps)
    torch.manual_seed(trial.seed)
    sizes: dict[str, Any] = dict(tokens=16, codes=512, dim=16, image=trial.size, patch=trial.size // 8)
    sizes |= dict(reader=(96, 4, 3), restore_depth=1, conditions=(16, 96), drawn=(96, 2, 3), restart_after=20)
    seed = Seed(**sizes).build(trial.vision(prefix=True))
    trial.fit(seed, steps, loss=lambda model, x, label: model.objective(x) + model.contrast(x, text[label]))
    shares = [trial.probe(lambda x, model=model: model.eval().encode(x).z.flatten(1)) for model in (titok, seed)]
    return Outcome("objects read out of 16 codes", shares[0], shares[1], shares[1] >= shares[0] + 0.1)

"""Slot-MLLM: tokens that compete for regions of the picture, so that each stands for an object or a part.

What: a causal query transformer as in ``seed`` whose cross-attention is slot attention (``_slots``), on patches of
DINOv2; each slot becomes four codes of one codebook, one after the other on what is left; 32 slots are 128 words of a
language model, the codes of a slot together. Of the slots come a condition for a diffusion model (one vector a slot)
and an image embedding, as in ``seed-llama``. Source: Chi et al., arXiv 2505.17726; KU-AGI/Slot-MLLM.

Training in two stages: ``slot_objective`` on continuous slots, then, after ``begin_second_stage``, ``objective`` with
the query transformer frozen. Weights are the released ones. As slots compete, each depends on the later ones too,
though the self-attention is causal.

Departures. A small flow model takes the place of Stable Diffusion's, and reads the slots as they come (no register of
their mean). Captioning through the query transformer, and the alignment of the slots' masks with those of the UNet's
cross-attention, are not here: the flow model has no cross-attention. Defects of the released code: padding is added to
the scores, where a softmax over slots cancels it (``parity="authors"``); the type of slot attention is read as an
attribute, so that a plain dict silently gives the GRU type (here ``mode`` is checked); the "morph" type carries weights
of a GRU and an MLP that it never uses (here it has none).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import distillation
from vistok.parts.quantize import Residual, VectorQuantizer
from vistok.parts.query_transformer import CrossAttention, QueryTransformer
from vistok.parts.vision import FrozenVision
from vistok.parts.visual_vocabulary import VisualVocabulary, learn
from vistok.tokenize._causal import CausalTokenizer, CodeDecoder
from vistok.tokenize._slots import SlotCrossAttention, adjusted_rand, owners, scenes
from vistok.tokenize.seed_llama import Teacher, VectorDecoder

CARD = Card(
    title="Slot-MLLM: Object-Centric Visual Tokenization for Multimodal LLM",
    kind="trained",
    site="features of a frozen vision transformer to 32 slots of four codes each, and to conditions for drawing",
    paper="Chi et al., 2025, arXiv 2505.17726",
    repository="KU-AGI/Slot-MLLM",
    mechanism=("attention",),
    merge="causal slots that compete for the patches",
    claim="Slots part a scene into its objects better than queries of plain cross-attention.",
    departures=("padding that the released code adds to the scores is cancelled by the softmax over slots",),
)


class SlotNetwork(CausalTokenizer):
    """The tokenizer; ``vector``: channels of the condition's vectors and of the image embedding."""

    def __init__(
        self, vision: FrozenVision, reader: QueryTransformer, heads: int, vector: int, depth: int,
        teacher: Teacher | None, **how: Any,
    ) -> None:  # fmt: skip
        super().__init__(vision, reader, condition=vector, **how)
        own, width, dim = vision.dim, reader.width, self.bottleneck.dim
        self.widen = nn.Sequential(nn.LayerNorm(own), nn.Linear(own, own), nn.GELU(), nn.Linear(own, reader.features))
        self.restore = CodeDecoder(dim, width, self.tokens, depth, heads)
        self.guide = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vector))
        self.vector = VectorDecoder(width, width, self.tokens, depth, heads, vector)
        self.teacher = () if teacher is None else (teacher,)

    def features(self, images: Tensor) -> Tensor:
        return self.widen(self.vision(images))

    def condition(self, z: Tensor) -> Tensor:
        return self.of_slots(self.restore(z))

    def of_slots(self, slots: Tensor) -> Tensor:
        """(B, N + 1, vector): the condition of slots (B, N, width), the image embedding at its end."""
        return torch.cat([self.guide(slots), self.vector(slots)[:, None]], 1)

    def decode_condition(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The slots (B, N, vector) and the image embedding (B, vector) of stored ids (B, N, depth)."""
        found = self.condition(self.bottleneck.ids_to_z(ids).to(self.dtype))
        return found[:, :-1], found[:, -1]

    def learned(self, images: Tensor, told: Tensor, drawing: float) -> Tensor:
        """The terms that both stages have: drawing, and the image embedding's with a teacher."""
        loss = drawing * self.drawing(images, told)
        for teacher in self.teacher:
            with torch.no_grad():
                target = teacher(images)
            loss = loss + 0.5 * distillation(told[:, -1], target, "l2")
        return loss

    def slot_objective(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """First stage, on continuous slots; with ``text`` (B, width), vectors of captions, also their contrast."""
        loss = self.learned(images, self.of_slots(self.causal(images.to(self.dtype))), 1.0)
        return loss if text is None else loss + 0.5 * self.contrast(images, text, smoothing=0.1)

    def objective(self, images: Tensor) -> Tensor:
        """Second stage, on codes."""
        slots, codes, z = self.quantized(images)
        restored = self.restore(z)
        return codes.loss + distillation(restored, slots) + self.learned(images, self.of_slots(restored), 0.1)

    def begin_second_stage(self) -> None:
        """Freeze the slots: the query transformer and what is before it."""
        self.reader.requires_grad_(False)
        self.widen.requires_grad_(False)


@dataclass(frozen=True)
class SlotMLLM:
    """A tokenizer by its sizes."""

    tokens: int = 32
    """Slots of a picture."""
    codes: int = 8192
    """Codes of the codebook that all depths share."""
    depth: int = 4
    """Codes of a slot."""
    dim: int = 32
    """Channels of a code."""
    mode: Literal["morph", "gru"] = "morph"
    """The slot attention: one pass, or with a GRU."""
    iterations: int = 1
    """Passes of the slot attention with a GRU."""
    image: int = 256
    """Side of a picture in pixels."""
    vision: str = "vit_large_patch14_dinov2"
    """The frozen vision transformer, by its name in timm."""
    vision_arguments: dict[str, Any] | None = None
    """What timm is told besides; None: {"img_size": 224}, 16 x 16 patches."""
    features: int = 1408
    """Channels of the features that the slots read."""
    reader: tuple[int, int, int] = (768, 12, 12)
    """Width, blocks and heads of the query transformer; the width a multiple of 24."""
    decode_depth: int = 4
    """Blocks from codes to slots, and from slots to the image embedding."""
    vector: int = 1024
    """Channels of the condition's vectors and of the image embedding."""
    patch: int = 16
    """Side of a patch of the small flow model, in pixels."""
    drawn: tuple[int, int, int] = (384, 6, 6)
    """Width, blocks and heads of the small flow model."""
    steps: int = 20
    """Steps of its sampling."""
    seed: int = 0
    """Of its noise."""
    restart_after: int | None = 1000
    """Training steps after which an unused code is put back into use; None: never."""
    parity: Literal["paper", "authors"] = "paper"
    """ "authors": a mask of padded patches is without effect, as released."""

    def build(
        self, vision: FrozenVision | None = None, teacher: Teacher | None = None, plain: bool = False
    ) -> SlotNetwork:
        """An untrained tokenizer. ``vision`` in place of the named one; ``teacher``: pictures to image embeddings;
        ``plain``: cross-attention in place of slots, for comparison, which then cannot be saved."""
        arguments = {"img_size": 224} if self.vision_arguments is None else self.vision_arguments
        slots = partial(SlotCrossAttention, mode=self.mode, iterations=self.iterations, legacy=self.parity == "authors")
        cross = CrossAttention if plain else slots
        made = SlotNetwork(
            vision or FrozenVision.of(self.vision, **arguments),
            QueryTransformer(*self.reader, self.features, self.tokens, causal=True, cross_every=2, cross=cross),
            self.reader[2],
            self.vector,
            self.decode_depth,
            teacher,
            bottleneck=Residual([VectorQuantizer(self.codes, self.dim, restart_after=self.restart_after)], self.depth),
            image=self.image,
            patch=self.patch,
            drawn=self.drawn,
            steps=self.steps,
            seed=self.seed,
        )
        made.recipe = None if plain else self
        return made

    def vocabulary(self, text: int = 32000) -> VisualVocabulary:
        """The ids of a language model that had ``text`` ids; its codes are ``words(codes.ids)``."""
        return VisualVocabulary(text, ((self.codes, self.tokens * self.depth),))

    def words(self, ids: Tensor) -> Tensor:
        """(B, N * depth): ids (B, N, depth) one after another, all codes of a slot together."""
        return ids.flatten(1)

    def ids(self, words: Tensor) -> Tensor:
        """(B, N, depth): ``words`` as the tokenizer decodes them."""
        return words.unflatten(1, (-1, self.depth))


def claim(trial: TokenizeTrial, steps: int = 200, train: int = 384, batch: int = 32) -> Outcome:
    """Adjusted Rand index of objects' pixels by the query that owns each patch, of plain queries and of slots.

    Eight queries read the zoo's frozen vision transformer on scenes of up to five objects and learn the first stage,
    drawing, for ``steps`` steps. Over held-out scenes with two objects or more. Holds if slots are better by 0.05.
    """
    vision = trial.vision()
    images, _ = scenes(train, "train", trial.seed)
    tests, objects = scenes(trial.pictures // 2, "test", trial.seed)
    with torch.no_grad():
        features, held_out = (torch.cat([vision(x) for x in part.split(32)]) for part in (images, tests))
    small = adaptive_avg_pool2d(images, (trial.size, trial.size))
    sizes: dict[str, Any] = dict(tokens=8, codes=64, depth=2, dim=16, image=trial.size, features=96, vector=96)
    sizes |= dict(reader=(96, 4, 3), decode_depth=1, patch=trial.size // 8, drawn=(96, 2, 3))
    found = []
    for plain in (True, False):
        torch.manual_seed(trial.seed)
        model = SlotMLLM(**sizes).build(vision, plain=plain)

        def loss(model: SlotNetwork = model) -> Tensor:
            picked = torch.randint(len(small), (batch,))
            slots = model.reader(model.widen(features[picked]))
            return model.drawing(small[picked], model.of_slots(slots))

        learn(model, loss, steps, 1e-3)
        side = vision.grid[0]
        owner = owners(model.eval().reader, model.widen(held_out)).view(-1, side, side)
        scale = objects.shape[1] // side
        pixels = owner.repeat_interleave(scale, 1).repeat_interleave(scale, 2).flatten(1)
        truth = objects.flatten(1)
        several = truth.amax(1) > 1
        index = adjusted_rand(truth[several], pixels[several], truth[several] > 0)
        found.append(float(index.nanmean()))
    return Outcome("adjusted Rand index of objects", found[0], found[1], found[1] >= found[0] + 0.05)

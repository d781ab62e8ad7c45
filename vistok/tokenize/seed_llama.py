"""SEED-LLaMA: SEED's causal codes as words of a language model that reads and draws, and their second decoder.

What: 32 causal codes as in ``seed``. The decoder makes one vector of them, the image embedding of an unCLIP model:
blocks over the codes, a narrow MLP for each token, all tokens side by side, one linear map. A language model gets the
codes as new ids, a picture is [BOI] 32 ids [EOI], and one next-token loss covers text and pictures
(``vistok.parts.visual_vocabulary``). Source: Ge et al., arXiv 2310.01218; AILab-CVC/SEED.

Training: the second branch approaches the continuous embeddings by cosine; with a teacher (``build(teacher=...)``) the
vector approaches its image embedding by mean square. A small flow model takes the place of the unCLIP model, from one
noise, so that the same codes give the same picture. The weights of the losses are not published; here all are 1.

Departures: as in ``seed``; the optional decoder by a reverse query of one token is not here. LoRA is the affair of
whoever trains the language model: all goes through its public interface. Released defect: see ``seed`` (``parity``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import distillation
from vistok.parts.quantize import VectorQuantizer
from vistok.parts.query_transformer import QueryTransformer
from vistok.parts.vision import FrozenVision
from vistok.parts.visual_vocabulary import Packed, Piece, VisualVocabulary
from vistok.tokenize._causal import CausalTokenizer, CodeDecoder
from vistok.tokenize._pairs import TEXT, caption_vectors, captions, memorised, read, shares
from vistok.tokenize.vq_grid import VQGrid

CARD = Card(
    title="Making LLaMA SEE and Draw with SEED Tokenizer",
    kind="trained",
    site="32 causal discrete tokens in the vocabulary of a language model; one vector for an unCLIP decoder",
    paper="Ge et al., 2023, arXiv 2310.01218",
    repository="AILab-CVC/SEED",
    mechanism=("transformation",),
    merge="causal queries that read the patches by attention",
    claim="A small Llama that knows 64 pairs by heart, both ways, names new pictures better by them than by a grid's.",
    departures=("the released quantiser weights the codebook's loss by beta, not the commitment's",),
)

Teacher = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] to their image embeddings (B, C), frozen."""


class VectorDecoder(nn.Module):
    """Codes (B, N, ``dim``) to one vector (B, ``out``): blocks, a narrow MLP for each, all side by side, one map."""

    def __init__(self, dim: int, width: int, tokens: int, depth: int, heads: int, out: int) -> None:
        super().__init__()
        self.codes = CodeDecoder(dim, width, tokens, depth, heads)
        steps = [width, width // 3, width // 6, width // 24]
        layers: list[nn.Module] = []
        for one, two in pairwise(steps):
            layers += [nn.Linear(one, two, bias=False), nn.ReLU()]
        self.narrow = nn.Sequential(*layers[:-1])
        self.out = nn.Linear(tokens * steps[-1], out)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.narrow(self.codes(z)).flatten(1))


class SeedLlamaNetwork(CausalTokenizer):
    """The tokenizer; the image embedding has ``vector`` channels."""

    def __init__(
        self,
        vision: FrozenVision,
        reader: tuple[int, int, int],
        tokens: int,
        vector: int,
        decode_depth: int,
        teacher: Teacher | None,
        **how: Any,
    ) -> None:
        width, _, heads = reader
        causal = QueryTransformer(*reader, vision.dim, tokens, causal=True, cross_every=2)
        super().__init__(vision, causal, condition=vector, **how)
        self.vector = VectorDecoder(self.bottleneck.dim, width, self.tokens, decode_depth, heads, vector)
        self.restore = CodeDecoder(self.bottleneck.dim, width, self.tokens, decode_depth, heads)
        self.teacher = () if teacher is None else (teacher,)

    def condition(self, z: Tensor) -> Tensor:
        return self.vector(z)

    def decode_condition(self, ids: Tensor) -> Tensor:
        """(B, C): the image embedding, of stored ids (B, N)."""
        return self.condition(self.bottleneck.ids_to_z(ids).to(self.dtype))

    def objective(self, images: Tensor) -> Tensor:
        embedded, codes, z = self.quantized(images)
        vector = self.vector(z)
        loss = distillation(self.restore(z), embedded) + self.drawing(images, vector) + codes.loss
        for teacher in self.teacher:
            with torch.no_grad():
                target = teacher(images)
            loss = loss + distillation(vector, target, "l2")
        return loss


@dataclass(frozen=True)
class SeedLlama:
    """A tokenizer by its sizes, and what it is to a language model."""

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
    """Width, blocks and heads of the causal query transformer; the width a multiple of 24."""
    decode_depth: int = 4
    """Blocks of each of the two branches of the decoder."""
    vector: int = 1024
    """Channels of the image embedding, those of the unCLIP model."""
    patch: int = 16
    """Side of a patch of the small flow model, in pixels."""
    drawn: tuple[int, int, int] = (384, 6, 6)
    """Width, blocks and heads of the small flow model."""
    steps: int = 20
    """Steps of its sampling."""
    seed: int = 0
    """Of its noise."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""
    parity: Literal["paper", "authors"] = "paper"
    """ "authors": beta weights the codebook's loss, and the commitment has weight 1."""

    def build(self, vision: FrozenVision | None = None, teacher: Teacher | None = None) -> SeedLlamaNetwork:
        """An untrained tokenizer; ``vision`` in place of the named one, with its class token in front."""
        if self.reader[0] % 24:
            raise ValueError(f"reader: got a width of {self.reader[0]}, must be a multiple of 24")
        weights = (1.0, self.beta) if self.parity == "paper" else (self.beta, 1.0)
        made = SeedLlamaNetwork(
            vision or FrozenVision.of(self.vision, prefix=True, **self.vision_arguments or {}),
            self.reader,
            self.tokens,
            self.vector,
            self.decode_depth,
            teacher,
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

    def instruction(self, vocabulary: VisualVocabulary, ids: Tensor, questions: Tensor, answers: Tensor) -> Packed:
        """Instruction tuning on pictures' ``ids`` (B, N): a picture, a question (B, Q), an answer (B, A), which alone
        is learned."""
        rows = zip(vocabulary.wrap(ids), questions, answers, strict=True)
        return vocabulary.pack([[Piece(x, False), Piece(q, False), Piece(a)] for x, q, a in rows])


def claim(trial: TokenizeTrial, steps: int = 80, words: int = 200) -> Outcome:
    """Objects of held-out pictures that a Llama names right from 16 ids, those of a VQ grid and SEED's.

    Both tokenizers have 512 codes of 16 channels and learn for ``steps`` steps: the grid from pixels, SEED from
    pictures and captions on the zoo's frozen vision transformer, which was trained to tell the objects. The Llama
    learns 64 pairs, both ways, for ``words`` steps. Holds if both are known by heart (0.95 of the ids both ways) and
    SEED's is better by 10 points on the other pictures.
    """
    x, labels = (torch.cat(parts) for parts in zip(*trial.held_out(), strict=True))
    pairs = min(64, len(x) // 2)
    text = caption_vectors(18, 96, trial.seed)
    torch.manual_seed(trial.seed)
    grid = VQGrid("T", trial.size, trial.size // 4, 512, 16, 20).build()
    trial.fit(grid, steps)
    torch.manual_seed(trial.seed)
    sizes: dict[str, Any] = dict(tokens=16, codes=512, dim=16, image=trial.size, patch=trial.size // 8, vector=96)
    sizes |= dict(reader=(96, 4, 3), decode_depth=1, drawn=(96, 2, 3), restart_after=20)
    recipe = SeedLlama(**sizes)
    seed = recipe.build(trial.vision(prefix=True))
    trial.fit(seed, steps, loss=lambda model, x, label: model.objective(x) + model.contrast(x, text[label]))
    vocabulary = recipe.vocabulary(TEXT)
    texts = captions(labels[:pairs])
    named: list[float] = []
    told: list[str] = []
    known: list[float] = []
    for name, model in (("grid", grid), ("SEED", seed)):
        with torch.no_grad():
            ids = model.eval().encode(x).ids
        assert ids is not None
        llm = memorised(vocabulary, texts, (ids[:pairs],), words, trial.seed)
        known += shares(llm, vocabulary, texts, (ids[:pairs],))
        named.append(float((read(llm, vocabulary, (ids[pairs:],))[:, 0] == labels[pairs:]).float().mean()))
        told.append(f"{name} by heart: read {known[-2]:.3f}, written {known[-1]:.3f}")
    holds = min(known) >= 0.95 and named[1] >= named[0] + 0.1
    return Outcome("held-out objects named", named[0], named[1], holds, "; ".join(told))

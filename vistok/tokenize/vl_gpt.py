"""VL-GPT: continuous image embeddings that a language model reads and writes beside words.

What: causal queries read a frozen vision transformer; their N outputs are the picture, without quantisation. A second
query transformer estimates from them what a frozen diffusion model is told: the text encoder's output for the caption
and an image embedding. In the language model text is learned by cross-entropy, the embeddings by a linear head that
predicts the next one (mean square), and drawing feeds its predictions back N times. Source: Zhu et al.,
arXiv 2312.09251; its repository, AILab-CVC/VL-GPT, holds no code, so sizes here are this project's where not published.

Training: ``condition_loss`` with the frozen encoders' targets. ``objective`` knows pictures only: the image embedding's
term where there is a teacher (``build(teacher=...)``), and a small flow model, which takes the place of the frozen
diffusion model and must learn to draw; its gradient reaches the tokenizer only where no teacher is there.

Decided here: the regression's target is the embedding before the projection into the language model, its gradient
stopped. Both conditions have one number of channels. Guidance in the language model is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.parts.quantize import Bottleneck, Identity, VectorQuantizer
from vistok.parts.query_transformer import QueryTransformer
from vistok.parts.vision import FrozenVision
from vistok.parts.visual_vocabulary import Piece, learn, small_llama
from vistok.tokenize._causal import CausalTokenizer
from vistok.tokenize._continuous import ContinuousWords
from vistok.tokenize._pairs import TEXT, WORDS, caption_vectors, captions

CARD = Card(
    title="VL-GPT: A Generative Pre-trained Transformer for Vision and Language Understanding and Generation",
    kind="trained",
    site="features of a frozen vision transformer to 32 causal continuous tokens, and to conditions for drawing",
    paper="Zhu et al., 2023, arXiv 2312.09251",
    repository="AILab-CVC/VL-GPT",
    mechanism=("transformation",),
    merge="causal queries that read the patches by attention",
    claim="Continuous tokens tell the conditions of drawing with less error than codes, and a small Llama learns them.",
)


class VLGPTNetwork(CausalTokenizer):
    """The tokenizer; ``conditions``: vectors of the text condition, and channels of both conditions."""

    def __init__(
        self,
        vision: FrozenVision,
        reader: tuple[int, int, int],
        tokens: int,
        conditions: tuple[int, int],
        teacher: Callable[[Tensor], Tensor] | None,
        **how: Any,
    ) -> None:
        width, depth, heads = reader
        causal = QueryTransformer(*reader, vision.dim, tokens, causal=True)
        super().__init__(vision, causal, condition=conditions[1], **how)
        self.estimator = QueryTransformer(width, depth, heads, self.bottleneck.dim, conditions[0] + 1)
        self.out = nn.Linear(width, conditions[1])
        self.teacher = () if teacher is None else (teacher,)

    def condition(self, z: Tensor) -> Tensor:
        return self.out(self.estimator(z))

    def conditions(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The text condition (B, M, C) and the image condition (B, C) of embeddings ``z`` (B, N, D)."""
        made = self.condition(z)
        return made[:, :-1], made[:, -1]

    def condition_loss(self, z: Tensor, text: Tensor, image: Tensor, weights: tuple[float, float] = (1, 1)) -> Tensor:
        """Mean squares of both conditions of ``z`` less the frozen encoders' (B, M, C) and (B, C), weighted."""
        pairs = zip(weights, self.conditions(z), (text, image), strict=True)
        return torch.stack([w * (made - target.detach()).square().mean() for w, made, target in pairs]).sum()

    def objective(self, images: Tensor) -> Tensor:
        codes = self.bottleneck(self.latents(images.to(self.dtype)))
        assert codes.z is not None
        told, loss = self.condition(codes.z.to(self.dtype)), codes.loss
        for teacher in self.teacher:
            with torch.no_grad():
                target = teacher(images)
            loss = loss + (told[:, -1] - target).square().mean()
        return loss + self.drawing(images, told.detach() if self.teacher else told)


@dataclass(frozen=True)
class VLGPT:
    """A tokenizer by its sizes."""

    tokens: int = 32
    """Causal queries: embeddings of a picture."""
    dim: int = 768
    """Channels of an embedding."""
    image: int = 224
    """Side of a picture in pixels."""
    vision: str = "vit_large_patch14_clip_224"
    """The frozen vision transformer, by its name in timm."""
    vision_arguments: dict[str, Any] | None = None
    """What timm is told besides, e.g. {"img_size": 32}."""
    reader: tuple[int, int, int] = (768, 12, 12)
    """Width, blocks and heads of the causal query transformer and of the estimator."""
    conditions: tuple[int, int] = (77, 768)
    """Vectors of the text condition, and channels of both conditions."""
    patch: int = 16
    """Side of a patch of the small flow model, in pixels."""
    drawn: tuple[int, int, int] = (384, 6, 6)
    """Width, blocks and heads of the small flow model."""
    steps: int = 20
    """Steps of its sampling."""
    seed: int = 0
    """Of its noise."""

    def build(
        self,
        vision: FrozenVision | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        bottleneck: Bottleneck | None = None,
    ) -> VLGPTNetwork:
        """An untrained tokenizer. ``vision`` in place of the named one; ``teacher``: pictures to image embeddings
        (B, C); ``bottleneck`` in place of none, which then cannot be saved."""
        made = VLGPTNetwork(
            vision or FrozenVision.of(self.vision, prefix=True, **self.vision_arguments or {}),
            self.reader,
            self.tokens,
            self.conditions,
            teacher,
            image=self.image,
            bottleneck=bottleneck or Identity(self.dim),
            patch=self.patch,
            drawn=self.drawn,
            steps=self.steps,
            seed=self.seed,
        )
        made.recipe = self if bottleneck is None else None
        return made

    def language(self, llm: Any) -> ContinuousWords:
        """``llm``, a Hugging Face causal model, with this tokenizer's pictures; it is extended in place."""
        return ContinuousWords(llm, self.dim, self.tokens)


def claim(trial: TokenizeTrial, steps: int = 60, words: int = 500) -> Outcome:
    """Mean square error of the image condition on held-out pictures, of 16 codes (of 512) and of 16 continuous tokens.

    The target is the class token of the zoo's frozen vision transformer, which is also the encoder; that of the text
    condition is a vector for each object. Then a Llama learns 64 pairs, both ways, for ``words`` steps. Holds if the
    continuous tokens have less error, and of the pairs 0.95 of the captions' ids are read right and of the pictures
    drawn are nearer to their own embeddings than to those of the other pictures.
    """
    vision, text = trial.vision(prefix=True), caption_vectors(18, 96, trial.seed)
    sizes: dict[str, Any] = dict(tokens=16, dim=16, image=trial.size, patch=trial.size // 8, reader=(96, 2, 3))
    recipe = VLGPT(**sizes, conditions=(1, 96), drawn=(96, 1, 3))

    def loss(model: Any, x: Tensor, label: Tensor) -> Tensor:
        features = vision(x)
        codes = model.bottleneck(model.down(model.reader(features)))
        found: Tensor = model.condition_loss(codes.z, text[label][:, None], features[:, 0]) + codes.loss
        return found

    x, labels = (torch.cat(parts) for parts in zip(*trial.held_out(), strict=True))
    errors, z = [], x
    for bottleneck in (VectorQuantizer(512, 16, restart_after=20), None):
        torch.manual_seed(trial.seed)
        model = recipe.build(vision, bottleneck=bottleneck)
        trial.fit(model, steps, loss=loss)
        with torch.no_grad():
            found = model.eval().encode(x).z
            assert found is not None
            z = found
            errors.append(float((model.conditions(z)[1] - vision(x)[:, 0]).square().mean()))
    pairs, z = min(64, len(z)), z[:64] / z[:64].std()
    texts = captions(labels[:64])
    torch.manual_seed(trial.seed)
    language = recipe.language(small_llama(TEXT))
    picture = language.picture()
    rows = [[Piece(picture, False), Piece(t)] for t in texts] + [[Piece(t, False), Piece(picture)] for t in texts]
    batch = language.vocabulary.pack(rows)
    both = torch.cat([z, z])
    learn(language, lambda: language.loss(*batch, both, 4.0).loss, words, 5e-3)
    language.eval()
    read = float((language.read(z, WORDS) == texts).float().mean())
    nearest = torch.cdist(language.draw(texts).flatten(1), z.flatten(1)).argmin(1)
    drawn = float((nearest == torch.arange(pairs)).float().mean())
    norms = float(language.draw(texts).norm(dim=-1).mean() / z.norm(dim=-1).mean())
    told = f"{pairs} pairs by heart: read {read:.3f}, drawn {drawn:.3f}, norms {norms:.2f} of the true ones"
    holds = errors[1] < errors[0] and min(read, drawn) >= 0.95
    return Outcome("error of the image condition", errors[0], errors[1], holds, told)

"""Captions for claims, and pairs with pictures that a language model learns by heart, both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vistok.parts.visual_vocabulary import Piece, VisualVocabulary, learn, small_llama

OBJECTS, DIGITS = 18, 8
TEXT = OBJECTS + 2 * DIGITS
"""Ids of the captions: 18 objects and two digits, that tell up to 64 pictures apart."""
WORDS = 3
"""Ids of a caption."""


def captions(labels: Tensor) -> Tensor:
    """(B, 3) int64: the object of each picture, and its number in two digits of base 8."""
    number = torch.arange(len(labels)) % DIGITS**2
    return torch.stack([labels, OBJECTS + number // DIGITS, OBJECTS + DIGITS + number % DIGITS], 1)


def both_ways(vocabulary: VisualVocabulary, texts: Tensor, codes: tuple[Tensor, ...]) -> list[list[Piece]]:
    """Each pair as [picture, caption] and as [caption, picture]; all of it is learned, as in pretraining."""
    pictures = vocabulary.wrap(*codes)
    reading = [[Piece(picture), Piece(text)] for picture, text in zip(pictures, texts, strict=True)]
    return reading + [row[::-1] for row in reading]


def memorised(vocabulary: VisualVocabulary, texts: Tensor, codes: tuple[Tensor, ...], steps: int, seed: int) -> Any:
    """A small Llama that took ``steps`` steps on the pairs, both ways, all in one batch; in evaluation mode."""
    torch.manual_seed(seed)
    llm = small_llama(vocabulary.text)
    vocabulary.extend(llm)
    batch = vocabulary.pack(both_ways(vocabulary, texts, codes))._asdict()
    learn(llm.train(), lambda: llm(**batch).loss, steps)
    return llm.eval()


@torch.no_grad()
def read(llm: Any, vocabulary: VisualVocabulary, codes: tuple[Tensor, ...]) -> Tensor:
    """(B, 3): the caption that ``llm`` writes after each picture, greedily."""
    pictures = vocabulary.wrap(*codes)
    made = llm.generate(
        pictures,
        attention_mask=torch.ones_like(pictures),
        max_new_tokens=WORDS,
        do_sample=False,
        logits_processor=[vocabulary],
    )
    found: Tensor = made[:, -WORDS:]
    return found


@torch.no_grad()
def written(logits: Callable[[Tensor], Tensor], embed: Callable[[Tensor], Tensor], seen: Tensor) -> Tensor:
    """(B, 3): the caption after inputs ``seen`` (B, N, width) of a model, greedily over text and without a cache.

    ``logits``: inputs (B, T, width) to (B, T, V); ``embed``: ids (B, T) to inputs.
    """
    made = []
    for _ in range(WORDS):
        made.append(logits(seen)[:, -1, :TEXT].argmax(1, keepdim=True))
        seen = torch.cat([seen, embed(made[-1])], 1)
    return torch.cat(made, 1)


def shares(llm: Any, vocabulary: VisualVocabulary, texts: Tensor, codes: tuple[Tensor, ...]) -> tuple[float, float]:
    """Shares in [0, 1] of the captions' ids that ``llm`` reads off pictures, and of the codes that it writes."""
    wrote = torch.cat(vocabulary.draw(llm, texts), 1)
    right = (read(llm, vocabulary, codes) == texts).float().mean()
    return float(right), float((wrote == torch.cat(codes, 1)).float().mean())


def caption_vectors(classes: int, width: int, seed: int = 0) -> Tensor:
    """(classes, width) of length 1: a frozen text encoder's stand-in, a vector of its own for each caption."""
    return normalize(torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)), dim=1)

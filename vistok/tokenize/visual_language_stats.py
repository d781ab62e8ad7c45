"""Do visual tokens behave like a language? The classical statistics of corpora, on sequences of ids.

What: ids of a picture are a sentence, in raster order or another; frequency (Zipf, Benford), innovation (Heaps),
predictability (entropies, Huffman, n-grams), grammar (a PCFG by inside-outside), parts (purity of ids by masks), and
the shape of the space of ids (Procrustes). Source: Chan et al., arXiv 2411.05001; no code was released. The functions
are ``vistok.core.statistics`` and ``vistok.core.grammar``; this file says which are asked of a tokenizer.

Departures: embeddings are factorised mutual information and not GloVe, whose weights change little; the grammar is a
plain PCFG, not a compound one, on pieces of ``piece`` ids, as its cost grows with the cube of the length. Everything
depends on the size of the codebook: compare at equal size, and see ``unused``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.grammar import grammar_perplexity, induce
from vistok.core.quantize import count_ids
from vistok.core.statistics import (
    benford,
    compression_rate,
    conditional_entropy,
    heaps_curve,
    heaps_fit,
    ngram_counts,
    ngram_perplexity,
    token_entropy,
    zipf_fit,
    zipf_regression,
)
from vistok.tokenize.vq_grid import VQGrid

CARD = Card(
    title="Analyzing The Language of Visual Tokens",
    kind="measurement",
    site="sequences of discrete visual token ids",
    paper="Chan et al., 2024, arXiv 2411.05001",
    claim="Visual tokens are used more evenly than words, so that a Huffman code saves less on them.",
)

Order = Literal["raster", "snake", "columns"]


def linearise(ids: Tensor, order: Order = "raster") -> Tensor:
    """(B, h * w): maps of ids (B, h, w) as sequences; "snake" turns every second row, so that neighbours stay so."""
    if order == "columns":
        return ids.transpose(1, 2).flatten(1)
    if order == "snake":
        ids = ids.clone()
        ids[:, 1::2] = ids[:, 1::2].flip(2)
    elif order != "raster":
        raise ValueError(f"order: got {order!r}, must be 'raster', 'snake' or 'columns'")
    return ids.flatten(1)


@dataclass(frozen=True)
class VisualLanguageStats:
    """Which statistics are taken."""

    order: Order = "raster"
    """How a map of ids becomes a sequence: "raster", "snake" or "columns"."""
    longest: int = 4
    """The longest n-grams that are counted."""
    symbols: int = 8
    """Symbols of the grammar; 0: none is induced."""
    piece: int = 8
    """Ids of a piece that the grammar is induced on and tested on."""
    steps: int = 20
    """Steps of inside-outside."""
    seed: int = 0
    """Of the grammar's start."""

    def sentences(self, ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Sequences of ids (N,), of maps (B, h, w) in ``order``, or of sequences as they are."""
        if isinstance(ids, Tensor) and ids.dim() == 3:
            ids = linearise(ids, self.order)
        return list(ids)

    def report(self, ids: Tensor | Sequence[Tensor], size: int) -> dict[str, float]:
        """Every statistic of ids below ``size``; the second half is what perplexities are of, the first they learn.

        Entropies in bits; ``compression`` is the share that Huffman saves; ``benford`` a distance in [0, 1].
        """
        rows = self.sentences(ids)
        half = len(rows) // 2
        if half < 1:
            raise ValueError(f"ids: got {len(rows)} sequences, must be 2 or more")
        counts = count_ids(torch.cat(rows), size)
        k, b = heaps_fit(heaps_curve(rows))
        found = {
            "unused": float((counts == 0).double().mean()),
            "entropy": token_entropy(rows),
            "compression": compression_rate(rows, size),
            "heaps_k": k,
            "heaps_b": b,
            "benford": benford(counts)[1],
        }
        for n in range(1, self.longest + 1):
            grams = ngram_counts(rows, n)
            found[f"zipf_{n}"] = zipf_fit(grams).exponent
            found[f"zipf_regression_{n}"] = zipf_regression(grams)
            found[f"entropy_{n}"] = conditional_entropy(rows, n)
            found[f"perplexity_{n}"] = ngram_perplexity(rows[:half], rows[half:], n, size)
        if self.symbols:
            learn, test = ([p for row in part for p in row.split(self.piece)] for part in (rows[:half], rows[half:]))
            grammar = induce(learn, self.symbols, size, self.steps, self.seed)
            found["perplexity_pcfg"] = grammar_perplexity(grammar, test)
        return found


def claim(trial: TokenizeTrial, steps: int = 200, codes: int = 512) -> Outcome:
    """Share of bits that Huffman saves on words (of Python's manual) and on ids of held-out pictures.

    As many words as ids, and ``codes`` of both: of the text the most frequent words, all others left out. The tokenizer
    is a VQ on a grid of 4 x 4 patches. Holds if less is saved on ids.
    """
    from pydoc_data.topics import topics  # nearly a megabyte

    torch.manual_seed(trial.seed)
    model = VQGrid("T", trial.size, 4, codes, 8, 20).build()
    trial.fit(model, steps)
    model.eval()
    with torch.no_grad():
        codes_of = [model.encode(real).ids for real, _ in trial.held_out()]
    ids = [row for one in codes_of if one is not None for row in one]
    words = re.findall("[a-z]+", " ".join(topics[key] for key in sorted(topics)).lower())
    frequent = sorted(Counter(words).items(), key=lambda pair: (-pair[1], pair[0]))[:codes]
    number = {word: i for i, (word, _) in enumerate(frequent)}
    known = torch.tensor([number[word] for word in words if word in number])[: sum(map(len, ids))]
    text, pictures = compression_rate([known], codes), compression_rate(ids, codes)
    note = f"entropy {token_entropy([known]):.2f} bits of words, {token_entropy(ids):.2f} of ids, of {len(known)} each"
    return Outcome("share of bits that Huffman saves", text, pictures, pictures < text, note)

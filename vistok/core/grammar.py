"""Probabilistic context-free grammars in Chomsky's normal form: inside probabilities, induction by inside-outside.

The outside pass is the gradient of the inside pass: expected uses of a rule are its probability times the derivative of
the logarithm of the sentence's probability (Eisner, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grammar:
    """S symbols over K ids; each row of ``binary`` and ``emit`` together sums to 1. All float64."""

    root: Tensor
    """(S,): what a sentence begins as; sums to 1."""
    binary: Tensor
    """(S, S, S): a symbol becomes two."""
    emit: Tensor
    """(S, K): a symbol becomes an id."""

    def log_probability(self, ids: Tensor) -> Tensor:
        """(B,) natural logarithms, of sentences (B, L) of one length; -inf for one that the grammar cannot make.

        O(L^3 S^3), every span of a length at once; scaled by its largest entry, so that no length underflows.
        """
        b, n = ids.shape
        inside: list[Tensor] = [self.emit.t()[ids]]  # by length: (B, L - length + 1, S)
        scale: list[Tensor] = [self.emit.new_zeros(b, n)]
        for length in range(2, n + 1):
            count = n - length + 1
            scales = torch.stack([scale[k][:, :count] + scale[length - k - 2][:, k + 1 :] for k in range(length - 1)])
            top = scales.detach().amax(0)
            pairs = sum(
                (scales[k] - top).exp()[..., None, None]
                * inside[k][:, :count, :, None]
                * inside[length - k - 2][:, k + 1 :, None]
                for k in range(length - 1)
            )
            made = torch.einsum("bnyz,xyz->bnx", pairs, self.binary)
            most = made.detach().amax(2).clamp_min(1e-300)
            inside.append(made / most[..., None])
            scale.append(top + most.log())
        return (inside[-1][:, 0] @ self.root).log() + scale[-1][:, 0]

    def expected(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The sum of ``log_probability``, and how often sentences (B, L) use each entry of root, binary and emit."""
        rules = [one.detach().clone().requires_grad_() for one in (self.root, self.binary, self.emit)]
        total = Grammar(*rules).log_probability(ids).sum()
        slopes = torch.autograd.grad(total, rules, allow_unused=True)  # a sentence of one id uses no binary rule
        root, binary, emit = (
            torch.zeros_like(r) if g is None else r.detach() * g for r, g in zip(rules, slopes, strict=True)
        )
        return total.detach(), (root, binary, emit)


def random_grammar(symbols: int, size: int, generator: torch.Generator) -> Grammar:
    """One to begin with: nearly even, half of all rules' weight on ids, so that sentences end."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

    root, binary, emit = draw(symbols), draw(symbols, symbols, symbols), draw(symbols, size)
    return Grammar(root / root.sum(), binary / binary.sum((1, 2), keepdim=True) / 2, emit / emit.sum(1, True) / 2)


def induce(ids: Sequence[Tensor], symbols: int, size: int, steps: int = 50, seed: int = 0) -> Grammar:
    """A grammar of ``symbols`` symbols for sentences (L,) of ids below ``size``, by ``steps`` of inside-outside.

    Expectation maximisation from a random start: it never gets worse, and may end in any of many local optima.
    """
    batches = by_length(ids)
    grammar = random_grammar(symbols, size, torch.Generator().manual_seed(seed))
    for _ in range(steps):
        parts = [grammar.expected(batch)[1] for batch in batches]
        root, binary, emit = (sum(part, torch.zeros(())) + 1e-12 for part in zip(*parts, strict=True))
        whole = binary.sum((1, 2)) + emit.sum(1)
        grammar = Grammar(root / root.sum(), binary / whole[:, None, None], emit / whole[:, None])
    return grammar


def grammar_perplexity(grammar: Grammar, ids: Sequence[Tensor]) -> float:
    """e to the mean nats of an id, the choice of sentences' lengths included."""
    with torch.no_grad():
        nats = -sum(float(grammar.log_probability(batch).sum()) for batch in by_length(ids))
    return math.exp(nats / sum(len(one) for one in ids))


def by_length(ids: Sequence[Tensor]) -> list[Tensor]:
    """The sentences (L,) as batches (B, L), one for each length. ValueError for none, or an empty one."""
    if not ids or min(len(one) for one in ids) < 1:
        raise ValueError("ids: got no sentence or an empty one, must be sentences of one id or more")
    lengths = sorted({len(one) for one in ids})
    return [torch.stack([one for one in ids if len(one) == length]) for length in lengths]

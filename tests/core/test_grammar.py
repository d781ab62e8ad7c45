"""Grammars: against every tree, against a toy grammar's own entropy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vistok.core.grammar import Grammar, grammar_perplexity, induce, random_grammar


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def by_trees(grammar, ids):
    """The probability of a sentence as a sum over all its trees, one by one."""

    def made(symbol, part):
        p = float(grammar.emit[symbol, part[0]]) if len(part) == 1 else 0.0
        for cut in range(1, len(part)):
            for y, z in itertools.product(range(len(grammar.root)), repeat=2):
                p += float(grammar.binary[symbol, y, z]) * made(y, part[:cut]) * made(z, part[cut:])
        return p

    return sum(float(grammar.root[s]) * made(s, ids) for s in range(len(grammar.root)))


def test_probabilities_against_every_tree(rng):
    grammar = random_grammar(2, 3, rng)
    for n in (1, 2, 4):
        ids = torch.randint(3, (3, n), generator=rng)
        expected = [math.log(by_trees(grammar, row)) for row in ids.tolist()]
        assert grammar.log_probability(ids).tolist() == pytest.approx(expected)


def test_long_sentences_do_not_underflow(rng):
    grammar = random_grammar(2, 1000, rng)
    found = grammar.log_probability(torch.randint(1000, (1, 120), generator=rng))
    assert torch.isfinite(found).all() and float(found) < -700


def test_expected_uses(rng):
    """A sentence of n ids uses n emissions, n - 1 binary rules and one root."""
    grammar = random_grammar(3, 4, rng)
    total, (root, binary, emit) = grammar.expected(torch.randint(4, (5, 6), generator=rng))
    assert float(root.sum()) == pytest.approx(5) and float(emit.sum()) == pytest.approx(30)
    assert float(binary.sum()) == pytest.approx(25) and float(total) < 0
    assert float(grammar.expected(torch.zeros(2, 1, dtype=torch.int64))[1][1].sum()) == 0


def toy():
    """S -> A B | A T, T -> S B, A -> a | c, B -> b | d: as many of the first kind as of the second, nested."""
    binary = torch.zeros(4, 4, 4, dtype=torch.float64)
    emit = torch.zeros(4, 4, dtype=torch.float64)
    binary[0, 1, 2], binary[0, 1, 3], binary[3, 0, 2] = 0.6, 0.4, 1.0
    emit[1, 0], emit[1, 2] = 0.8, 0.2
    emit[2, 1], emit[2, 3] = 0.7, 0.3
    return Grammar(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), binary, emit)


def sentences(count, rng):
    found = []
    for _ in range(count):
        depth = 1
        while float(torch.rand((), generator=rng)) < 0.4 and depth < 6:
            depth += 1
        opening = torch.rand(depth, generator=rng) < 0.2
        closing = torch.rand(depth, generator=rng) < 0.3
        found.append(torch.cat([2 * opening.long(), 1 + 2 * closing.long()]))
    return found


def test_induction_approaches_the_entropy_of_a_toy_grammar_and_shuffling_costs(rng):
    learn, test = sentences(150, rng), sentences(100, rng)
    truth = grammar_perplexity(toy(), test)
    found = min(grammar_perplexity(induce(learn, 5, 4, 30, seed), test) for seed in (0, 1))
    assert truth * 0.99 < found < truth * 1.1

    def shuffled(rows):
        return [row[torch.randperm(len(row), generator=rng)] for row in rows]

    mixed = shuffled(test)
    worse = min(grammar_perplexity(induce(shuffled(learn), 5, 4, 30, seed), mixed) for seed in (0, 1))
    assert worse > 1.15 * found
    assert grammar_perplexity(toy(), mixed) == math.inf


def test_induction_never_gets_worse(rng):
    ids = sentences(60, rng)
    found = [grammar_perplexity(induce(ids, 4, 4, steps), ids) for steps in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    grammar = induce(ids, 4, 4, 3)
    assert torch.allclose(grammar.binary.sum((1, 2)) + grammar.emit.sum(1), torch.ones(4).double())
    for wrong in ([], [torch.zeros(0, dtype=torch.int64)]):
        with pytest.raises(ValueError, match="ids: got no sentence"):
            induce(wrong, 2, 2)

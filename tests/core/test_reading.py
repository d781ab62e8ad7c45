"""Edit distance and what is made of it."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistok.core.reading import character_error, edit_distance, similarity, word_error

texts = st.text("abc ", max_size=7)


@given(texts, texts)
def test_against_the_definition(a, b):
    @cache
    def plain(i, j):
        if not i or not j:
            return i + j
        return min(plain(i - 1, j) + 1, plain(i, j - 1) + 1, plain(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == edit_distance(b, a) == plain(len(a), len(b))
    assert 0 <= similarity(a, b) <= 1 and similarity(a, b) == similarity(b, a) and (similarity(a, b) == 1) == (a == b)


def test_rates():
    assert similarity("kitten", "sitting") == 1 - 3 / 7
    assert character_error("kitten", "sitting") == 3 / 7 and character_error("abcdef", "ab") == 2
    assert word_error("the cat sat", "the dog sat down") == 2 / 4
    assert character_error("", "") == 0 and character_error("ab", "") == 2 and word_error("a b", " ") == 2
    assert edit_distance(["a", "b"], ["b"]) == 1
    assert similarity("", "") == 1 == pytest.approx(similarity("é", "é"))

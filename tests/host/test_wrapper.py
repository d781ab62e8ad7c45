"""A wrapper is to the host what the method is that it wraps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_type_hints

import pytest
import torch

from vistok.host.reducer import Reducer
from vistok.host.wrapper import Wrapper

TRAITS = [name for name, hint in get_type_hints(Reducer).items() if hint.__origin__ is ClassVar]
OTHER = {"space": "encoder", "position": "recompact", "cache": "survivors"}


@dataclass(frozen=True)
class Wraps(Wrapper):
    """Nothing of its own."""

    method: str | Reducer


@pytest.mark.parametrize("name", TRAITS)
def test_every_trait_is_the_wrapped_methods(name):
    plain = getattr(Reducer, name)
    other = type("Other", (Reducer,), {name: OTHER.get(name, True)})
    assert getattr(Wraps(Reducer()), name) == plain
    assert getattr(Wraps(other()), name) == OTHER.get(name, True) != plain


def test_tokens_come_back_as_the_wrapped_method_has_it():
    class Doubles(Reducer):
        def come_back(self, aside, keep, states):
            return 2 * aside

    aside = torch.ones(1, 3, 2)
    assert torch.equal(Wraps(Doubles()).come_back(aside, torch.tensor([[0]]), aside[:, :1]), 2 * aside)

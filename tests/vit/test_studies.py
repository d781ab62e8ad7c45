"""The training studies of the vit family: each module keeps the contract. Nothing is trained here."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import benchmarks.vit_studies
from vistok import catalogue

NAMES = [module.name for module in pkgutil.iter_modules(benchmarks.vit_studies.__path__)]


def test_there_are_studies():
    assert {"evit", "sit", "stvit_supertoken", "lookupvit", "top_vim"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_keeps_the_contract(name):
    module = importlib.import_module(f"benchmarks.vit_studies.{name}")
    assert catalogue.card(name).family == "vit" and catalogue.card(name).slug == name.replace("_", "-")
    assert isinstance(module.TITLE, str) and module.TITLE
    assert module.__doc__ and module.__doc__.strip().endswith(".") and module.study.__doc__
    assert inspect.isgeneratorfunction(module.study)
    trial, quick = inspect.signature(module.study).parameters.values()
    assert (trial.name, trial.annotation) == ("trial", "ViTTrial")
    assert (quick.name, quick.annotation, quick.default) == ("quick", "bool", False)
    assert inspect.signature(module.study).return_annotation == "Iterator[dict[str, Any]]"

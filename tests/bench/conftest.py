"""A small untrained model, loaded as a user would."""

from __future__ import annotations

import pytest

from tests.small import save_small_model
from vistok.zoo import load, load_processor


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def model(folder):
    return load(folder)


@pytest.fixture(scope="session")
def processor(folder):
    return load_processor(folder)

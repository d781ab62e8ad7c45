"""The study's two small parts; the decoder that uses them is tested in tests/host/test_diffusion.py."""

from __future__ import annotations

import pytest
import torch

import vistok
from tests.reduce.synthetic import Trial, evidence
from vistok import catalogue
from vistok.reduce.dmllm_redundancy import VTW, StepPrune, claim


def test_the_catalogue_makes_what_the_decoder_takes() -> None:
    made = vistok.create("dmllm-redundancy", method="fastv", keep=64, start_frac=0.0)
    assert made == StepPrune("fastv", 64, 0.0) and made.reducer == vistok.create("fastv")
    own = VTW(0.25)
    assert StepPrune(own).reducer is own


def test_it_is_a_study_and_no_method() -> None:
    assert "dmllm-redundancy" in [card.slug for card in vistok.systems("reduce")]
    assert "dmllm-redundancy" not in [card.slug for card in catalogue.methods("reduce")]
    with pytest.raises(ValueError, match=r"^method: got .*must be the name of a reducer"):
        vistok.apply(torch.nn.Linear(1, 1), "dmllm-redundancy")


@pytest.mark.parametrize(("depth", "layer"), [(0.0, 0), (0.5, 3), (0.6, 4), (1.0, None)])
def test_withdrawn(depth, layer) -> None:
    method = VTW(depth)
    schedule = method.schedule(64, 8, 6)
    assert schedule.input == 64 and schedule.layers == ({} if layer is None else {layer: 0})
    given = evidence(method)
    gone = method.at_layer(given, 0, 3)
    assert gone.tokens.shape == (3, 0, 12) and bool((gone.source == -1).all())


def test_wrong_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"^depth: got 1.5, must be in \[0, 1\]"):
        VTW(1.5)
    with pytest.raises(ValueError, match=r"^keep: got 1.5"):
        StepPrune(keep=1.5)
    with pytest.raises(ValueError, match=r"^start_frac: got -0.1, must be in \[0, 1\]"):
        StepPrune(start_frac=-0.1)
    with pytest.raises(ValueError, match=r"^method: got 'dmllm-redundancy', must be the name of a reducer"):
        StepPrune("dmllm-redundancy")


class Diffusion(Trial):
    """With made-up accuracies and milliseconds of the diffusion model, (dense, pruned)."""

    def __init__(self, accuracy, milliseconds):
        super().__init__()
        self.both = accuracy, milliseconds

    def diffusion_accuracy(self, prune):
        return self.both[0][prune is not None]

    def diffusion_ms(self, prune):
        return self.both[1][prune is not None]


@pytest.mark.parametrize(
    ("accuracy", "milliseconds", "holds"),
    [((0.8, 0.79), (30, 20), True), ((0.8, 0.77), (30, 20), False), ((0.8, 0.8), (20, 20), False)],
)
def test_claim(accuracy, milliseconds, holds) -> None:
    outcome = claim(Diffusion(accuracy, milliseconds))
    assert (outcome.baseline, outcome.value, outcome.holds) == (*accuracy, holds)
    assert "times faster" in outcome.note

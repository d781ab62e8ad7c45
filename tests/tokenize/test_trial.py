"""What claims of tokenizers are measured with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.fidelity import psnr
from vistok.parts.causal import CausalModel
from vistok.tokenize import one_d_piece, titok, vq_grid
from vistok.tokenize.titok import TiTok


def small():
    torch.manual_seed(0)
    return TiTok("T", 4, 16, 8, 16, 4).build()


def test_training_and_figures_are_the_same_again():
    trial = TokenizeTrial(pictures=8, size=16)
    found = []
    for _ in range(2):
        model = small()
        losses = trial.fit(model, 3, batch_size=4)
        found.append((losses, trial.psnr(model), trial.usage(model)))
    assert found[0] == found[1] and len(found[0][0]) == 3
    model = small()
    trial.fit(model, 3, batch_size=4)
    ((real, label),) = trial.held_out()
    assert label.shape == (8,) and 0 <= label.min() and label.max() < 18
    assert real.shape == (8, 3, 16, 16) and 0 <= real.min() and real.max() <= 1
    with torch.no_grad():
        codes = model.encode(real)
        assert trial.psnr(model) == pytest.approx(float(psnr(model.decode(codes), real).mean()))
    assert trial.usage(model) == len(codes.ids.unique()) / 16


@pytest.mark.parametrize("system", [vq_grid, titok, one_d_piece])
def test_claims_run(system):
    outcome = system.claim(TokenizeTrial(pictures=4, size=32), steps=1)
    assert outcome.metric and outcome.baseline == outcome.baseline and outcome.value == outcome.value


def test_a_probe_reads_what_features_tell():
    trial = TokenizeTrial(pictures=16, size=16)
    labels = iter(label for count in (64, 16) for _, label in trial._batches(count, 2 if count == 64 else 1))
    assert trial.probe(lambda x: torch.nn.functional.one_hot(next(labels), 18).float()) == 1
    assert trial.probe(lambda x: x.new_zeros(len(x), 3)) < 0.5


def test_codes_that_say_nothing_cost_nothing():
    trial = TokenizeTrial(pictures=8, size=16)

    class Constant:
        def encode(self, images):
            return SimpleNamespace(ids=torch.full((len(images), 4), 3))

    cost = trial.code_loss(Constant(), CausalModel(8, 4, 12, 1, 3), 60, peak_lr=1e-2)
    assert cost < 0.5 < trial.code_loss(Constant(), CausalModel(8, 4, 12, 1, 3, classes=18), 1)

"""What claims of tokenizers are measured with."""

from __future__ import annotations

import pytest
import torch

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.fidelity import psnr
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
    (real,) = trial._held_out()
    assert real.shape == (8, 3, 16, 16) and 0 <= real.min() and real.max() <= 1
    with torch.no_grad():
        codes = model.encode(real)
        assert trial.psnr(model) == pytest.approx(float(psnr(model.decode(codes), real).mean()))
    assert trial.usage(model) == len(codes.ids.unique()) / 16


@pytest.mark.parametrize("system", [vq_grid, titok, one_d_piece])
def test_claims_run(system):
    outcome = system.claim(TokenizeTrial(pictures=4, size=32), steps=1)
    assert outcome.metric and outcome.baseline == outcome.baseline and outcome.value == outcome.value

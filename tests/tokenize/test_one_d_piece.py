"""One-D-Piece: any beginning decodes, and training draws all of them alike."""

from __future__ import annotations

import pytest
import torch

from tests.tokenize.test_contract import built, pictures
from vistok.tokenize.one_d_piece import OneDPiece

SMALL = dict(size="T", tokens=6, image=16, patch=4, codes=32, dim=4, restart_after=3, per="sample")


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_training_shows_any_number_of_tokens_and_never_none(per):
    model = built("one-d-piece", per=per)
    codes = model.encode(pictures(2))
    seen = torch.zeros(7, dtype=torch.int64)
    for seed in range(600):
        torch.manual_seed(seed)
        kept = model.kept(codes)
        lengths = torch.full((2,), kept.z.shape[1]) if kept.mask is None else kept.mask.sum(1)
        assert per == "sample" or len(set(lengths.tolist())) == 1
        seen += lengths.bincount(minlength=7)
    assert seen[0] == 0
    chi_square = float(((seen[1:] - 200) ** 2 / 200).sum()) / (2 if per == "batch" else 1)
    assert chi_square < 20.5  # 0.1% of draws with five degrees of freedom


def test_the_quantisers_loss_covers_all_tokens():
    model = built("one-d-piece").train()
    torch.manual_seed(1)
    _, codes = model(pictures())
    torch.manual_seed(2)
    _, again = model(pictures())
    assert codes.ids.shape == (3, 6) and torch.equal(codes.loss, again.loss)


@torch.no_grad()
def test_a_cut_tail_is_not_a_tail_of_zeros():
    model = built("one-d-piece")
    codes = model.encode(pictures())
    zeros = codes.z.clone()
    zeros[:, 2:] = 0
    cut, filled = model.render(codes.z[:, :2]), model.render(zeros)
    assert not torch.allclose(cut, filled, atol=1e-4)
    torch.testing.assert_close(model.decode(codes.prefix(2)), cut.clamp(0, 1))


def test_bytes():
    assert OneDPiece().bytes_for(256) == 384 and OneDPiece().bytes_for(1) == 1.5
    codes = built("one-d-piece").encode(pictures())
    assert codes.prefix(3).bits.tolist() == [3 * 5] * 3

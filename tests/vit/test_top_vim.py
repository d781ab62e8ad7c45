"""ToP-ViM: what its sheet says must hold, the network and the claim."""

from __future__ import annotations

import pytest
import torch

from tests.vit.made_trial import MadeTrial
from vistok.core.scan import selective_scan
from vistok.vit.top_vim import (
    BidirectionalMixer,
    PrunedVim,
    TopViM,
    claim,
    kept_patches,
    prune_sequence,
    ssm_importance,
)


def small(**given):
    torch.manual_seed(0)
    shape = dict(image=24, patch=4, dim=16, depth=4, state=3, prune_after=(0, 2), keep=0.5)
    return TopViM(**(shape | given)).build(5).eval()


def test_importance_is_the_clipped_sum():
    y = torch.tensor([[[1.0, -2.0], [3.0, 4.0]]])
    assert ssm_importance(y).tolist() == [[4.0, 4.0]]
    assert ssm_importance(y, clip=False).tolist() == [[4.0, 2.0]]


def test_keeping_all_is_the_identity():
    x, places, score = torch.randn(2, 9, 4), torch.arange(8).expand(2, 8), torch.randn(2, 9)
    kept, left = prune_sequence(x, places, score, 1.0)
    assert torch.equal(kept, x) and torch.equal(left, places)
    model, pictures = small(keep=1.0), torch.randn(2, 3, 24, 24)
    pruned = model(pictures)
    model.pruning = False
    assert torch.equal(pruned, model(pictures))


def test_pruning_keeps_the_best_in_order_and_the_class_token_in_the_middle():
    x = torch.arange(9.0).view(1, 9, 1).repeat(2, 1, 1)
    places = torch.tensor([[0, 3, 4, 7, 8, 9, 20, 30]]).repeat(2, 1)
    score = torch.tensor([[5.0, 1, 6, 2, -99, 3, 7, 8, 4], [8.0, 7, 6, 5, 99, 4, 3, 2, 1]])
    kept, left = prune_sequence(x, places, score, 0.5)
    assert kept[..., 0].tolist() == [[0, 2, 4, 6, 7], [0, 1, 4, 2, 3]]
    assert left.tolist() == [[0, 4, 9, 20], [0, 3, 4, 7]]
    assert (left.diff(dim=1) > 0).all()


@pytest.mark.parametrize(("patches", "keep", "count"), [(196, 0.8, 158), (196, 0.5, 98), (10, 0.75, 8), (9, 0.95, 9)])
def test_counts_leave_an_odd_total(patches, keep, count):
    """ceil(keep * patches), and one more where the total with the class token would be even."""
    assert kept_patches(patches, keep) == count
    assert count == patches or (count + 1) % 2


def test_tokens_are_really_gone():
    model, seen = small(), []
    for mixer in model.mixers:
        mixer.register_forward_hook(lambda _, __, out: seen.append(out[0].shape[1]))
    x, places = model.sequence(torch.randn(2, 3, 24, 24))
    assert seen == [37, 19, 19, 11] and x.shape == (2, 11, 16) and places.shape == (2, 10)
    assert (places.diff(dim=1) > 0).all()
    assert model.forward_features(torch.randn(2, 3, 24, 24)).shape == (2, 11, 16)


def test_alignment_with_all_places_is_the_ordinary_scan():
    mixer, x = BidirectionalMixer(8, 3), torch.randn(2, 9, 8)
    for ours, theirs in zip(mixer(x, torch.arange(8).expand(2, 8), 8), mixer(x), strict=True):
        assert torch.equal(ours, theirs)


def test_aligned_scans_are_those_of_the_whole_sequence_with_nothing_at_the_gaps():
    """Written out: the places that are gone are put back with zero input and the step of zero input."""
    mixer = BidirectionalMixer(8, 3).double()
    x = torch.randn(1, 5, 8).double()  # patches at 1, 2 | class token | at 4, 7 of 9
    _, *ours = mixer(x, torch.tensor([[1, 2, 4, 7]]), 9)
    at = {False: [1, 2, 3, 5, 8], True: [1, 2, 4, 5, 8]}  # of ten; the class token behind the patch before it
    u, z = mixer.in_proj(x).transpose(1, 2).chunk(2, 1)
    for direction, turn, got in ((mixer.forwards, False, ours[0]), (mixer.backwards, True, ours[1])):
        v, gate = (t.flip(2) if turn else t for t in (u, z))
        v = torch.nn.functional.silu(direction.conv1d(torch.nn.functional.pad(v, (3, 0))))
        dt, b, c = direction.x_proj(v.transpose(1, 2)).split((direction.rank, 3, 3), 2)
        step = torch.nn.functional.softplus(direction.dt_proj(dt)).transpose(1, 2)
        whole = direction.empty_step[None, :, None].repeat(1, 1, 10)
        places = [9 - p for p in reversed(at[turn])] if turn else at[turn]
        filled = []
        for value in (v, b.transpose(1, 2), c.transpose(1, 2)):
            zeros = torch.zeros(1, value.shape[1], 10).double()
            zeros[..., places] = value
            filled.append(zeros)
        whole[..., places] = step
        y, _ = selective_scan(filled[0], whole, -direction.A_log.exp(), *filled[1:])
        y = y[..., places] + v * direction.D[:, None]
        expected = y * torch.nn.functional.silu(gate)
        torch.testing.assert_close(got, expected.flip(2) if turn else expected)


def test_naive_scans_differ():
    model, pictures = small(), torch.randn(2, 3, 24, 24)
    aligned = model(pictures)
    model.align = False
    assert not torch.allclose(aligned, model(pictures), atol=1e-7)


def test_both_directions_matter_and_share_the_kept_set():
    mixer, x = BidirectionalMixer(8, 3), torch.randn(1, 7, 8)
    _, ahead, back = mixer(x)
    changed = x.clone()
    changed[:, 3] += 1
    _, ahead2, back2 = mixer(changed)
    torch.testing.assert_close(ahead[..., :3], ahead2[..., :3])  # the forward scan sees what came before alone
    torch.testing.assert_close(back[..., 4:], back2[..., 4:])
    assert not torch.allclose(ahead[..., 4:], ahead2[..., 4:]) and not torch.allclose(back[..., :3], back2[..., :3])


def test_released_score_is_mirrored_and_not_clipped():
    ahead, back = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    torch.testing.assert_close(small()._score(ahead, back), (ahead + back).clamp(min=0).sum(1))
    torch.testing.assert_close(small(parity="authors")._score(ahead, back), back.sum(1).flip(1))


def test_pictures_of_a_batch_do_not_see_one_another_and_all_parameters_learn():
    for parity in ("paper", "authors"):
        model, pictures = small(parity=parity), torch.randn(3, 3, 24, 24)
        torch.testing.assert_close(model(pictures)[:1], model(pictures[:1]), rtol=1e-4, atol=1e-5)
    model.train()(pictures).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="patch: got 5"):
        PrunedVim(image=24, patch=5)
    with pytest.raises(ValueError, match=r"prune_after: got \(4,\), must be of the blocks 0\.\.3"):
        small(prune_after=(4,))
    with pytest.raises(ValueError, match="keep: got 0"):
        small(keep=0)
    with pytest.raises(ValueError, match="parity: got 'x'"):
        small(parity="x")


def test_claim():
    trial = MadeTrial(0.5, 0.2, 0.3)
    outcome = claim(trial, steps=2)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.2, 0.3, True)
    assert "0.500" in outcome.note and "42 of 64 patches" in outcome.note
    assert not claim(MadeTrial(0.5, 0.3, 0.31), steps=1).holds

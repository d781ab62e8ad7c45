"""raftmlp: what its sheet says must hold, the backbone and the claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

import vistok
from vistok.attend import raftmlp
from vistok.attend.raftmlp import Block, MultiScalePatchEmbed, RaftBlock, RaftMLP, RaftTokenMixer, claim


def made(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def block(dim, length, axis, raft):
    torch.manual_seed(0)
    found = RaftBlock(dim, length, axis, raft).double()
    with torch.no_grad():
        for p in found.norm.parameters():
            p.normal_()
    return found


def by_hand(found, x):
    """Every column (or row) and group of channels by itself; the norm's weights are those of (group, raft)."""
    dim, raft = x.shape[3], found.raft
    groups = dim // raft
    normed = (x - x.mean(3, keepdim=True)) / (x.var(3, correction=0, keepdim=True) + 1e-5).sqrt()
    out = x.clone()
    for o in range(groups):
        channels = [g * groups + o for g in range(raft)]
        places = [o * raft + g for g in range(raft)]
        part = normed[..., channels] * found.norm.weight[places] + found.norm.bias[places]
        for line in range(x.shape[3 - found.axis]):
            along = part.select(3 - found.axis, line)  # (B, axis, raft)
            mixed = found.mlp(along.transpose(1, 2).flatten(1)).unflatten(1, (raft, -1)).transpose(1, 2)
            for g, c in enumerate(channels):
                out[..., c].select(3 - found.axis, line).add_(mixed[..., g])
    return out


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("shape", "raft"), [((2, 3, 4, 6), 2), ((1, 5, 2, 6), 3), ((2, 3, 3, 4), 1)])
def test_equal_to_a_loop(shape, raft, axis):
    found, x = block(shape[3], shape[axis], axis, raft), made(*shape)
    with torch.no_grad():
        torch.testing.assert_close(found(x), by_hand(found, x))


def test_without_output_a_block_is_the_identity():
    mixer, x = RaftTokenMixer(6, 4, 5, 3).double(), made(2, 4, 5, 6)
    for part in (mixer.vertical, mixer.horizontal):
        torch.nn.init.zeros_(part.mlp[2].weight)
        torch.nn.init.zeros_(part.mlp[2].bias)
    assert torch.equal(mixer(x), x)


def reached(model, x, at):
    """(h, w, C) bool: where the output for ``x`` (1, h, w, C) changes if one number of it, ``at``, does."""
    moved = x.clone()
    moved[0, *at] += 1
    return ((model(moved) - model(x)).abs() > 1e-12)[0]


def test_a_column_reaches_itself_and_then_all():
    x = made(1, 4, 5, 6)
    mixer = RaftTokenMixer(6, 4, 5, 1).double()
    assert reached(mixer.vertical, x, (2, 3, 0)).any(2).any(0).tolist() == [False, False, False, True, False]
    assert bool(reached(mixer.vertical, x, (2, 3, 0))[:, 3].any(1).all())
    assert bool(reached(mixer, x, (2, 3, 0)).any(2).all())


def test_a_group_depends_on_its_raft_alone():
    found, x = block(6, 4, 1, 2), made(1, 4, 5, 6)
    found.norm = torch.nn.Identity()
    assert reached(found, x, (2, 3, 4)).any(0).any(0).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize(("h", "w", "raft", "expansion"), [(4, 6, 2, 2), (3, 5, 1, 3)])
def test_parameters_of_the_mixer(h, w, raft, expansion):
    mixer = RaftTokenMixer(12, h, w, raft, expansion)
    weights = sum(p.numel() for p in mixer.parameters() if p.dim() == 2)
    assert weights == 2 * expansion * ((raft * h) ** 2 + (raft * w) ** 2)


def test_another_size_is_resized_and_that_of_training_is_not(monkeypatch):
    mixer, x = RaftTokenMixer(4, 3, 4).double(), made(2, 6, 5, 4)
    small = interpolate(x.permute(0, 3, 1, 2), (3, 4), mode="bicubic").permute(0, 2, 3, 1)
    mixed = mixer.horizontal(mixer.vertical(small)).permute(0, 3, 1, 2)
    expected = interpolate(mixed, (6, 5), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer(x), expected)

    def never(*given, **how):
        raise AssertionError("interpolated")

    monkeypatch.setattr(raftmlp, "interpolate", never)
    assert torch.equal(mixer(small), mixer.horizontal(mixer.vertical(small)))
    assert RaftMLP(image=32).of((4, 4, 4, 4), 3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_embedding_equals_a_loop():
    embed, x = MultiScalePatchEmbed(2, 5, (2, 4)).double(), made(1, 2, 4, 6)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    out = embed(x)
    assert out.shape == (1, 5, 2, 3)
    for i in range(2):
        for j in range(3):
            small = x[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            large = padded[0, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
            torch.testing.assert_close(out[0, :, i, j], embed.fc(torch.cat([small.flatten(), large.flatten()])))


def test_an_embedding_resizes_what_it_does_not_divide():
    embed, x = MultiScalePatchEmbed(2, 5, (2,)).double(), made(1, 2, 5, 6)
    torch.testing.assert_close(embed(x), embed(interpolate(x, (6, 6), mode="bicubic")))


def test_gradients():
    mixer, x = RaftTokenMixer(4, 2, 3).double(), made(1, 3, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,), fast_mode=True)
    whole = Block(4, mixer).double()
    assert torch.autograd.gradcheck(lambda x: whole(x.flatten(1, 2), (3, 3)), (x,), fast_mode=True)


def test_backbone():
    torch.manual_seed(0)
    small = RaftMLP(image=64, depths=(1, 1, 2, 1))
    net = small.of((4, 8, 8, 16), 3)
    x = torch.randn(2, 3, 75, 96)
    net(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    maps = small.of((4, 8, 8, 16), features_only=True)
    shapes = [tuple(m.shape) for m in maps(x)]
    assert shapes == [(2, 4, 19, 24), (2, 8, 10, 12), (2, 8, 5, 6), (2, 16, 3, 3)]
    assert maps.feature_info.channels() == [4, 8, 8, 16] and maps.feature_info.reduction() == [4, 8, 16, 32]
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:1], net(x[:1]))


def test_number_of_parameters_by_the_formula():
    """Of the stages' weights: embedding, two mixers of 2 e (r n) ** 2 each, channel MLP."""
    with torch.device("meta"):
        net = vistok.create("raftmlp").build()
    dims, sides, pixels = (3, 64, 128, 256, 512), (56, 28, 14, 7), (80, 20, 20, 4)
    expected = 512 * 1000
    for i, depth in enumerate((2, 2, 6, 2)):
        expected += dims[i] * pixels[i] * dims[i + 1] + depth * (8 * dims[i + 1] ** 2 + 8 * (2 * sides[i]) ** 2)
    assert sum(p.numel() for p in net.parameters() if p.dim() == 2) == expected


def test_what_does_not_fit_is_said():
    for call, said in (
        (lambda: RaftBlock(7, 4, 1), "raft: got 2, must divide dim, 7"),
        (lambda: RaftBlock(8, 4, 3), "axis: got 3"),
        (lambda: RaftBlock(8, 4, 2)(torch.zeros(1, 4, 5, 8)), "x: got 5 tokens along axis 2, must be 4"),
        (lambda: MultiScalePatchEmbed(3, 8, (2, 5)), "kernels: got"),
        (lambda: RaftMLP("huge").build(), "size: got 'huge'"),
        (lambda: RaftMLP(depths=(1,)).build(), "dims: got 4 for"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize(("ours", "holds"), [(0.895, True), (0.8, False)])
def test_the_claim_can_hold_and_can_fail(ours, holds):
    class Trial:
        seed = 0

        def fit(self, model, steps):
            assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)

        def accuracy(self, model):
            return ours if any(isinstance(m, RaftBlock) for m in model.modules()) else 0.9

    outcome = claim(Trial())
    assert outcome.holds is holds and outcome.baseline == 0.9 and "parameters" in outcome.note

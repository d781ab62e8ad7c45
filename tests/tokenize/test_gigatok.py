"""GigaTok: where its queries begin, what passes the rotation, and what the teacher teaches."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.quantize import VectorQuantizer
from vistok.parts.tokenizer import load_tokenizer
from vistok.tokenize.gigatok import GigaTok, claim, multilevel

SMALL = dict(
    encoder="T",
    decoder="T",
    tokens=8,
    image=SIZE,
    width=12,
    mults=(1, 2, 2),
    channels=24,
    codes=32,
    dim=4,
    align=0,
    direct_until=100,
    restart_after=3,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("first", ["row", "col"])
def test_queries_begin_as_averages_coarse_to_fine(first):
    x = torch.randn(2, 3, 8, 8)
    found, n = multilevel(x, 6, first), 0
    assert found.shape == (2, 64, 3)
    torch.testing.assert_close(found[:, 0], x.mean((2, 3)))
    wide = [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8)]
    for rows, columns in wide if first == "row" else [(c, r) for r, c in wide]:
        for i in range(rows):
            for j in range(columns):
                h, w = 8 // rows, 8 // columns
                block = x[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w].mean((2, 3))
                torch.testing.assert_close(found[:, n], block)
                n += 1
    assert n == 64


def test_the_rotation_turns_gradients_with_the_vectors():
    """As the unit vector sees it: the code comes out, lengths of gradients stay, and so do their angles."""
    book = VectorQuantizer(32, 6, norm="both", gradient="rotation", restart_after=None)
    z = normalize(torch.randn(5, 6), dim=1).requires_grad_()
    q = normalize(book.codebook.detach()[: len(z)], dim=1)
    out = book.gradient(z, q, torch.arange(len(z)))
    assert torch.equal(out, q)
    grad = torch.randn(5, 6)
    (back,) = torch.autograd.grad(out, z, grad)
    torch.testing.assert_close(back.norm(dim=1), grad.norm(dim=1))
    torch.testing.assert_close((back * z).sum(1), (grad * q).sum(1))
    doubled = torch.cat([q, 3 * q])
    z = (2 * normalize(q, dim=1)).requires_grad_()
    (back,) = torch.autograd.grad(book.gradient(z, doubled, torch.arange(5) + 5), z, grad)
    torch.testing.assert_close(back, 1.5 * grad)  # parallel: straight through, times |q| / |z|


def test_the_gradient_of_a_raw_vector_is_across_it():
    model = built("gigatok").train()
    z = (3 * torch.randn(2, 8, 4)).requires_grad_()
    out = model.bottleneck(z).z
    (back,) = torch.autograd.grad(out, z, torch.randn(2, 8, 4))
    torch.testing.assert_close((back * z).sum(2), torch.zeros(2, 8), atol=1e-5, rtol=0)


@torch.no_grad()
def test_grid_queries_begin_as_the_first_token():
    model = built("gigatok")
    z = model.encode(pictures(1)).z
    seen = []
    handle = model.drawer.blocks[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model.drawn(z)
    handle.remove()
    torch.testing.assert_close(seen[0] - model.grid_positions, model.up(z)[:, :1].expand(-1, 16, -1))


def test_alignment_is_between_minus_one_and_one_and_only_the_student_learns():
    wanted = torch.randn(4, 16, 7, requires_grad=True)
    model = GigaTok(**{**SMALL, "align": 7}).build(lambda images: wanted * images.new_ones(()))
    inside = torch.randn(4, 16, 96, requires_grad=True)
    loss = model.alignment(inside, pictures(4))
    assert -1 <= float(loss.detach()) <= 1
    loss.backward()
    assert wanted.grad is None and inside.grad.abs().sum() > 0
    model.align = torch.nn.Identity()
    model.teacher = (lambda images: inside.detach(),)
    torch.testing.assert_close(model.alignment(inside, pictures(4)), torch.tensor(-1.0))
    model.teacher = (lambda images: -inside.detach(),)
    torch.testing.assert_close(model.alignment(inside, pictures(4)), torch.tensor(1.0))


@torch.no_grad()
def test_a_teacher_of_a_finer_grid_is_averaged():
    fine = torch.randn(2, 64, 7)
    model = GigaTok(**{**SMALL, "align": 7}).build(lambda images: fine)
    model.align = torch.nn.Identity()
    mean = fine.unflatten(1, (4, 2, 4, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(model.alignment(mean, pictures(2)), torch.tensor(-1.0))


def test_the_features_after_so_many_blocks_are_aligned():
    model = built("gigatok", align=7, align_depth=2).train()
    model.teacher = (lambda images: torch.ones(len(images), 16, 7),)
    inside = model.drawn(model.encode(pictures(4)).z)[1]
    model.alignment(inside, pictures(4)).backward()
    learned = [any(p.grad is not None for p in block.parameters()) for block in model.drawer.blocks]
    assert learned == [True, True, False, False]


@torch.no_grad()
def test_the_direct_path_ends():
    def loss(step, until):
        model = built("gigatok", direct_until=until, restart_after=None).train()
        model.step.fill_(step)
        return model, float(model.objective(pictures(4)))

    model, with_it = loss(0, 2)
    seen = model.encoder(2 * pictures(4) - 1)
    made = model.pixels(seen)
    direct = float((made - pictures(4)).abs().mean() + (made - pictures(4)).square().mean())
    assert int(model.step) == 1
    assert with_it - loss(2, 2)[1] == pytest.approx(direct, abs=1e-5)
    assert loss(2, 2)[1] == pytest.approx(loss(0, 0)[1], abs=1e-6)


def test_the_teacher_is_not_saved(tmp_path):
    model = GigaTok(**{**SMALL, "align": 5}).build(torch.nn.Linear(3, 5))
    assert not any("teacher" in key for key in model.state_dict())
    other = load_tokenizer(model.save(tmp_path))
    assert other.teacher == (None,) and float(other.alignment(torch.randn(1, 16, 96), pictures(1))) == 0


def test_refusals():
    for hyper, message in (
        (dict(encoder="Q"), "encoder: got 'Q', must be one of T, S, B, L, XL, XXL"),
        (dict(image=18), "image: got 18, must be a multiple of 4"),
        (dict(tokens=6), "tokens: got 6, must be a power of two, 16 at most"),
        (dict(tokens=64), "tokens: got 64, must be a power of two, 16 at most"),
        (dict(align=3, align_depth=5), "align_depth: got 5, must be between 1 and the 4 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            GigaTok(**{**SMALL, **hyper}).build()
    with pytest.raises(ValueError, match="levels: got 8, must split 4 x 4 into equal blocks"):
        multilevel(torch.zeros(1, 1, 4, 4), 8)
    model = GigaTok(**{**SMALL, "align": 5}).build(lambda images: torch.zeros(len(images), 16, 7))
    with pytest.raises(ValueError, match="teacher: got 7 channels, must be align, 5"):
        model.objective(pictures(2))


def test_claim():
    outcome = claim(TokenizeTrial(pictures=8), steps=1)
    assert 0 < outcome.baseline and 0 < outcome.value and "dB" in outcome.note

"""FQGAN: books that say different things, what teaches them, and the generator's head."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.quantize import entropies
from vistok.parts.quantize import Product, VectorQuantizer
from vistok.parts.tokenizer import load_tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._factors import FactorHead, FactorModel
from vistok.tokenize.fqgan import FQGAN, claim

SMALL = dict(
    codes=32,
    dim=4,
    image=SIZE,
    teacher_dims=(),
    width=8,
    mults=(1, 1, 2),
    blocks=1,
    adapter_width=16,
    adapter_depth=1,
    latent=8,
    reader=(16, 1),
    heads=2,
    restart_after=3,
)
RECIPE = FQGAN(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def teacher(dim=12):
    return FrozenVision.of(
        "vit_tiny_patch16_224", prefix=True, img_size=SIZE, patch_size=8, embed_dim=dim, depth=1, num_heads=2
    )


def book(size=32, dim=4, **how):
    return VectorQuantizer(size, dim, norm="both", **{"restart_after": None, **how})


@torch.no_grad()
def test_books_at_right_angles_cost_nothing_and_equal_ones_the_weight():
    for two, wanted in ((torch.tensor([0.0, 1.0]), 0.0), (torch.tensor([-1.0, 0.0]), 0.1)):
        books = [book(1, 2), book(1, 2)]
        books[0].codebook[:] = torch.tensor([1.0, 0.0])
        books[1].codebook[:] = two
        found = Product(books, disentangle=0.1)(torch.randn(2, 3, 4)).losses["disentangle"]
        torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_three_books_are_the_mean_of_their_pairs_and_no_table_learns_from_it():
    books = Product([book(), book(), book()], disentangle=0.1)
    z = torch.randn(2, 5, 12, requires_grad=True)
    codes = books(z)
    a, b, c = codes.z.split(4, -1)
    pairs = [cosine_similarity(*pair, dim=-1).square().mean() for pair in ((a, b), (a, c), (b, c))]
    torch.testing.assert_close(codes.losses["disentangle"], 0.1 * sum(pairs) / 3)
    codes.losses["disentangle"].backward()
    assert z.grad.abs().sum() > 0
    assert all(part.codebook.grad is None or not part.codebook.grad.any() for part in books.books)


@torch.no_grad()
def test_each_book_takes_its_own_nearest_code():
    model, x = built("fqgan"), pictures()
    codes = model.encode(x)
    assert codes.ids.shape == (3, 16, 2) and codes.bits.tolist() == [16 * 10] * 3
    for i, part in enumerate(model.latents(x).split(4, -1)):
        table = normalize(model.bottleneck.books[i].codebook, dim=1)
        assert torch.equal(codes.ids[..., i], (normalize(part, dim=-1) @ table.t()).argmax(-1))
    assert torch.equal(model.semantic(codes.z), codes.z[..., 4:])
    assert sum(p.numel() for p in model.bottleneck.parameters()) == 2 * 32 * 4


@torch.no_grad()
def test_entropy_is_least_for_sure_and_even_choices():
    table = torch.eye(8)
    sure = entropies(table[None], table)
    assert abs(float(sure[0] - sure[1]) + math.log(8)) < 1e-3
    one = entropies(table[:1].expand(1, 8, 8), table)
    unsure = entropies(torch.zeros(1, 8, 8), table)
    assert float(sure[0] - sure[1]) < float(one[0] - one[1]) + 1e-6
    assert abs(float(unsure[0] - unsure[1])) < 1e-3


def test_teachers_are_of_the_last_books_and_not_saved(tmp_path):
    recipe = replace(RECIPE, books=3, teacher_dims=(12, 8))
    teachers = [teacher(12), teacher(8)]
    model, x = recipe.build(teachers), pictures(4)
    z = model.encode(x).z.detach().requires_grad_()
    for i, found in enumerate(model.classes(z)):
        assert found.shape == (3 + 1, (12, 8)[i])
        (grad,) = torch.autograd.grad(found.sum(), z)
        assert (grad.abs().sum((0, 1)) > 0).nonzero().flatten().tolist() == list(range(4 * (i + 1), 4 * (i + 2)))
    torch.manual_seed(1)
    taught = model.objective(x)
    taught.backward()
    assert all(p.grad is not None for p in model.readers.parameters())
    assert all(p.grad is None for t in teachers for p in t.parameters())
    away = [1 - cosine_similarity(f, t(x)[:, 0]).mean() for f, t in zip(model.classes(z), teachers, strict=True)]
    assert 0 < float(sum(away).detach()) < 4
    other = load_tokenizer(model.eval().save(tmp_path))
    assert torch.equal(other.encode(x).ids, model.encode(x).ids)
    other.train().objective(x).backward()
    assert all(p.grad is None for p in other.readers.parameters())


def test_refusals():
    with pytest.raises(ValueError, match="teacher_dims: got 3, must be at most one for each of the 2 books"):
        replace(RECIPE, teacher_dims=(1, 2, 3)).build()
    with pytest.raises(ValueError, match=r"teachers: have \[12\] channels, must have teacher_dims, \(8,\)"):
        replace(RECIPE, teacher_dims=(8,)).build([teacher()])


def test_claim():
    outcome = claim(TokenizeTrial(pictures=2, size=16), steps=1, codes=8)
    assert outcome.note.endswith("96 and 96 bits a picture")


# The generator -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_pairs_of_ids_have_probabilities_that_sum_to_one():
    head, context = FactorHead(5, 2, 8, 1, 2), torch.randn(1, 8)
    total = 0.0
    for a in range(5):
        logits = head(context, torch.tensor([[a]]))
        total += float((logits[0, 0].softmax(0)[a] * logits[0, 1].softmax(0)).sum())
    assert abs(total - 1) < 1e-5


@torch.no_grad()
def test_the_first_id_is_drawn_without_the_second():
    head, context = FactorHead(5, 3, 8, 2, 2), torch.randn(4, 8)
    one, other = (head(context, torch.tensor(ids).expand(4, -1)) for ids in ([1, 2], [1, 4]))
    assert torch.equal(one[:, :2], other[:, :2]) and not torch.allclose(one[:, 2], other[:, 2])
    torch.testing.assert_close(head(context, torch.zeros(4, 0, dtype=torch.int64))[:, 0], one[:, 0])
    ids = torch.randint(5, (4, 3))
    nats = -head(context, ids[:, :2]).log_softmax(-1).gather(-1, ids[..., None]).mean()
    torch.testing.assert_close(head.loss(context, ids), nats)


def test_the_model_learns_a_sequence_by_heart_and_draws_it():
    model = FactorModel(6, 2, 4, 16, 1, 2, classes=2)
    ids, label = torch.randint(6, (2, 4, 2)), torch.arange(2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(ids, label).backward()
        optimizer.step()
    assert torch.equal(model.eval().sample(label, temperature=0), ids)
    drawn = [model.sample(label, torch.Generator().manual_seed(s)) for s in (3, 3)]
    assert torch.equal(*drawn) and drawn[0].shape == (2, 4, 2)
    with pytest.raises(ValueError, match=r"before: got shape \(2, 4, 2\), must be \(B, M, 2\) with M below 4"):
        model(ids, label)

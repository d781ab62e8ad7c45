"""ILLUME: SimVQ, two books in one sequence, what pixels may teach, the condition, and samples of assessment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.quantize import nearest_code
from vistok.parts.quantize import SimVQuantizer
from vistok.parts.visual_vocabulary import learn, small_llama
from vistok.tokenize.illume import Illume, assessed, claim

SMALL = dict(
    image=SIZE,
    vision="vit_tiny_patch16_224",
    vision_arguments=dict(img_size=12, patch_size=2, embed_dim=24, depth=1, num_heads=3),
    merge=2,
    semantic_codes=32,
    pixel_codes=48,
    dim=6,
    depth=1,
    width=8,
    mults=(1, 1, 2),
    blocks=1,
    decoder_width=8,
    noise_rate=0.5,
)
RECIPE = Illume(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_of_simvq_the_linear_map_alone_learns_and_every_code_moves():
    book = SimVQuantizer(50, 6)
    before = book.table().detach().clone()
    optimizer = torch.optim.SGD(book.parameters(), 0.1)
    book(torch.randn(1, 2, 6)).loss.backward()
    assert [name for name, _ in book.named_parameters()] == ["transform.weight"]
    optimizer.step()
    assert ((book.table() - before).abs().sum(1) > 0).all()


@torch.no_grad()
def test_a_search_in_blocks_is_the_whole_search():
    table, z = torch.randn(1000, 6), torch.randn(7000, 6)
    assert torch.equal(nearest_code(z, table), torch.cdist(z.double(), table.double()).argmin(1))


@torch.no_grad()
def test_two_stretches_with_a_book_each():
    model, x = built("illume"), pictures()
    codes = model.encode(x)
    assert model.tokens == 9 + 16 and codes.ids.shape == (3, 25)
    for part, z, book in zip(
        codes.ids.split([9, 16], 1), model.latents(x).split([9, 16], 1), model.bottleneck.books, strict=True
    ):
        assert torch.equal(part, torch.cdist(z, book.table()).argmin(-1))
    torch.testing.assert_close(codes.loss, sum(book(z).loss for book, z in _stretches(model, x)))
    wrong = codes.ids.clone()
    wrong[:, 0] = 40  # a pixel code at a semantic place
    with pytest.raises(ValueError, match="ids: got 40, must be below 32"):
        model.decode_ids(wrong)
    with pytest.raises(ValueError, match="ids: got 24 tokens, must be 25"):
        model.codes(codes.ids[:, :24])


def _stretches(model, x):
    return zip(model.bottleneck.books, model.latents(x).split([9, 16], 1), strict=True)


@torch.no_grad()
def test_features_are_averaged_over_blocks_of_patches():
    model, x = built("illume"), pictures(2)
    seen = model.vision(x).unflatten(1, (6, 6))
    for i in range(3):
        for j in range(3):
            block = seen[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
            torch.testing.assert_close(model.target(x)[:, 3 * i + j], block)


def test_pixels_teach_the_pixel_side_and_features_the_semantic_side():
    model = built("illume").train()
    codes = model.encode(pictures())
    for value, sides in (
        (model.render(codes.z), {"encoder", "decoder"}),
        (model.features(codes.z), {"semantic_encoder", "semantic_decoder"}),
    ):
        model.zero_grad()
        value.square().mean().backward(retain_graph=True)
        learned = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert learned == sides


@torch.no_grad()
def test_the_picture_depends_on_both_kinds_of_codes():
    model = built("illume")
    z = model.encode(pictures()).z
    for blank in (slice(0, 9), slice(9, 25)):
        other = z.clone()
        other[:, blank] = 0
        assert not torch.allclose(model.render(other), model.render(z), atol=1e-4)


@torch.no_grad()
def test_noise_hits_pixel_tokens_in_training_only():
    model = replace(RECIPE, noise_rate=1.0).build().train()
    z = torch.randn(400, 25, 6)
    made = model.noisy(z)
    changed = (made != z).any(-1)
    assert not changed[:, :9].any() and 0.4 < changed[:, 9:].float().mean() < 0.6
    gone = (made[:, 9:] == 0).all(-1)
    before = (made[:, 9:] == z.roll(1, 0)[:, 9:]).all(-1)
    assert torch.equal(gone | before, changed[:, 9:]) and gone.any() and before.any()
    assert not (gone.any(1) & before.any(1)).any()
    model.eval()
    picture, codes = model(pictures())
    assert torch.equal(picture, model.render(codes.z))
    assert torch.equal(replace(RECIPE, noise_rate=0.0).build().noisy(z), z)


def test_the_loss_by_hand_and_the_rule_of_the_gradient():
    for rule in ("straight-through", "rotation"):
        model, x = replace(RECIPE, gradient=rule).build().eval(), pictures()
        codes = model.encode(x)
        away = 1 - cosine_similarity(model.features(codes.z), model.target(x), dim=-1).mean()
        books = sum(1.25 * (book(z).z - z).square().mean() for book, z in _stretches(model, x))
        pixels = (model.render(codes.z) - x).square().mean()
        torch.testing.assert_close(model.objective(x), pixels + away + books, atol=1e-4, rtol=1e-4)


def test_an_assessment_is_learned_and_what_it_is_about_is_only_read():
    model = built("illume")
    vocabulary = model.vocabulary(12)
    ids = model.encode(pictures(2)).ids.split([9, 16], 1)
    pieces = [
        assessed(torch.tensor([1, 2]), picture, torch.tensor([3 + i]), torch.tensor([5, 6 + i]))
        for i, picture in enumerate(vocabulary.wrap(*ids))
    ]
    batch = vocabulary.pack(pieces)
    assert batch.input_ids.shape == (2, 2 + 27 + 3)
    assert (batch.labels[:, :29] == -100).all() and batch.labels[:, 29:].tolist() == [[3, 5, 6], [4, 5, 7]]
    llm = small_llama(vocabulary.size)
    losses = learn(llm, lambda: llm(**batch._asdict()).loss, 30)
    assert losses[-1] < 0.3 * losses[0]
    guess = llm(batch.input_ids).logits[:, 28:-1].argmax(-1)
    assert torch.equal(guess, batch.labels[:, 29:])


def test_refusals():
    with pytest.raises(ValueError, match=r"merge: got 4, must divide the grid of the vision model, \(6, 6\)"):
        replace(RECIPE, merge=4).build()


def test_claim():
    outcome = claim(TokenizeTrial(pictures=2, size=32), steps=1, codes=64)
    assert outcome.note.endswith("640 and 600 bits a picture")

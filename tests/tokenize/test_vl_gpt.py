"""VL-GPT: causal embeddings, the mixed loss in a real language model, and feeding back."""

from __future__ import annotations

import pytest
import torch

from tests.tokenize.test_contract import built, pictures
from tests.tokenize.test_seed import SMALL as SEED
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.visual_vocabulary import Piece, small_llama
from vistok.tokenize.vl_gpt import VLGPT, claim

SMALL = {k: v for k, v in SEED.items() if k not in ("codes", "restore_depth", "restart_after")}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def language():
    return VLGPT(**SMALL).language(small_llama(10, 16, 2, 2)).eval()


def rows(language):
    picture, text = language.picture(), torch.arange(4)
    return [[Piece(picture), Piece(text)], [Piece(text), Piece(picture), Piece(text[:1])], [Piece(text)]]


@torch.no_grad()
def test_an_embedding_depends_on_the_queries_up_to_its_own():
    model = built("vl-gpt")
    before = model.encode(pictures()).z
    model.reader.queries[3] += torch.randn(24)
    changed = (model.encode(pictures()).z - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, False, False, True, True]


def test_conditions_and_their_loss():
    model = built("vl-gpt")
    z = model.encode(pictures()).z
    text, image = model.conditions(z)
    assert text.shape == (3, 4, 10) and image.shape == (3, 10)
    one, two = torch.randn(3, 4, 10), torch.randn(3, 10)
    by_hand = 0.5 * (text - one).square().mean() + 2 * (image - two).square().mean()
    torch.testing.assert_close(model.condition_loss(z, one, two, (0.5, 2)), by_hand)
    model.condition_loss(model.latents(pictures()), one, two).backward()
    assert all(p.grad is None for p in [*model.vision.parameters(), *model.painter.parameters()])
    assert all(p.grad is not None for part in (model.reader, model.estimator) for p in part.parameters())


def test_with_a_teacher_drawing_teaches_the_small_flow_model_only():
    model = VLGPT(**SMALL).build(teacher=lambda images: images.new_ones(len(images), 10))
    model.estimator.requires_grad_(False)
    model.out.requires_grad_(False)
    z = model.latents(pictures())
    target = torch.ones(3, 10)
    (expected,) = torch.autograd.grad((model.condition(z)[:, -1] - target).square().mean(), model.reader.queries)
    (found,) = torch.autograd.grad(model.objective(pictures()), model.reader.queries)
    torch.testing.assert_close(found, expected)


def test_positions_are_words_or_embeddings_and_each_once(language):
    batch = language.vocabulary.pack(rows(language))
    there = language.places(batch.input_ids)
    assert there.sum(1).tolist() == [5, 5, 0]
    words = (batch.labels != -100) & ~there
    assert not (words & there).any() and torch.equal(words | there, batch.attention_mask.bool())


def test_loss_against_a_loop(language):
    batch, z = language.vocabulary.pack(rows(language)), torch.randn(2, 5, 6)
    logits, predicted = language(batch.input_ids, z, batch.attention_mask)
    text, image, at = [], [], {0: 0, 1: 0}
    for b, ids in enumerate(batch.input_ids.tolist()):
        for t in range(len(ids)):
            if ids[t] == language.vocabulary.text:
                target = z[b, at[b]]
                at[b] += 1
                if t:
                    image.append((predicted[b, t - 1] - target).square().mean())
            elif t and batch.labels[b, t] >= 0:
                text.append(-logits[b, t - 1].log_softmax(0)[ids[t]])
    found = language.loss(*batch, z, 0.3)
    torch.testing.assert_close(found.text, torch.stack(text).mean())
    torch.testing.assert_close(found.image, torch.stack(image).mean())
    torch.testing.assert_close(found.loss, found.text + 0.3 * found.image)


def test_without_pictures_it_is_the_language_models_own_loss(language):
    batch = language.vocabulary.pack([[Piece(torch.arange(5))], [Piece(torch.arange(3))]])
    found = language.loss(*batch, torch.zeros(0, 5, 6))
    torch.testing.assert_close(found.loss, language.llm(**batch._asdict()).loss)
    assert found.image == 0


@torch.no_grad()
def test_feeding_back_the_true_embeddings_is_teacher_forcing(language):
    prompt, z = torch.randint(10, (2, 3)), torch.randn(2, 5, 6)
    ids = torch.cat([prompt, language.picture().expand(2, -1)], 1)
    _, predicted = language(ids, z)
    torch.testing.assert_close(language.draw(prompt, z), predicted[:, 3:8])
    own = language.draw(prompt)
    torch.testing.assert_close(language(ids, own)[1][:, 3:8], own)
    assert own.shape == (2, 5, 6) and not torch.allclose(own[:, 1:], predicted[:, 4:8])


@torch.no_grad()
def test_reading_is_greedy_over_text_alone(language):
    z = torch.randn(2, 5, 6)
    ids = language.picture().expand(2, -1)
    for _ in range(3):
        ids = torch.cat([ids, language(ids, z)[0][:, -1, :10].argmax(1, keepdim=True)], 1)
    assert torch.equal(language.read(z, 3), ids[:, -3:])


def test_the_targets_gradient_is_stopped(language):
    batch, z = language.vocabulary.pack(rows(language)[:2]), torch.randn(2, 5, 6, requires_grad=True)
    last = z[:, -1]
    language.enter.requires_grad_(False)
    (grad,) = torch.autograd.grad(language.loss(*batch, z).image, z)
    assert not grad[:, -1].any() and grad[:, 0].any() and last.requires_grad  # the last one is only a target


def test_refusals(language):
    with pytest.raises(ValueError, match=r"pictures: got \(1, 5, 6\), must fill the 10 places"):
        language.embed(language.picture().expand(2, -1), torch.randn(1, 5, 6))


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=8), steps=1, words=2)
    assert outcome.baseline > 0 and outcome.value > 0 and "by heart" in outcome.note

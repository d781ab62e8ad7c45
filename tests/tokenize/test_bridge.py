"""Bridge: what stays bit by bit, who gets a gradient, who is routed where, and what a picture is made of."""

from __future__ import annotations

import copy

import pytest
import torch

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.visual_vocabulary import Piece, VisualVocabulary, learn, small_llama
from vistok.tokenize._routing import Routed
from vistok.tokenize.bridge import Bridge, TwoExperts, claim

RECIPE = Bridge((6, 2), (9, 4))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def both():
    """The model as it was, and the same with two experts."""
    llm = small_llama(10, 16, 2, 2).eval()
    return copy.deepcopy(llm), RECIPE.grow(llm).eval()


def codes(b=2):
    return torch.randint(6, (b, 2)), torch.randint(9, (b, 4))


def mixed(model, b=2):
    text = torch.randint(10, (b, 3))
    return torch.cat([text, model.vocabulary.wrap(*codes(b)), text], 1)


def jolt(model):
    """Make the experts differ."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Routed):
                for p in module.drawing.parameters():
                    p += 0.1 * torch.randn_like(p)


@torch.no_grad()
def test_without_drawn_tokens_it_is_the_original_bit_by_bit(both):
    plain, model = both
    jolt(model)
    ids = torch.randint(10, (3, 7))
    logits, _ = model(model.embed(ids), model.drawn(ids))
    assert torch.equal(logits[..., :10], plain(ids).logits)
    features = torch.randn(3, 5, 16)  # of a picture that is seen
    assert torch.equal(model(features)[0][..., :10], plain(inputs_embeds=features).logits)


@torch.no_grad()
def test_with_equal_experts_it_is_the_single_model_on_any_sequence(both):
    plain, model = both
    ids = mixed(model)
    embeds = model.embed(ids)
    torch.testing.assert_close(model(embeds, model.drawn(ids))[0][..., :10], plain(inputs_embeds=embeds).logits)


def test_only_the_drawing_expert_and_its_ids_learn(both):
    _, model = both
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = [[Piece(torch.randint(10, (3,)), False), Piece(p)] for p in model.vocabulary.wrap(*codes(4))]
    batch = model.vocabulary.pack(rows)
    losses = learn(model, lambda: model.loss(batch), 30, 1e-2)
    assert losses[-1] < 0.5 * losses[0]
    learned = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    drawing = {k for k in before if ".drawing." in k or k in ("table.weight", "head.weight")}
    assert learned == drawing and len(drawing) == 2 * 9 + 1 + 2
    for key, p in model.named_parameters():
        assert p.requires_grad == (key in drawing) and (p.grad is not None) == (key in drawing)


@torch.no_grad()
def test_every_token_goes_to_its_own_expert(both):
    _, model = both
    jolt(model)
    routed = next(m for m in model.modules() if isinstance(m, Routed))
    x, drawn = torch.randn(2, 5, 16), torch.rand(2, 5) < 0.5
    routed.route.drawn = drawn
    found = routed(x)
    for b in range(2):
        for t in range(5):
            expert = routed.drawing if drawn[b, t] else routed.understanding
            torch.testing.assert_close(found[b, t], expert(x[b, t]))
    ids = torch.tensor([[3, model.vocabulary.boi, 10, 16, model.vocabulary.eoi, 9]])
    assert model.drawn(ids).tolist() == [[False, True, True, True, True, False]]


@torch.no_grad()
def test_a_batch_is_as_row_by_row(both):
    _, model = both
    jolt(model)
    ids = mixed(model, 3)
    ids[1] = torch.randint(10, ids[1].shape)
    ids[2] = ids[2].roll(2)
    logits, _ = model(model.embed(ids), model.drawn(ids))
    for row, found in zip(ids, logits, strict=True):
        torch.testing.assert_close(model(model.embed(row[None]), model.drawn(row[None]))[0][0], found)


@torch.no_grad()
def test_the_cache_is_by_position(both):
    _, model = both
    jolt(model)
    ids = mixed(model)
    whole, _ = model(model.embed(ids), model.drawn(ids))
    cache, parts = None, []
    for part in ids.split(2, 1):
        logits, cache = model(model.embed(part), model.drawn(part), None, cache, True)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_length():
    vocabulary = Bridge().vocabulary(100)
    picture = vocabulary.wrap(torch.randint(65536, (1, 81)), torch.randint(16384, (1, 1024)))
    assert picture.shape == (1, 1 + 81 + 1024 + 1)
    assert 81 / 1024 == pytest.approx(0.079, abs=1e-3)


@torch.no_grad()
def test_pictures_are_semantic_then_pixel_ids_whatever_the_sampling(both):
    _, model = both
    prompt = torch.randint(10, (3, 4))
    for how in ({}, dict(guidance=3.0), dict(temperature=2.0, generator=torch.Generator().manual_seed(0))):
        semantic, pixel = model.generate_image(prompt, **how)
        assert semantic.shape == (3, 2) and pixel.shape == (3, 4) and semantic.max() < 6 and pixel.max() < 9
    # By hand: guided, without a cache.
    wrote = torch.cat([prompt, torch.full((3, 1), model.vocabulary.boi)], 1)
    for _ in range(7):
        cond, uncond = (model(model.embed(x), model.drawn(x))[0][:, -1] for x in (wrote, wrote[:, 4:]))
        scores = model.vocabulary(wrote, uncond + 3 * (cond - uncond))
        wrote = torch.cat([wrote, scores.argmax(1, keepdim=True)], 1)
    assert torch.equal(
        torch.cat(model.generate_image(prompt, 3.0), 1), torch.cat(model.vocabulary.unwrap(wrote[:, 4:]), 1)
    )


def test_padding_changes_no_loss(both):
    _, model = both
    row = [Piece(torch.arange(3), False), Piece(model.vocabulary.wrap(*codes(1))[0])]
    longer = [Piece(torch.randint(10, (15,)), False)]
    vocabulary = model.vocabulary
    torch.testing.assert_close(model.loss(vocabulary.pack([row, longer])), model.loss(vocabulary.pack([row])))


def test_refusals(both):
    with pytest.raises(ValueError, match="llm: got one of 10 ids, must have the 11 of text"):
        TwoExperts(both[0], VisualVocabulary(11, ((2, 2),)))


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=8), steps=1, words=2)
    assert 0 <= outcome.value <= 1 and "read before" in outcome.note

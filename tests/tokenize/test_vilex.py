"""ViLex: prompts, TailDrop, and a frozen model that gradients pass through."""

from __future__ import annotations

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.tokenize.vilex import ViLex, claim, described

SMALL = dict(
    tokens=5,
    image=SIZE,
    vision="vit_tiny_patch16_224",
    vision_arguments=dict(img_size=SIZE, patch_size=4, embed_dim=24, depth=1, num_heads=3),
    pooler=(24, 1, 3),
    words=9,
    places=10,
    text=(24, 2, 3),
    patch=4,
    drawn=(24, 1, 3),
    steps=3,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_a_prompt_is_bos_words_text_eos_and_nothing_behind():
    painter = ViLex(**SMALL).painter()
    words = torch.randn(2, 4, 24)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    found, there = painter.assemble(words, mask)
    table = painter.words.weight
    for b, k in ((0, 2), (1, 4)):
        expected = torch.cat([table[7:8], words[b, :k], table[8:9], torch.zeros(8 - k, 24)])
        assert torch.equal(found[b], expected)
        assert there[b].tolist() == [i < k + 2 for i in range(10)]


@torch.no_grad()
def test_prompt_with_text_and_its_mask():
    model = built("vilex")
    words, text = model.encode(pictures()).z, torch.randint(7, (3, 2))
    condition, there = model.prompt(words[:, :3], text)
    assert condition.shape == (3, 10, 24) and there.sum(1).tolist() == [3 + 2 + 2] * 3
    by_hand = torch.cat([words[:, :3], model.painter.words(text)], 1)
    torch.testing.assert_close(condition, model.prompt(by_hand)[0])
    assert not condition[:, 7:].any()


@torch.no_grad()
def test_what_is_hidden_is_irrelevant_and_later_words_do_not_reach_earlier_ones():
    model = built("vilex")
    words = model.encode(pictures()).z
    mask = torch.arange(5).expand(3, 5) < 3
    other = torch.where(mask[..., None], words, torch.randn_like(words))
    torch.testing.assert_close(model.prompt(other, mask=mask)[0], model.prompt(words[:, :3])[0])
    changed = words.clone()
    changed[:, 2] += torch.randn(24)
    away = (model.prompt(changed)[0] - model.prompt(words)[0]).abs().amax((0, 2)) > 1e-6
    assert away.tolist() == [False] * 3 + [True] * 4 + [False] * 3


@torch.no_grad()
def test_all_words_are_no_drop():
    model = built("vilex").train()
    x, t, noise = pictures(), torch.rand(3), torch.randn(3, 3, SIZE, SIZE)
    whole = model.eval().loss(x, t, noise)
    torch.testing.assert_close(model.loss(x, t, noise, k=5), whole)
    assert not torch.allclose(model.loss(x, t, noise, k=1), whole)


@torch.no_grad()
def test_tail_drop_keeps_a_number_of_its_own_of_each_picture():
    model = built("vilex").train()
    codes = model.encode(pictures(40))
    kept = model.kept(codes)
    lengths = kept.mask.sum(1)
    assert set(lengths.tolist()) == {1, 2, 3, 4, 5}
    assert model.eval().kept(codes) is codes
    model.tail_drop = False
    assert model.train().kept(codes) is codes


def test_a_given_painter_stays_as_it_is_and_passes_the_gradient_on():
    recipe = ViLex(**SMALL)
    painter = recipe.painter()
    model = recipe.build(painter=painter).train()
    before = {k: v.clone() for k, v in model.painter.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.objective(pictures()).backward()
    for part in (model.pooler, model.vision, model.out):
        assert all(p.grad is not None for p in part.parameters())
    assert all(p.grad is None for p in model.painter.parameters())
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.painter.state_dict().items())
    assert model.painter is not painter and all(p.requires_grad for p in painter.parameters())


@torch.no_grad()
def test_permuted_queries_give_permuted_words():
    model = built("vilex")
    before, order = model.latents(pictures()), torch.tensor([3, 1, 4, 0, 2])
    model.pooler.queries.copy_(model.pooler.queries[order])
    torch.testing.assert_close(model.latents(pictures()), before[:, order])


@torch.no_grad()
def test_words_begin_about_as_long_as_the_tables():
    model = ViLex(**SMALL).build()
    ratio = model.latents(pictures()).norm(dim=-1).mean() / model.painter.words.weight.norm(dim=-1).mean()
    assert 0.5 < ratio < 2


@torch.no_grad()
def test_guidance_asks_the_empty_prompt():
    model = built("vilex", guidance=3.0)
    condition = model.prompt(model.encode(pictures()).z)[0]
    empty = model.prompt(torch.zeros(3, 0, 24))
    assert empty[1].sum(1).tolist() == [2] * 3
    x = model.noise(3).clone()
    for i in range(3):
        t = torch.full((3,), i / 3)
        cond, uncond = (model.painter.velocity(x, t, c) for c in (condition, empty[0]))
        x = x + (uncond + 3 * (cond - uncond)) / 3
    torch.testing.assert_close(model.draw_prompt(condition), (x + 1) / 2)


def test_captions_are_left_out_for_guidance():
    painter = ViLex(**SMALL).painter()
    ids = torch.randint(7, (3, 2))
    losses = []
    for share, mask in ((0.0, True), (1.0, False)):
        torch.manual_seed(1)
        found = painter.captioned(pictures(), ids, share)
        torch.manual_seed(1)
        torch.rand(3, 1)
        condition = painter.encode(painter.words(ids), torch.full((3, 2), mask))[0]
        torch.testing.assert_close(found, painter.loss(pictures(), condition))
        losses.append(float(found.detach()))
    assert losses[0] != losses[1]


def test_refusals():
    recipe = ViLex(**SMALL)
    with pytest.raises(ValueError, match="words: got 9, must be 8 at most"):
        recipe.painter().assemble(torch.zeros(1, 9, 24), torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="painter: has 10 places, must have 11 for 9 words"):
        ViLex(**SMALL | dict(tokens=9)).build()


def test_captions_of_the_claim():
    x = torch.zeros(2, 3, 8, 8)
    x[0, 1, :4, 4:] = 0.55
    x[1] = 1
    found = described(x, torch.tensor([3, 17]))
    assert found[0].tolist() == [3] + [18 + 10 * i + (5 if i == 5 else 0) for i in range(12)]
    assert found[1].tolist() == [17] + [18 + 10 * i + 9 for i in range(12)] and found.max() < 138


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=8), first=1, steps=1)
    assert outcome.value > 0 and outcome.baseline > 0 and "16 words" in outcome.note

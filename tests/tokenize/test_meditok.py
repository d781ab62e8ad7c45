"""MedITok: books of a token, causal projections, where the head reads, and the two stages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.tokenizer import load_tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._phantoms import read_out, slices
from vistok.tokenize.meditok import MedITok, claim

SMALL = dict(
    image=SIZE,
    vocab_size=64,
    num_codebooks=4,
    dim=16,
    width=24,
    depth=1,
    heads=3,
    stem=8,
    mults=(1, 1, 2),
    embed=0,
    restart_after=3,
)
RECIPE = MedITok(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def teacher(dim=12):
    return FrozenVision.of("vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=dim, depth=1, num_heads=2)


@torch.no_grad()
def test_each_chunk_is_the_nearest_unit_vector_of_its_own_book():
    model, x = built("meditok"), pictures()
    codes = model.encode(x)
    assert codes.ids.shape == (3, 16, 4) and codes.bits.tolist() == [4 * 4 * 16] * 3
    torch.testing.assert_close(codes.z.square().sum(-1), torch.full((3, 16), 4.0))
    for i, part in enumerate(model.latents(x).split(4, -1)):
        table = normalize(model.bottleneck.books[i].codebook, dim=1)
        chosen = (normalize(part, dim=-1) @ table.t()).argmax(-1)
        assert torch.equal(codes.ids[..., i], chosen)
        torch.testing.assert_close(codes.z[..., 4 * i : 4 * i + 4], table[chosen])


def test_the_defaults_spend_the_papers_bits():
    recipe = MedITok()
    books = math.log2(recipe.vocab_size // recipe.num_codebooks)
    assert books == 12 and recipe.num_codebooks * books * (256 // 2 ** (len(recipe.mults) - 1)) ** 2 == 8 * 12 * 256


@torch.no_grad()
def test_a_chunk_changes_its_own_ids_only():
    model = built("meditok")
    z = model.latents(pictures())
    before = model.bottleneck(z).ids
    z[..., 4:8] = torch.randn(3, 16, 4)
    changed = (model.bottleneck(z).ids != before).any(0).any(0)
    assert changed.tolist() == [False, True, False, False]


@torch.no_grad()
def test_a_code_depends_on_features_up_to_its_place():
    model = built("meditok")
    features = torch.randn(1, 16, 24)
    before = model.down(features)
    features[:, 6] = torch.randn(24)
    changed = (model.down(features) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [i >= 6 for i in range(16)]


@torch.no_grad()
def test_one_book_is_plain_cosine_vq():
    model = replace(RECIPE, num_codebooks=1).build().eval()
    z, table = model.latents(pictures()), model.bottleneck.books[0].codebook
    ids = model.bottleneck(z).ids
    assert torch.equal(ids[..., 0], cosine_similarity(z[:, :, None], table, dim=-1).argmax(-1))


def test_the_head_reads_quantised_tokens():
    model, x = replace(RECIPE, embed=12).build().eval(), pictures()
    z = model.encode(x).z
    seen = model.head[1](model.head[0](model.up(z).mean(1)))
    torch.testing.assert_close(model.embed(z), seen / seen.norm(dim=1, keepdim=True))
    assert torch.equal(model.embed(model.codes(model.encode(x).ids).z), model.embed(z))


def test_the_loss_by_hand():
    recipe = replace(RECIPE, embed=12, contrast=0.7, cosine=0.3)
    model, x, target = recipe.build().eval(), pictures(4), torch.randn(4, 12)
    codes = model.encode(x)
    made, found = model.render(codes.z), model.embed(codes.z)
    logits = found @ normalize(target, dim=1).t() / 0.07
    own = torch.arange(4)
    contrast = (cross_entropy(logits, own) + cross_entropy(logits.t(), own)) / 2
    away = 1 - cosine_similarity(found, target).mean()
    pixels = 0.2 * (made - x).abs().mean() + (made - x).square().mean()
    parts = model.latents(x).split(4, -1)
    books = [
        1.25 * (normalize(part, dim=-1) - z).square().mean()
        for part, z in zip(parts, codes.z.split(4, -1), strict=True)
    ]
    torch.testing.assert_close(model.aligned(x, target), pixels + sum(books) / 4 + 0.7 * contrast + 0.3 * away)
    model.logit_scale.data.fill_(99.0)
    bounded = model.aligned(x, target)
    model.logit_scale.data.fill_(math.log(100))
    torch.testing.assert_close(bounded, model.aligned(x, target))


def test_the_first_stage_needs_a_teacher_and_the_second_text(tmp_path):
    seen, x = teacher(), pictures(4)
    model = replace(RECIPE, embed=12).build(seen)
    model.eval()
    torch.testing.assert_close(model.objective(x), model.aligned(x, seen(x).mean(1)))
    model.objective(x).backward()
    assert all(p.grad is not None for p in model.parameters()) and all(p.grad is None for p in seen.parameters())
    other = load_tokenizer(model.save(tmp_path))
    assert torch.equal(other.encode(x).ids, model.encode(x).ids)
    text = torch.randn(4, 12, requires_grad=True)
    other.aligned(x, text).backward()
    assert other.head[1].weight.grad.any() and text.grad is None


def test_phantoms_in_windows():
    x, label = slices(0, 6, 32)
    assert x.shape == (6, 3, 32, 32) and 0 <= float(x.min()) and float(x.max()) <= 1
    assert torch.equal(x[:, 0], x[:, 2]) and label.shape == (6,)
    again, _ = slices(3, 3, 32)
    assert torch.equal(again, x[3:])


def test_refusals():
    for make, message in (
        (
            lambda: replace(RECIPE, num_codebooks=3).build(),
            "num_codebooks: got 3, must divide the 16 channels and the 64",
        ),
        (lambda: replace(RECIPE, embed=8).build(teacher()), "teacher: has features of 12 channels, must have embed, 8"),
        (lambda: RECIPE.build().embed(torch.zeros(1, 16, 16)), "embed: got 0 in the recipe"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_claim():
    outcome = claim(TokenizeTrial(pictures=4, size=16), steps=2)
    assert outcome.metric == "findings read out of tokens" and outcome.note.count("dB") == 1
    share, fidelity = read_out(RECIPE.build().eval(), lambda z: z.mean(1), 4, SIZE)
    assert 0 <= share <= 1 and fidelity > 0

"""LookupViT: what its sheet says must hold, a start from a plain ViT and the claim."""

from __future__ import annotations

import pytest
import torch

from tests.vit.made_trial import MadeTrial, tiny_vit
from vistok.core.soft import gather_weights, return_weights
from vistok.vit.lookupvit import Lookup, LookupBlock, LookupViT, claim, compress, warm_start


def small(**given):
    torch.manual_seed(0)
    return Lookup(**(dict(image=24, patch=4, dim=16, depth=2, heads=2, sizes=(1, 2, 3)) | given)).build(5).eval()


def test_same_parameters_for_any_number():
    model, x = small(), torch.randn(2, 3, 24, 24)
    for m in ((1, 1), (2, 3), (6, 6)):
        fine, compressed = model.forward_features(x, m)
        assert fine.shape == (2, 36, 16) and compressed.shape == (2, m[0] * m[1], 16)
        assert model(x, m).shape == (2, 5)
    assert torch.equal(model(x), model(x, (2, 2)))


def test_as_many_compressed_as_fine_start_equal():
    x = torch.randn(1, 4, 6, 5)
    assert compress(x, (6, 5)) is x
    seen = []
    model = small()
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given))
    model(torch.randn(1, 3, 24, 24), (6, 6))
    assert torch.equal(*seen[0])


def test_equal_products_give_uniform_weights():
    block = LookupBlock(8, 2)
    for layer in (block.q, block.kv):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    logits, _ = block.products(torch.randn(2, 9, 8), torch.randn(2, 4, 8))
    torch.testing.assert_close(gather_weights(logits), torch.full((2, 2, 4, 9), 1 / 9))
    torch.testing.assert_close(return_weights(logits), torch.full((2, 2, 9, 4), 1 / 4))


def test_rows_sum_to_one():
    logits, _ = LookupBlock(8, 2).products(torch.randn(2, 9, 8), torch.randn(2, 4, 8))
    assert logits.shape == (2, 2, 4, 9)
    torch.testing.assert_close(gather_weights(logits).sum(3), torch.ones(2, 2, 4))
    torch.testing.assert_close(return_weights(logits).sum(3), torch.ones(2, 2, 9))


def test_permuting_fine_tokens_permutes_them_alone():
    block = LookupBlock(8, 2)
    fine, compressed, turn = torch.randn(2, 9, 8), torch.randn(2, 4, 8), torch.randperm(9)
    one, two = block(fine, compressed), block(fine[:, turn], compressed)
    torch.testing.assert_close(two[0], one[0][:, turn])
    torch.testing.assert_close(two[1], one[1])


def test_way_back_has_no_queries_or_keys_of_its_own():
    """Its parameters: a value and an output projection. And it is the softmax of the same products, written out."""
    block = LookupBlock(8, 2).double()
    own = sum(p.numel() for layer in (block.value, block.returned) for p in layer.parameters())
    rest = (block.q, block.kv, block.gathered, block.block, block.mlp)
    norms = 3 * 2 * 8
    assert sum(p.numel() for p in block.parameters()) == own + norms + sum(
        p.numel() for layer in rest for p in layer.parameters()
    )
    fine, compressed = torch.randn(1, 5, 8).double(), torch.randn(1, 3, 8).double()
    ours, inner = block(fine, compressed)
    q = block.q(block.norm_compressed(compressed))[0]
    k = block.kv(block.norm_fine(fine))[0, :, :8]
    v = block.value(inner)[0]
    back = torch.zeros(5, 8).double()
    for head in (slice(0, 4), slice(4, 8)):
        back[:, head] = (k[:, head] @ q[:, head].T / 2).softmax(1) @ v[:, head]
    expected = fine + block.returned(back)
    expected = expected + block.mlp(block.norm_mlp(expected))
    torch.testing.assert_close(ours, expected)


def test_pictures_of_a_batch_do_not_see_one_another_and_all_parameters_learn():
    model, x = small(), torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sizes_are_drawn_from_those_given():
    model, rng = small(), torch.Generator().manual_seed(0)
    assert {model.draw(rng) for _ in range(50)} == {(1, 1), (2, 2), (3, 3)}


def test_warm_start_does_what_the_vit_would():
    """With as many compressed tokens as fine ones the new parts are silent: the plain ViT without a class token."""
    vit = tiny_vit(class_token=False, global_pool="", num_classes=5, norm_layer=None)
    model = LookupViT(5, 24, 4, 16, 4, 2, (6,)).eval()
    warm_start(model, vit)
    x = torch.randn(2, 3, 24, 24)
    rows = vit.patch_embed(x) + vit.pos_embed
    for block in vit.blocks:
        rows = block(rows)
    fine, compressed = model.forward_features(x)
    torch.testing.assert_close(compressed, rows)
    torch.testing.assert_close(fine, vit.patch_embed(x) + vit.pos_embed)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="patch: got 5, must divide image, 24"):
        small(patch=5)
    with pytest.raises(ValueError, match=r"sizes: got \(7,\), must be between 1 and the 6"):
        small(sizes=(7,))
    with pytest.raises(ValueError, match=r"m: got \(7, 2\)"):
        small()(torch.zeros(1, 3, 24, 24), (7, 2))
    with pytest.raises(ValueError, match="heads: got 3"):
        LookupBlock(8, 3)


def test_claim():
    trial = MadeTrial(0.5, 0.6, 0.7)
    outcome = claim(trial, steps=2)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.5, 0.7, True)
    assert "4 tokens: 0.500, 9 tokens: 0.600, 9 tokens: 0.700" in outcome.note
    assert not claim(MadeTrial(0.5, 0.7, 0.6), steps=1).holds
    assert not claim(MadeTrial(0.5, 0.5, 0.51), steps=1).holds

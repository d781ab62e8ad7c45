"""infsa: what its sheet says must hold, the attention in a timm ViT, and the claim."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cosine_similarity

from vistok.attend.infsa import InfSA, InfSAAttention, claim, dominant, infsa, key_weights, walk_map
from vistok.bench.attend_trial import AttendTrial

VARIANTS = ("pure", "neumann", "linear", "power")


def made(b=2, heads=3, n=11, d=4, drift=0.0):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, b, heads, n, d, dtype=torch.float64)
    return q + drift, k + drift, v


def by_hand(q, k, v, rho):
    """One head of one picture, in loops: the map, its product with v, the linear form's weights and output."""
    n, d = q.shape
    products = [[max(0.0, sum(q[i, c] * k[j, c] for c in range(d)).item() / d) for j in range(n)] for i in range(n)]
    norm = sum(p * p for row in products for p in row) ** 0.5
    walks = torch.tensor([[rho * p / (norm + 1e-6) for p in row] for row in products], dtype=q.dtype)
    energy = [(q[i] / d**0.5).norm().item() for i in range(n)]
    mean = sum(e / (sum(energy) + 1e-6) * q[i] / d**0.5 for i, e in enumerate(energy))
    weights = torch.stack([(mean @ k[j] / d**0.5).relu() for j in range(n)])
    weights = rho * weights / (weights.sum() + 1e-6)
    return walks, walks @ v, weights, (weights @ v).expand(n, -1)


def test_equal_to_loops():
    q, k, v = made()
    pure, linear = infsa(q, k, v, "pure", 0.9, block=4), infsa(q, k, v, "linear", 0.9)
    for b, h in ((0, 0), (1, 2)):
        walks, hop, weights, pooled = by_hand(q[b, h], k[b, h], v[b, h], 0.9)
        torch.testing.assert_close(walk_map(q, k, 0.9)[b, h], walks)
        torch.testing.assert_close(pure[b, h], hop)
        torch.testing.assert_close(0.9 * key_weights(q, k)[b, h], weights)
        torch.testing.assert_close(linear[b, h], pooled)


def test_norm_of_the_map_is_rho_and_rows_do_not_sum_to_one():
    walks = walk_map(*made()[:2], 0.9)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(walks), torch.full((2, 3), 0.9, dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert bool((torch.linalg.matrix_norm(walks, 2) <= 0.9).all()) and bool((walks >= 0).all())
    assert bool(((walks.sum(3) - 1).abs() > 1e-3).any())


def test_partial_sums_converge_geometrically_to_the_solution():
    q, k, v = made()
    rho = 0.9
    whole = infsa(q, k, v, "neumann", rho)
    walks = walk_map(q, k, rho)
    torch.testing.assert_close(whole - walks @ whole, walks @ v)
    for hops in (1, 2, 5, 20):
        error = torch.linalg.matrix_norm(infsa(q, k, v, "neumann", rho, hops) - whole)
        assert bool((error <= rho ** (hops + 1) / (1 - rho) * torch.linalg.matrix_norm(v)).all())
    torch.testing.assert_close(infsa(q, k, v, "neumann", rho, 1), infsa(q, k, v, "pure", rho))


@pytest.mark.parametrize("variant", ["linear", "power"])
def test_linear_gives_all_tokens_one_vector_whatever_their_order(variant):
    q, k, v = made()
    out = infsa(q, k, v, variant)
    assert bool((out == out[:, :, :1]).all())
    order = torch.randperm(11)
    torch.testing.assert_close(infsa(*(t[:, :, order] for t in (q, k, v)), variant), out)


def test_power_of_one_step_is_linear_and_more_differ():
    q, k, v = made(drift=0.5)
    torch.testing.assert_close(infsa(q, k, v, "power", steps=1), infsa(q, k, v, "linear", steps=7))
    assert not torch.allclose(infsa(q, k, v, "power"), infsa(q, k, v, "linear"))


def test_scale_of_queries_does_not_matter():
    q, k, v = made()
    for variant in VARIANTS:
        torch.testing.assert_close(infsa(5 * q, k, v, variant), infsa(q, k, v, variant), rtol=1e-4, atol=1e-5)


def test_dominant_is_the_eigenvector():
    q, k, _ = made(b=1, heads=2)
    walks = (q @ k.transpose(2, 3)).relu()
    for left in (True, False):
        values, vectors = torch.linalg.eig(walks.transpose(2, 3) if left else walks)
        best = values.abs().argmax(-1)
        for h in range(2):
            true = vectors[0, h, :, best[0, h]].real.abs()
            torch.testing.assert_close(dominant(q, k, left, 300, block=4)[0, h], true / true.norm())


def test_weights_are_the_left_eigenvector_where_no_product_is_negative():
    q, k, _ = (t.abs() for t in made(n=40))
    left, right = dominant(q, k), dominant(q, k, left=False)
    torch.testing.assert_close(cosine_similarity(key_weights(q, k, 30), left, dim=2), torch.ones(2, 3).double())
    linear = key_weights(q, k)
    assert bool((cosine_similarity(linear, left, dim=2) > 0.99).all())
    assert bool((cosine_similarity(linear, left, dim=2) > cosine_similarity(linear, right, dim=2)).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_neither_sends_nor_gets(variant):
    q, k, v = made(drift=0.3)
    padded = [torch.cat([t, 9 * torch.ones_like(t[:, :, :3])], 2) for t in (q, k, v)]
    mask = (torch.arange(14) < 11).expand(2, 14)
    out = infsa(*padded, variant, mask=mask, block=5)
    torch.testing.assert_close(out[:, :, :11], infsa(q, k, v, variant))
    assert bool((out[:, :, 11:] == 0).all())


def test_gradient_in_blocks_is_that_of_the_whole():
    q, k, v = (t.requires_grad_() for t in made())
    found = [torch.autograd.grad(infsa(q, k, v, "pure", block=block).square().sum(), (q, k, v)) for block in (3, 100)]
    expected = torch.autograd.grad((walk_map(q, k) @ v).square().sum(), (q, k, v))
    for a, b, c in zip(*found, expected, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_all_products_are_negative_output_and_gradient_are_zero(variant):
    q, k, v = made()
    q, k = q.abs().requires_grad_(), -k.abs().requires_grad_()
    out = infsa(q, k, v, variant)
    grad, *_ = torch.autograd.grad(out.sum(), q)
    assert bool((out == 0).all()) and bool((grad == 0).all())


def test_state_of_the_linear_form_does_not_grow_with_the_square_of_tokens():
    sizes = {}

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes():
                sizes[n] = max(sizes.get(n, 0), out.untyped_storage().nbytes())
            return out

    for n in (256, 1024):
        given = [torch.randn(1, 1, n, 8) for _ in range(3)]
        with Seen(), torch.no_grad():
            infsa(*given, "linear")
    assert sizes[1024] == 4 * sizes[256] == 4 * 1024 * 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_rho_is_trained_and_as_released_not(variant):
    x = torch.randn(2, 9, 12)
    layer = InfSAAttention(12, 3, variant)
    assert layer.rho.item() == pytest.approx(0.95)
    layer(x).square().sum().backward()
    assert layer.rho_logit.grad is not None and bool(layer.rho_logit.grad != 0)
    released = InfSAAttention(12, 3, variant, parity="authors")
    released.load_state_dict(layer.state_dict())
    torch.testing.assert_close(released(x), layer(x))
    released(x).square().sum().backward()
    assert released.rho_logit.grad is None


def test_in_a_vit_with_its_weights():
    vit = VisionTransformer(8, 2, 1, 10, "avg", 24, 2, 3, class_token=False).eval()
    net = InfSA("pure").build(vit)
    x = torch.randn(2, 1, 8, 8)
    assert net(x).shape == (2, 10) and not torch.allclose(net(x), vit(x))
    attention, old = net.blocks[1].attn, vit.blocks[1].attn
    assert torch.equal(attention.qkv.weight, old.qkv.weight) and torch.equal(attention.proj.bias, old.proj.bias)
    tokens = torch.randn(2, 16, 24)
    q, k, v = old.qkv(tokens).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    expected = old.proj((walk_map(q, k) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(tokens), expected)


def test_what_does_not_fit_is_said():
    q, k, v = made()
    with pytest.raises(ValueError, match="variant: got 'x'"):
        infsa(q, k, v, "x")
    with pytest.raises(ValueError, match="steps: got 0"):
        infsa(q, k, v, "power", steps=0)
    with pytest.raises(ValueError, match="is_causal"):
        InfSAAttention(12, 3)(torch.randn(1, 4, 12), is_causal=True)
    with pytest.raises(ValueError, match="attn_mask: got shape"):
        InfSAAttention(12, 3)(torch.randn(1, 4, 12), torch.ones(4, 4))
    with pytest.raises(ValueError, match="heads: got 5"):
        InfSAAttention(12, 5)
    with pytest.raises(ValueError, match="rho_init: got 1"):
        InfSAAttention(12, 3, rho_init=1.0)
    with pytest.raises(ValueError, match="parity: got 'x'"):
        InfSAAttention(12, 3, parity="x")
    with pytest.raises(ValueError, match="vit: must have no norm"):
        InfSA().build(VisionTransformer(8, 2, 1, embed_dim=24, depth=1, num_heads=3, qk_norm=True))


def test_the_claim_has_its_figures():
    outcome = claim(AttendTrial(), steps=2)
    assert 0 < outcome.baseline <= 1 and 0 < outcome.value <= 1 and "2 steps" in outcome.note
    assert outcome.holds == (outcome.value >= 0.95 and outcome.value > outcome.baseline)

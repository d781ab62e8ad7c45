"""tapadl: what its sheet says must hold, TAP in a timm ViT, and the claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import unfold

from vistok.attend.tapadl import (
    PooledNorm,
    RobustAttention,
    TokenAwarePooling,
    adl_loss,
    adl_of_products,
    claim,
    corruptions,
    diversity,
    plain_vit,
)
from vistok.bench.attend_trial import AttendTrial


def products(b=2, heads=3, n=11, d=4):
    torch.manual_seed(0)
    return 3 * torch.randn(2, b, heads, n, d, dtype=torch.float64)


def attention(q, k):
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)


def adl_by_hand(maps, threshold=2.0):
    total, layers = 0.0, []
    for weights in maps:
        b, heads, n, _ = weights.shape
        total = 0.0
        for picture in weights:
            rows = [[sum(picture[h, i, j].item() for h in range(heads)) / heads for j in range(n)] for i in range(n)]
            mean = [sum(rows[i][j] for i in range(n)) / n for j in range(n)]
            mean = [m if m > threshold / n else 0 for m in mean]
            for row in rows:
                row = [r if r > threshold / n else 0 for r in row]
                size = sum(m * m for m in mean) ** 0.5 * sum(r * r for r in row) ** 0.5
                total += sum(m * r for m, r in zip(mean, row, strict=True)) / size if size else 0
        layers.append(total / (b * n))
    return sum(layers) / len(layers)


def test_one_branch_is_the_identity():
    x = torch.randn(2, 12, 8)
    assert torch.equal(TokenAwarePooling(8, 1)(x, (3, 4)), x)


def test_gate_is_a_distribution():
    gate = TokenAwarePooling(8).gate(torch.randn(2, 8, 5, 3))
    assert gate.shape == (2, 4, 5, 3) and bool((gate >= 0).all())
    torch.testing.assert_close(gate.sum(1), torch.ones(2, 5, 3))


@pytest.mark.parametrize("branch", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(5, 7), (2, 3), (1, 1)])
def test_a_branch_is_a_mean_of_nine(monkeypatch, branch, size):
    tap = TokenAwarePooling(4)
    forced = torch.eye(4)[branch].view(1, 4, 1, 1).expand(2, -1, *size)
    monkeypatch.setattr(tap, "gate", lambda x: forced)
    x = torch.randn(2, 4, *size)
    parts = unfold(x, 3, branch or 1, branch or 1).view(2, 4, 9, *size)
    torch.testing.assert_close(tap.pool(x), parts.mean(2) if branch else x)


def test_prefix_tokens_stay_and_are_not_pooled():
    tap = TokenAwarePooling(4).eval()
    x = torch.randn(2, 14, 4)
    out = tap(x, (3, 4))
    assert torch.equal(out[:, :2], x[:, :2])
    torch.testing.assert_close(out[:, 2:], tap(x[:, 2:], (3, 4)))


def test_loss_equal_to_loops():
    maps = [attention(*products()), attention(*products(heads=1))]
    assert adl_loss(maps).item() == pytest.approx(adl_by_hand(maps)) and 0 < adl_loss(maps) < 1
    assert adl_loss(maps, 1.0).item() == pytest.approx(adl_by_hand(maps, 1.0))


def test_loss_of_equal_rows_is_one_and_of_the_identity_zero():
    row = torch.tensor([0.7, 0.3, 0, 0, 0, 0, 0, 0])
    assert adl_loss([row.expand(2, 2, 8, 8)]).item() == pytest.approx(1)
    same = torch.eye(5).expand(2, 1, 5, 5).clone().requires_grad_()
    loss = adl_loss([same])
    loss.backward()
    assert loss.item() == 0 and bool(same.grad.isfinite().all())


def test_gradient_is_zero_where_masked_and_reaches_q_and_k():
    q, k = (x.requires_grad_() for x in products(b=1, heads=1))
    maps = attention(q, k)
    maps.retain_grad()
    adl_loss([maps]).backward()
    least = 2 / 11
    seen = (maps > least) | (maps.mean(2, keepdim=True) > least)
    assert bool((maps.grad[~seen] == 0).all()) and bool((~seen).any()) and bool(maps.grad.any())
    assert bool(q.grad.any()) and bool(k.grad.any())


def test_loss_of_one_picture_and_as_released():
    maps = [attention(*products(b=1))]
    assert adl_loss(maps).item() == pytest.approx(adl_by_hand(maps)) and adl_loss(maps) > 0
    assert adl_loss(maps, parity="authors").item() == 0
    two = [attention(*products())]
    assert adl_loss(two, parity="authors").item() == pytest.approx(adl_loss(two).item() / (1 + 1e-6), abs=1e-12)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_loss_in_blocks(block):
    q, k = (x.requires_grad_() for x in products())
    whole = adl_loss([attention(q, k)])
    found = adl_of_products(q, k, block=block)
    torch.testing.assert_close(found, whole)
    for a, b in zip(torch.autograd.grad(found, (q, k)), torch.autograd.grad(whole, (q, k)), strict=True):
        torch.testing.assert_close(a, b)


def test_tap_in_a_vit_changes_what_attention_sees_alone():
    vit = plain_vit(0)
    net = RobustAttention(scales=1).build(vit)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(net(x), vit(x))  # one branch: the vit itself
    assert not any("tap" in name for name, _ in vit.named_modules())
    net = RobustAttention().build(vit).eval()
    block, seen = net.blocks[0], []
    block.attn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tokens = torch.randn(2, 16, net.embed_dim)
    out = block(tokens)
    torch.testing.assert_close(seen[0], block.norm1.norm(block.norm1.tap(tokens, (4, 4))))
    rest = tokens + block.attn(seen[0])
    torch.testing.assert_close(out, rest + block.mlp(block.norm2(rest)))


def test_loss_of_a_vit_is_that_of_its_maps():
    vit, x = plain_vit(0), torch.randn(2, 1, 8, 8)
    seen = []
    hooks = [b.attn.qkv.register_forward_hook(lambda _, given, out: seen.append(out)) for b in vit.blocks]
    with diversity(vit) as found:
        vit(x)
    for hook in hooks:
        hook.remove()
    maps = [attention(*qkv.unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)[:2]) for qkv in seen]
    torch.testing.assert_close(torch.stack(found).mean(), adl_loss(maps))
    assert len(found) == 3 and not any(b.attn.qkv._forward_hooks for b in vit.blocks)
    vit(x)
    assert len(found) == 3


def test_trains_with_the_loss():
    system = RobustAttention()
    net = system.build(plain_vit(0))
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    system.loss(net, x, labels).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    lighter = RobustAttention(weight=0).loss(net.eval(), x, labels)
    torch.testing.assert_close(lighter, torch.nn.functional.cross_entropy(net(x), labels))


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="grid: got 4 x 4"):
        TokenAwarePooling(4)(torch.randn(1, 9, 4), (4, 4))
    with pytest.raises(ValueError, match="scales: got 0"):
        TokenAwarePooling(4, 0)
    with pytest.raises(ValueError, match="maps: got none"):
        adl_loss([])


@pytest.mark.parametrize("better", [True, False])
def test_the_claim_can_hold_and_can_fail(better):
    class Trial(AttendTrial):
        def accuracy(self, model, change=None):
            robust = isinstance(model.blocks[0].norm1, PooledNorm)
            return (0.8 if robust == better else 0.6) - 0.1 * (change is not None)

    outcome = claim(Trial(), steps=2)
    assert outcome.holds is better and (outcome.value > outcome.baseline) is better and "2 steps" in outcome.note


def test_corruptions_change_pictures_and_keep_their_shape():
    x = torch.rand(50, 1, 8, 8) * 2 - 1
    first, again = (change(x) for change in (corruptions(1)["noise"], corruptions(1)["noise"]))
    assert torch.equal(first, again)
    for change in corruptions(0).values():
        assert change(x).shape == x.shape and not torch.equal(change(x), x)
    torch.testing.assert_close(corruptions(0)["blur"](torch.ones(1, 1, 8, 8))[0, 0, 3, 3], torch.tensor(1.0))

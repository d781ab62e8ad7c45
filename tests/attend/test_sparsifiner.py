"""sparsifiner: what its sheet says must hold, the network, its training and the claim."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy, kl_div

from vistok.attend import sparsifiner
from vistok.attend.sparsifiner import (
    ConnectivityPredictor,
    Sparsifiner,
    SparsifinerAttention,
    claim,
    prune,
    sparsifiner_losses,
    teach,
    trace_teacher,
)
from vistok.bench.attend_trial import AttendTrial


def vit(depth=3, **how):
    torch.manual_seed(0)
    return VisionTransformer(8, 2, 1, embed_dim=24, depth=depth, num_heads=3, num_classes=10, **how).eval()


def attention(keep_rate=0.3, tokens=11, **how):
    torch.manual_seed(0)
    return SparsifinerAttention(12, 3, tokens, keep_rate, **{"n_factor": 3, **how}).double()


def made(tokens=11, b=2):
    return torch.randn(b, tokens, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plain(layer, x, mask=None):
    """Attention with the layer's weights, under a mask, written out."""
    q, k, v = layer.split(x)
    logits = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    return layer.proj((logits.softmax(3) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("executor", ["auto", "dense"])
def test_all_keys_are_dense_attention(executor):
    layer, x = attention(1.0, executor=executor), made()
    out, _, mask = layer(x)
    assert bool(mask.all())
    torch.testing.assert_close(out, plain(layer, x))


@pytest.mark.parametrize("executor", ["auto", "dense"])
@pytest.mark.parametrize(("keep_rate", "keys"), [(0.1, 2), (0.3, 4), (0.25, 3)])
def test_rows_have_exactly_k_keys_and_are_attention_under_the_mask(executor, keep_rate, keys):
    layer, x = attention(keep_rate, executor=executor), made()
    out, scores, mask = layer(x)
    assert bool((mask[:, :, 1:].sum(3) == keys).all()) and bool(mask[:, :, 0].all())
    kept = scores.masked_fill(~mask[:, :, 1:], torch.inf).amin(3)
    assert bool((kept >= scores.masked_fill(mask[:, :, 1:], -torch.inf).amax(3)).all())
    torch.testing.assert_close(out, plain(layer, x, mask))


def test_connectivity_by_hand():
    layer, x = attention(), made(b=1)
    predictor = layer.mask_predictor
    q, k, _ = layer.split(x)
    found = predictor(q, k)
    for head in range(3):
        q_, k_ = predictor.proj_c_q(q[0, head]), predictor.proj_c_k(k[0, head])
        summaries = k_.T @ predictor.proj_n
        basis = predictor.proj_back_n.abs().T
        basis = torch.where(basis > 0.02, basis, 0)
        for i in range(1, 11):
            coef = (q_[i] @ summaries / 2**0.5).softmax(0)
            torch.testing.assert_close(found[0, head, i - 1], coef @ basis)  # 3 summaries: all of the 8 largest stay


def test_largest_coefficients_and_thresholds():
    layer, x = attention(n_factor=2, coef_topk=2), made()
    q, k, _ = layer.split(x)
    coef = layer.mask_predictor.coefficients(q, k)
    assert bool(((coef > 0).sum(3) == 2).all())
    layer.mask_predictor.reconstructs = True
    whole = layer.mask_predictor.coefficients(q, k)
    torch.testing.assert_close(whole.sum(3), torch.ones_like(whole[..., 0]))
    torch.testing.assert_close(coef.amax(3), whole.amax(3))
    other = attention(0, score_threshold=0.2, coef_topk=0, coef_threshold=0.3)
    out, scores, mask = other(x)
    assert torch.equal(mask[:, :, 1:], scores > 0.2)
    expected = plain(other, x, mask)  # a row that sees nothing gives 0
    assert bool(mask.any(3).all()) or not torch.equal(out, expected)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_ties_go_to_the_lower_index(k):
    x = torch.randint(3, (40, 6), generator=torch.Generator().manual_seed(0)).float()
    found = sparsifiner._largest(x, k)
    for row, mask in zip(x.tolist(), found, strict=True):
        assert mask.nonzero()[:, 0].tolist() == sorted(sorted(range(6), key=lambda i: (-row[i], i))[:k])


def test_a_row_that_sees_nothing_gives_zero():
    layer, x = attention(0, score_threshold=100.0), made()
    out, _, mask = layer(x)
    assert not bool(mask[:, :, 1:].any())
    torch.testing.assert_close(out[:, 1:], layer.proj.bias.expand_as(out[:, 1:]))


def test_no_gradient_through_the_choice_of_keys():
    layer, x = attention(), made()
    out, _, _ = layer(x)
    out.square().sum().backward(retain_graph=True)
    assert all(p.grad is None or not bool(p.grad.any()) for p in layer.mask_predictor.parameters())
    assert bool(layer.qkv.weight.grad.any())
    layer.mask_predictor.reconstructs = True
    layer(x)[1].square().sum().backward()
    assert all(bool(p.grad.any()) for p in layer.mask_predictor.parameters())


def test_rank_of_the_connectivity_while_it_reconstructs():
    layer, x = attention(n_factor=4), made()
    layer.mask_predictor.reconstructs = True
    out, scores, _ = layer(x)
    assert int(torch.linalg.matrix_rank(scores).max()) <= 2
    torch.testing.assert_close(out, plain(layer, x))  # attention is dense in this phase


def test_learns_a_map_of_low_rank():
    """A patch's row is one of r known ones, by its kind: the keys of the trained predictor come to be theirs."""
    torch.manual_seed(0)
    n, r, keys = 24, 4, 6
    basis = torch.zeros(r, n)
    for i in range(r):
        basis[i, 6 * i : 6 * i + 6] = torch.linspace(0.1, 0.2333, 6)
    kind = torch.randint(r, (64, n - 1))
    codes = 3 * torch.eye(r, 8)
    q = torch.cat([torch.zeros(64, 1, 8), codes[kind]], 1)[:, None]
    k = torch.randn(64, 1, n, 8)
    k[:, :, :, :r] = 0.1 * k[:, :, :, :r] + 3 * torch.eye(r).repeat_interleave(6, 0)
    wanted = basis[kind][:, None]
    predictor = ConnectivityPredictor(8, 1, n, n_factor=6, c_factor=1)

    def recall(scores):
        return wanted.gather(3, scores.topk(keys, 3).indices).gt(0).float().mean().item()

    predictor.proj_back_n = torch.nn.Parameter(basis.T.clone(), requires_grad=False)
    assert recall(predictor(q, k)) < 0.5
    predictor.reconstructs = True
    optimizer = torch.optim.Adam([p for p in predictor.parameters() if p.requires_grad], lr=0.03)
    for _ in range(60):
        loss = (predictor(q, k) - wanted).square().sum(3).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predictor.reconstructs = False
    assert recall(predictor(q, k)) > 0.99
    assert recall(torch.rand(64, 1, n - 1, n)) == pytest.approx(keys / n, abs=0.02)


def test_parity_is_the_scale():
    for parity, scale in (("authors", 3**-0.5), ("paper", 2**-0.5)):
        assert attention(parity=parity).mask_predictor.scale == scale
    x = made()
    mine, theirs = (attention(parity=p)(x)[1] for p in ("paper", "authors"))
    assert not torch.allclose(mine, theirs)


def test_pruned_tokens_are_as_good_as_masked():
    """Dropping is what the released code does by zeros and a mask."""
    layer, x = attention(0.5), made()
    q, k, _ = layer.split(x)
    keep = prune(q, k, 5)
    cls = (q[:, :, :1] @ k.transpose(2, 3) / 2).softmax(3).mean(1)[:, 0, 1:]
    assert keep[:, 1:].tolist() == (cls.topk(5).indices + 1).sort(1).values.tolist() and not bool(keep[:, 0].any())
    short = x.gather(1, keep[..., None].expand(-1, -1, 12))
    out, scores, mask = layer(short, keep)
    assert bool((mask[:, :, 1:].sum(3) == 5).all())  # of 6 keys, at most the patches that live
    live = torch.zeros(2, 11, dtype=torch.bool).scatter(1, keep, True)
    predictor = layer.mask_predictor
    kc = predictor.proj_c_k(k) * live[:, None, :, None]
    coef = (predictor.proj_c_q(q[:, :, 1:]) @ (kc.transpose(2, 3) @ predictor.proj_n) / 2**0.5).softmax(3)
    whole = coef @ predictor.basis()
    for n in range(2):
        torch.testing.assert_close(scores[n], whole[n][:, keep[n, 1:] - 1][:, :, keep[n]])
    torch.testing.assert_close(out, plain(layer, short, mask))


def test_network_with_all_keys_is_the_vit():
    net, x = vit(), torch.randn(2, 1, 8, 8)
    student = Sparsifiner(keep_rate=1.0).build(net)
    torch.testing.assert_close(student.eval()(x), net(x))
    assert type(net.blocks[0].attn).__name__ == "Attention"
    student = Sparsifiner(keep_rate=0.2).build(net).eval()
    student.reconstruct(True)
    torch.testing.assert_close(student(x), net(x))
    student.reconstruct(False)
    assert not torch.allclose(student(x), net(x))


def test_network_prunes():
    student = Sparsifiner(token_keep=0.5, prune_at=(0, 1)).build(vit()).eval()
    with torch.no_grad():
        found = student.trace(torch.randn(2, 1, 8, 8))
    assert found.keep.shape == (2, 5) and [m.shape[3] for m in found.maps] == [17, 9, 5]
    assert bool((found.keep[:, 1:] > found.keep[:, :-1]).all()) and not bool(found.keep[:, 0].any())


def test_losses():
    net, x, labels = vit(), torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    teacher = trace_teacher(net, x)
    student = Sparsifiner(n_factor=4).build(net).eval()
    made = student.trace(x)
    found = sparsifiner_losses(made, teacher, labels)
    torch.testing.assert_close(found["classes"], cross_entropy(made.logits, labels))
    kl = kl_div(made.logits.log_softmax(1), teacher.logits.softmax(1), reduction="none").sum(1).mean()
    torch.testing.assert_close(found["logits"], kl)
    each = [
        sum((a[n] - b[n]).square().sum() for n in range(2)) / 2 for a, b in zip(made.maps, teacher.maps, strict=True)
    ]
    torch.testing.assert_close(found["maps"], sum(each) / 3)
    assert all(m.shape == (2, 3, 16, 17) and not m.requires_grad for m in teacher.maps)
    torch.testing.assert_close(teacher.maps[0].sum(3), torch.ones(2, 3, 16))
    sum(found.values()).backward()
    assert all(p.grad is not None for p in student.parameters())
    pruned = Sparsifiner(n_factor=4, token_keep=0.5, prune_at=(1,)).build(net).eval().trace(x)
    assert sparsifiner_losses(pruned, teacher, labels)["tokens"].isfinite()


def test_training_in_two_phases():
    net = vit(depth=1)
    student = Sparsifiner(n_factor=4, executor="dense").build(net)
    before = {n: p.clone() for n, p in student.named_parameters()}
    teach(AttendTrial(), student, net, 2, 0 + 1)
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved >= {n for n in before if "mask_predictor" in n} and any("mlp" in n for n in moved)
    assert not student.predictors[0].reconstructs


def test_counted_operations():
    dense, sparse = Sparsifiner(keep_rate=1.0).flops(197, 64)
    assert dense == 4 * 197**2 * 64 < sparse
    assert Sparsifiner().flops(197, 64)[1] < dense


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="n_factor, c_factor: got 20, 2"):
        attention(n_factor=20)
    with pytest.raises(ValueError, match="keep_rate: got 2"):
        attention(2)
    with pytest.raises(ValueError, match="parity: got 'x'"):
        attention(parity="x")
    with pytest.raises(ValueError, match="vit: must have a class token"):
        Sparsifiner().build(vit(class_token=False, global_pool="avg"))
    with pytest.raises(ValueError, match="prune_at: got block 9"):
        Sparsifiner(token_keep=0.5).build(vit())


@pytest.mark.parametrize(("after", "holds"), [(0.9, True), (0.88, False)])
def test_the_claim_can_hold_and_can_fail(monkeypatch, after, holds):
    class Trial(AttendTrial):
        def fit(self, model, steps, **how):
            return [0.0] * steps

        def accuracy(self, model, change=None):
            return after if isinstance(model, sparsifiner.SparseViT) else 0.903

    monkeypatch.setattr(Sparsifiner, "flops", lambda self, tokens, head_dim: (100, 50))
    outcome = claim(Trial(), steps=5)
    assert outcome.holds is holds and "50% fewer" in outcome.note and "5 of 17 keys" in outcome.note

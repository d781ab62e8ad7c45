"""transnext: what its sheet says must hold, the backbone and the claim."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import Mlp
from torch.nn.functional import gelu, normalize, softplus

import vistok
from vistok.attend.transnext import AggregatedAttention, ConvGLU, DenseAttention, TransNeXt, _offsets, claim, reach
from vistok.core.attention import CoarseKV, Dense, Halo, attend


def attention(size, sr=2, window=3, seed=0, **how):
    """An operator whose every parameter is at random."""
    torch.manual_seed(seed)
    attn = AggregatedAttention(8, 2, size, sr, window, **how).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.normal_(std=0.5)
    return attn


def made(size, b=2, dim=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(b, size[0] * size[1], dim, dtype=torch.float64, generator=rng)


def far_tokens(attn, x, size):
    """Mean over blocks of sr x sr, which divide the map."""
    h, w = size[0] // attn.sr, size[1] // attn.sr
    each = gelu(x @ attn.sr_conv.weight[:, :, 0, 0].T + attn.sr_conv.bias)
    blocks = each.unflatten(1, size).unflatten(2, (w, attn.sr)).unflatten(1, (h, attn.sr))
    return attn.norm(blocks.mean((2, 4)).flatten(1, 2))


def bias_by_hand(attn, size, query, key):
    """(heads,) of a query (y, x) and a pooled key."""
    logs = []
    for axis in range(2):
        far = (query[axis] - (key[axis] * attn.sr + (attn.sr - 1) / 2)) / max(attn.trained[axis] - 1, 1) * 8
        logs.append(math.copysign(math.log2(abs(far) + 1) / 3, far))
    return attn.cpb_fc2(attn.cpb_fc1(torch.tensor(logs, dtype=torch.float64)).relu())


def by_hand(attn, x, size):
    """One query and head at a time; also the sums of all weights."""
    (h, w), (ph, pw), d, reach_ = size, attn.pooled(size), 4, attn.window // 2
    kv, far_kv = attn.kv(x), attn.kv(far_tokens(attn, x, size))
    out, sums = torch.zeros_like(x), []
    for b in range(len(x)):
        for head in range(2):
            part, values = slice(head * d, head * d + d), slice(8 + head * d, 8 + head * d + d)
            for i in range(h * w):
                y0, x0 = i // w, i % w
                unit = normalize(attn.q(x)[b, i, part], dim=0)
                near = [(y0 + a, x0 + c) for a in range(-reach_, reach_ + 1) for c in range(-reach_, reach_ + 1)]
                valid = [0 <= y < h and 0 <= c < w for y, c in near]
                scale = softplus(attn.temperature[head, 0, 0]) * math.log(sum(valid) + ph * pw)
                q = (unit + attn.query_embedding[head, 0]) * scale
                logits, seen, taken = [], [], []
                for j, (y, c) in enumerate(near):
                    if valid[j]:
                        key = normalize(kv[b, y * w + c, part], dim=0)
                        logits.append(q @ key + attn.relative_pos_bias_local[head, j])
                        seen.append(kv[b, y * w + c, values])
                        taken.append(j)
                for p in range(ph * pw):
                    key = normalize(far_kv[b, p, part], dim=0)
                    logits.append(q @ key + bias_by_hand(attn, size, (y0, x0), (p // pw, p % pw))[head])
                    seen.append(far_kv[b, p, values])
                weights = torch.stack(logits).softmax(0)
                sums.append(weights.sum())
                token = unit @ attn.learnable_tokens[head] + attn.learnable_bias[head, 0]
                result = weights @ torch.stack(seen)
                for place, j in enumerate(taken):
                    result = result + token[j] * seen[place]
                out[b, i, part] = result
    return attn.proj(out), torch.stack(sums)


@pytest.mark.parametrize(("size", "window"), [((4, 4), 3), ((2, 6), 3), ((4, 2), 5)])
def test_equal_to_a_loop(size, window):
    attn = attention(size, window=window)
    x = made(size)
    with torch.no_grad():
        expected, sums = by_hand(attn, x, size)
        torch.testing.assert_close(attn(x, size), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_without_learned_tokens_it_is_one_softmax_over_fine_and_pooled_keys():
    """The masked softmax that ``attend`` makes of the pattern."""
    size = (4, 6)
    attn, x = attention(size), made(size)
    for p in (attn.learnable_tokens, attn.learnable_bias):
        torch.nn.init.zeros_(p)
    with torch.no_grad():
        k, v = attn.split(attn.kv(x), 2)
        far_k, far_v = attn.split(attn.kv(far_tokens(attn, x, size)), 2)
        pattern = CoarseKV((Halo(size, 1, 1), Dense(24, 6)), (0.0, 0.0))
        mask = Halo(size, 1, 1).to_dense()[0, 0]
        q = attn.scaled(normalize(attn.split(attn.q(x), 1)[0], dim=3), mask.sum(1) + 6)
        near = torch.zeros(2, 24, 24, dtype=torch.float64)
        for i, j in mask.nonzero().tolist():
            offset = (j // 6 - i // 6 + 1) * 3 + j % 6 - i % 6 + 1
            near[:, i, j] = attn.relative_pos_bias_local[:, offset]
        bias = torch.cat([near, attn.position_bias(size)], 2)
        keys = normalize(torch.cat([k, far_k], 2), dim=3)
        out = attend(q, keys, torch.cat([v, far_v], 2), pattern, bias, 1.0, executor="dense")
        torch.testing.assert_close(attn(x, size), attn.proj(out.transpose(1, 2).flatten(2)), rtol=1e-6, atol=1e-6)


def test_how_many_neighbours_there_are():
    inside = attention((4, 5))._inside((4, 5), torch.device("cpu")).sum(1).view(4, 5).tolist()
    assert inside == [[4, 6, 6, 6, 4], [6, 9, 9, 9, 6], [6, 9, 9, 9, 6], [4, 6, 6, 6, 4]]


def test_the_length_of_queries_and_keys_does_not_matter():
    size = (4, 4)
    attn, other, x = attention(size), attention(size), made(size)
    with torch.no_grad():
        for p in (other.q.weight, other.q.bias, other.kv.weight, other.kv.bias):
            p[:8] *= 7.0  # all of q, and the keys
        torch.testing.assert_close(attn(x, size), other(x, size))
        other.kv.bias[8:] *= 7.0
        assert not torch.allclose(attn(x, size), other(x, size))


def test_every_pixel_reaches_every_place():
    size = (4, 6)
    attn, x = attention(size), made(size, 1)
    given = torch.autograd.functional.jacobian(lambda x: attn(x, size).square().sum(2), x)[0, :, 0]
    assert bool((given != 0).any(2).all()) and reach(attn, x, size) == 1


def test_offsets():
    far, which = _offsets(4, 2, 4)
    expected = [(q - (2 * k + 0.5)) / 3 * 8 for q in range(4) for k in range(2)]
    expected = torch.tensor([math.copysign(math.log2(abs(r) + 1) / 3, r) for r in expected])
    torch.testing.assert_close(far[which].flatten(), expected)
    assert len(far) == 6  # of eight pairs


def test_a_map_of_another_size():
    """Extrapolated by its own offsets, or the bias of training, interpolated; a small map has one pooled token."""
    attn, table = attention((4, 4)), attention((4, 4), extrapolation=False)
    with torch.no_grad():
        assert torch.equal(attn.position_bias((4, 4)), table.position_bias((4, 4)))
        assert attn.position_bias((6, 5)).shape == table.position_bias((6, 5)).shape == (2, 30, 6)
        assert not torch.allclose(attn.position_bias((6, 5)), table.position_bias((6, 5)))
        for size in ((1, 1), (5, 3), (7, 6)):
            assert bool(attn(made(size), size).isfinite().all()) and bool(table(made(size), size).isfinite().all())


def test_dense_attention_equals_a_loop():
    torch.manual_seed(0)
    size, attn = (3, 2), DenseAttention(8, 2, (3, 2)).double()
    x = made(size, 1)
    with torch.no_grad():
        q, k, v = (t[0].unflatten(1, (2, 4)).transpose(0, 1) for t in attn.qkv(x).chunk(3, 2))
        out = torch.zeros(2, 6, 4, dtype=torch.float64)
        for head in range(2):
            for i in range(6):
                row = (normalize(q[head, i], dim=0) + attn.query_embedding[head, 0]) * softplus(attn.temperature[head])
                logits = [
                    (row[0] * normalize(k[head, j], dim=0)).sum() * math.log(6)
                    + bias_by_hand(attn, size, (i // 2, i % 2), (j // 2, j % 2))[head]
                    for j in range(6)
                ]
                out[head, i] = torch.stack(logits).softmax(0) @ v[head]
        expected = attn.proj(out.transpose(0, 1).flatten(1))
        torch.testing.assert_close(attn(x, size)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: attention((3, 4)), lambda: DenseAttention(8, 2, (3, 4)).double()])
def test_gradients(make):
    attn, x = make(), made((3, 4), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attn(x, (3, 4)), (x,), fast_mode=True)
    attn(x, (3, 4)).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in attn.parameters())


def test_an_open_gate_and_a_kernel_of_its_centre_make_an_ordinary_mlp():
    torch.manual_seed(0)
    glu, hidden = ConvGLU(6, 3), 12
    mlp = Mlp(6, hidden)
    with torch.no_grad():
        glu.fc1.weight[hidden:], glu.fc1.bias[hidden:] = 0, 1
        glu.dwconv.weight.zero_()[:, :, 1, 1] = 1
        glu.dwconv.bias.zero_()
        mlp.fc1.weight.copy_(glu.fc1.weight[:hidden])
        mlp.fc1.bias.copy_(glu.fc1.bias[:hidden])
    mlp.fc2.load_state_dict(glu.fc2.state_dict())
    x = torch.randn(2, 20, 6)
    torch.testing.assert_close(glu(x, (4, 5)), mlp(x))


def test_backbone():
    torch.manual_seed(0)
    small = TransNeXt(image=96, sr=(4, 2, 2, 1), mlp_ratios=(2, 2, 2, 2), head_dim=4)
    net = small.of((8, 8, 16, 16), (1, 1, 1, 1), num_classes=3)
    x = torch.randn(2, 3, 75, 96)
    net(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    maps = small.of((8, 8, 16, 16), (1, 1, 1, 1), features_only=True)
    shapes = [tuple(m.shape) for m in maps(x)]
    assert shapes == [(2, 8, 19, 24), (2, 8, 10, 12), (2, 16, 5, 6), (2, 16, 3, 3)]
    assert maps.feature_info.channels() == [8, 8, 16, 16] and maps.feature_info.reduction() == [4, 8, 16, 32]
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:1], net(x[:1]))


@pytest.mark.parametrize(("size", "millions"), [("micro", 12.8), ("tiny", 28.2), ("small", 49.7), ("base", 89.7)])
def test_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        net = vistok.create("transnext", size=size).build()
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_what_does_not_fit_is_said():
    for call, said in (
        (lambda: AggregatedAttention(8, 3, (4, 4), 2), "heads: got 3"),
        (lambda: AggregatedAttention(8, 2, (4, 4), 2, 4), "window: got 4, must be odd"),
        (lambda: TransNeXt("huge").build(), "size: got 'huge'"),
        (lambda: TransNeXt(sr=(2, 1)).build(), "sr: got 2 for"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize(("aggregated", "holds"), [(1.0, True), (3.0, False)])
def test_the_claim_can_hold_and_can_fail(aggregated, holds):
    class Trial:
        seed = 0

        def milliseconds(self, runs):
            with torch.no_grad():
                assert runs["aggregated"]().shape == runs["dense"]().shape
            return {"dense": 2.0, "aggregated": aggregated}

    outcome = claim(Trial())
    assert outcome.holds is holds and "100% of the pixels" in outcome.note

"""qihoo-t2x: what its sheet says must hold, the network on pictures and latents, and the claim."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode

from vistok.attend.qihoo_t2x import PlainBlock, PTDiT, PTDiTBlock, block_flops, claim, half, proxy_tokens, shapes
from vistok.bench.attend_trial import AttendTrial
from vistok.core import flops
from vistok.core.attention import Window

SIZE, WINDOW, CELL = (2, 4, 8), (1, 4, 4), (2, 2)


def block(awake=True, **how):
    torch.manual_seed(0)
    made = PTDiTBlock(12, 3, **{"window": WINDOW, "cell": CELL, **how}).double()
    if awake:
        for p in made.parameters():
            nn.init.normal_(p, std=0.3)
    return made


def tokens(b=2, size=SIZE, dim=12):
    n = size[0] * size[1] * size[2]
    return torch.randn(b, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def modulation(b=2, dim=12):
    return torch.randn(b, 6 * dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def norm(x):
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def plain(layer, x, context, mask=None):
    """One attention, head by head."""
    d = x.shape[-1] // layer.heads
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    out = []
    for h in range(layer.heads):
        part = slice(h * d, (h + 1) * d)
        logits = q[..., part] @ k[..., part].transpose(-1, -2) / d**0.5
        logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
        out.append(logits.softmax(-1) @ v[..., part])
    return layer.to_out(torch.cat(out, -1))


def windows_by_hand(size, window, shift):
    """(N, N) bool: whether two places lie in one window, the grid cut at shift, shift + window and so on."""
    places = [(f, h, w) for f in range(size[0]) for h in range(size[1]) for w in range(size[2])]
    names = [tuple((p - s) // n for p, s, n in zip(place, shift, window, strict=True)) for place in places]
    return torch.tensor([[a == b for b in names] for a in names])


def block_by_hand(made, x, size, given, text, layout="cell"):
    """One sample after the other."""
    outs = []
    for i, sample in enumerate(x):
        chunk = (given[i].view(6, -1) + made.scale_shift_table).unbind(0)
        grid = sample.view(*size, -1)
        proxies = []
        for f in range(size[0]):
            for r in range(0, size[1], made.cell[0]):
                for c in range(0, size[2], made.cell[1]):
                    proxies.append(grid[f, r : r + made.cell[0], c : c + made.cell[1]].flatten(0, 1).mean(0))
        proxies = torch.stack(proxies)
        proxies = proxies + plain(made.proxy_attn1, norm(proxies), norm(proxies))
        sample = sample + made.linear_1_visual(plain(made.pvisual_attn2, norm(sample), norm(proxies)))
        seen = norm(sample) * (1 + chunk[1]) + chunk[0]
        sample = sample + chunk[2] * plain(made.attn1, seen, seen, windows_by_hand(size, made.window, (0, 0, 0)))
        moved = (given[i].view(6, -1)[:3] + made.proxy_scale_shift_table).unbind(0)
        seen = norm(sample) * (1 + moved[1]) + moved[0]
        mask = windows_by_hand(size, made.window, half(made.window))
        sample = sample + made.linear_2(moved[2] * plain(made.attn3, seen, seen, mask))
        sample = sample + plain(made.attn2, sample, text[i])
        outs.append(sample + chunk[5] * made.ff(norm(sample) * (1 + chunk[4]) + chunk[3]))
    return torch.stack(outs)


def test_block_equal_to_one_by_hand():
    made, x, given = block(), tokens(), modulation()
    text = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(made(x, SIZE, given, text), block_by_hand(made, x, SIZE, given, text))


def test_new_block_is_a_windowed_block_with_text():
    made, x, given = block(awake=False, text=False), tokens(), modulation()
    shift, scale, gate, shift2, scale2, gate2 = (given.unflatten(1, (6, -1)) + made.scale_shift_table).unbind(1)
    seen = norm(x) * (1 + scale[:, None]) + shift[:, None]
    mask = windows_by_hand(SIZE, WINDOW, (0, 0, 0))
    expected = x + gate[:, None] * plain(made.attn1, seen, seen, mask)
    expected = expected + gate2[:, None] * made.ff(norm(expected) * (1 + scale2[:, None]) + shift2[:, None])
    torch.testing.assert_close(made(x, SIZE, given), expected)


def test_plain_block_is_a_block_of_one_window_before_its_proxies_wake():
    torch.manual_seed(0)
    made = PTDiTBlock(12, 3, SIZE, (4, 8), shift=False, text=False).double()
    other = PlainBlock(12, 3).double()
    missing = other.load_state_dict(made.state_dict(), strict=False)
    assert not missing.missing_keys and {n.split(".")[0] for n in missing.unexpected_keys} == {
        "proxy_attn1",
        "pvisual_attn2",
        "linear_1_visual",
    }
    torch.testing.assert_close(other(tokens(), SIZE, modulation()), made(tokens(), SIZE, modulation()))


def test_cells_of_one_token_are_the_tokens():
    x = torch.randn(2, *SIZE, 5)
    assert torch.equal(proxy_tokens(x, WINDOW, (1, 1)), x.flatten(1, 3))


@pytest.mark.parametrize("layout", ["cell", "interleaved"])
def test_proxies_by_hand(layout):
    x, window, cell = torch.randn(1, 4, 4, 8, 3), (2, 4, 4), (2, 4)
    found = proxy_tokens(x, window, cell, layout=layout)[0]
    expected = []
    for f in (0, 2):
        for r in range(2):
            for first in (0, 4):
                rows = slice(2 * r, 2 * r + 2) if layout == "cell" else slice(r, 4, 2)
                expected.append(x[0, f : f + 2, rows, first : first + 4].flatten(0, 2).mean(0))
    torch.testing.assert_close(found, torch.stack(expected))


def test_proxies_of_constant_pictures_are_their_tokens():
    x = torch.randn(2, 1, 1, 1, 5).expand(2, *SIZE, 5)
    for mode in ("mean", "first", "random"):
        found = proxy_tokens(x, WINDOW, CELL, mode)
        torch.testing.assert_close(found, x[:, 0, 0, :1].expand(2, 16, 5))


def test_first_and_random_proxies_are_tokens_of_their_cell():
    x = torch.arange(64.0).view(1, *SIZE, 1)
    cells = x[0, ..., 0].view(2, 2, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3).flatten(0, 2)
    assert torch.equal(proxy_tokens(x, WINDOW, CELL, "first")[0, :, 0], cells[:, 0])
    torch.manual_seed(0)
    found = proxy_tokens(x, WINDOW, CELL, "random")[0]
    assert bool((found == cells).any(1).all()) and not torch.equal(found, proxy_tokens(x, WINDOW, CELL, "random")[0])


def test_window_as_large_as_the_grid_is_full_attention_and_moved_windows_do_not_wrap():
    assert bool(Window(SIZE, SIZE).to_dense().all())
    made, given = block(cell=(4, 4), text=False), modulation(1)
    nn.init.zeros_(made.linear_1_visual.weight)  # what crosses windows otherwise
    x = tokens(1).requires_grad_()
    (grad,) = torch.autograd.grad(made(x, SIZE, given).view(*SIZE, 12)[0, 0, 0].square().sum(), x)
    reached = grad.view(*SIZE, 12).ne(0).any(-1)
    # The first token is alone in its moved window with what is before the cuts, and the tokens of its own window.
    assert bool(reached[0, :4, :4].all()) and not bool(reached[0, :, 4:].any()) and not bool(reached[1].any())


def test_samples_are_modulated_by_their_own_time_and_as_released_by_others():
    x, given = tokens(), modulation()
    paper, released = block(text=False), block(text=False, parity="authors")
    alone = [paper(x[i : i + 1], SIZE, given[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(paper(x, SIZE, given), torch.cat(alone))
    assert not torch.allclose(released(x, SIZE, given)[0], alone[0][0])
    torch.testing.assert_close(released(x[:1], SIZE, given[:1]), alone[0])
    number = (torch.arange(64) // 32) * 2 + torch.arange(64) % 8 // 4
    found = released._by_token(given.unflatten(1, (6, -1)), SIZE)
    for b in range(2):
        assert torch.equal(found[b], given.unflatten(1, (6, -1))[(b * 4 + number) % 2])


def test_operations_are_as_the_formula_says():
    size, window, cell, dim, n = (1, 16, 16), (1, 8, 8), (4, 4), 12, 256
    full = block_flops(size, dim, window, cell, shift=False)
    proxies = n // 16
    attention = 4 * dim * (proxies**2 + n * proxies + n * 64)
    linears = 2 * dim * dim * (n * (3 + 4 + 8) + proxies * (4 + 2))
    assert full == attention + linears
    made, x = block(window=window, cell=cell, shift=False, text=False).float(), tokens(1, size).float()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(x, size, modulation(1).float())
    assert counter.get_total_flops() >= linears
    large = (1, 64, 64)
    assert block_flops(large, 64, (1, 8, 8), (4, 4)) < flops.transformer_layer(64 * 64, 64, 256, 1) / 4
    assert block_flops(size, dim, window, cell, text=7) > block_flops(size, dim, window, cell) > full


def test_network_on_latents_with_text_and_on_pictures():
    torch.manual_seed(0)
    system = PTDiT(12, 2, 3, 2, WINDOW, CELL)
    net = system.build(4, text_dim=5)
    x, t, text = torch.randn(2, 4, 2, 8, 16), torch.rand(2), torch.randn(2, 3, 5)
    assert torch.equal(net(x, t, text), torch.zeros_like(x))  # the head begins at zero
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    out = net(x, t, text)
    assert out.shape == x.shape
    torch.testing.assert_close(net(x[1:], t[1:], text[1:]), out[1:])
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert not torch.allclose(net(x, t, text.flip(1) * 2), out)
    plain_net = PTDiT(12, 1, 3, 2, WINDOW, CELL, shift=False).build(1)
    assert plain_net(torch.randn(2, 1, 8, 8), t).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="text: got some"):
        plain_net(torch.randn(2, 1, 8, 8), t, text)


def test_parity_changes_the_proxies_too():
    assert PTDiT(12, 1, 3, 2, parity="authors").build(1).blocks[0].layout == "interleaved"
    assert PTDiT(12, 1, 3, 2).build(1).blocks[0].layout == "cell"


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="window: got"):
        proxy_tokens(torch.randn(1, 1, 6, 8, 2), WINDOW, CELL)
    with pytest.raises(ValueError, match="cell: got"):
        proxy_tokens(torch.randn(1, 1, 4, 8, 2), WINDOW, (3, 2))
    with pytest.raises(ValueError, match="mode, layout"):
        proxy_tokens(torch.randn(1, 1, 4, 8, 2), WINDOW, CELL, "median")
    with pytest.raises(ValueError, match="heads: got 5"):
        PTDiTBlock(12, 5)
    with pytest.raises(ValueError, match="parity: got 'x'"):
        PTDiTBlock(12, 3, parity="x")


def test_shapes_are_bright_on_dark_and_differ():
    found = shapes(50, torch.Generator().manual_seed(0))
    assert found.shape == (50, 1, 16, 16) and found.min() == -1 and bool((found.amax((1, 2, 3)) == 1).all())
    assert len(found.flatten(1).unique(dim=0)) == 50 and bool(((found > 0).float().mean((1, 2, 3)) < 0.5).all())


def test_the_claim_has_its_figures():
    outcome = claim(AttendTrial(repeats=1), steps=2, batch=2)
    assert outcome.value > 0 and outcome.baseline > 0 and "2 steps" in outcome.note
    assert outcome.holds == (outcome.value <= outcome.baseline)

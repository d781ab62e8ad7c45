"""Look-up, gradient rules, rounding, entropy, meters and renewal against the slow, plain way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize, one_hot

from vistok.core.codes import CodeFormat, Codes, bits_of
from vistok.core.quantize import (
    count_ids,
    ema_update,
    entropies,
    entropy_bits,
    fsq_bound,
    fsq_digits,
    fsq_unbound,
    fsq_values,
    index_backpropagation,
    nearest_code,
    pack,
    perplexity,
    replacements,
    rotation,
    rule_of,
    signs,
    soft_lookup,
    straight_through,
    unpack,
    usage,
)

# Nearest code ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_nearest_is_brute_force_and_ties_go_to_the_lower_row(n, k, d, dot, seed):
    """Whole numbers, so that there are many ties and no rounding."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-2, 3, (n, d), generator=generator).float()
    table = torch.randint(-2, 3, (k, d), generator=generator).float()
    found = nearest_code(z, table, "dot" if dot else "euclidean")
    for row, vector in zip(found.tolist(), z, strict=True):
        goodness = [float(vector @ c) if dot else -float((vector - c).square().sum()) for c in table]
        assert row == goodness.index(max(goodness))


def test_nearest_over_several_blocks(monkeypatch):
    from vistok.core.quantize import nearest

    z, table = torch.randn(700, 8), torch.randn(999, 8)
    expected = torch.cdist(z.double(), table.double()).argmin(1)
    assert torch.equal(nearest_code(z, table), expected)
    monkeypatch.setattr(nearest, "_SCORES", {"cpu": 50 * 999})
    assert torch.equal(nearest_code(z.view(7, 100, 8), table).flatten(), expected)


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_where_rounding_could_decide_the_ids_are_those_of_exact_arithmetic(metric):
    """Pairs of codes that differ by a few units in the last place, far from the origin."""
    table = 100 + torch.randn(300, 16)
    table = torch.cat([table, table + 1e-5 * torch.randn(300, 16)])[torch.randperm(600)]
    z = table[:200] + 1e-5 * torch.randn(200, 16)
    exact_z, exact_table = z.double(), table.double()
    score = exact_z @ exact_table.T
    score = score if metric == "dot" else -(exact_z[:, None] - exact_table).square().sum(2)
    expected = score.argmax(1)
    assert torch.equal(nearest_code(z, table, metric), expected)
    alone = torch.cat([nearest_code(row[None], table, metric) for row in z])
    assert torch.equal(alone, expected)  # whatever the size of a batch
    plain = (z @ table.T - (0 if metric == "dot" else table.square().sum(1) / 2)).argmax(1)
    assert not torch.equal(plain, expected)


def test_a_code_is_nearest_to_itself_in_any_dtype():
    table = torch.randn(2000, 6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = table.to(dtype)
        first = {tuple(row): i for i, row in reversed(list(enumerate(low.tolist())))}
        expected = torch.tensor([first[tuple(row)] for row in low.tolist()])
        assert torch.equal(nearest_code(low, low), expected)


def test_nearest_ignores_autocast_and_the_setting_of_matrix_products():
    z, table = torch.randn(300, 64), torch.randn(4096, 64)
    expected = torch.cdist(z.double(), table.double()).argmin(1)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_code(z, table), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_nearest_with_what_is_not_a_number():
    assert int(nearest_code(torch.full((1, 3), math.nan), torch.randn(5, 3))) in range(5)
    assert nearest_code(torch.zeros(0, 3), torch.randn(5, 3)).shape == (0,)


@pytest.mark.parametrize(("shape", "message"), [((4, 2), "must be"), ((0, 3), "at least one"), ((3,), "must be")])
def test_nearest_refuses(shape, message):
    with pytest.raises(ValueError, match=rf"table: .*{message}"):
        nearest_code(torch.randn(2, 3), torch.zeros(shape))


# Gradient rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["straight-through", "rotation", "index"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rules_give_the_row_bit_for_bit(name, scale):
    z = (scale * torch.randn(50, 7)).requires_grad_()
    table = torch.randn(9, 7, requires_grad=True)
    ids = nearest_code(z, table)
    out = rule_of(name)(z, table, ids)
    assert torch.equal(out, table[ids])
    out.sum().backward()
    assert torch.isfinite(z.grad).all()


def test_the_usual_way_of_passing_straight_through_is_not_exact():
    """Why ``pass_through`` adds a difference of equal numbers instead."""
    z, q = torch.randn(1000), torch.randn(1000)
    assert not torch.equal(z + (q - z).detach(), q)


def test_straight_through():
    z, table = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    cotangent = torch.randn(5, 3)
    (straight_through(z, table, torch.tensor([0, 1, 1, 3, 2])) * cotangent).sum().backward()
    assert torch.equal(z.grad, cotangent) and table.grad is None


def rotation_matrix(u, v):
    """The one that turns unit ``u`` onto unit ``v`` and leaves what is at right angles to both."""
    w = normalize(u + v, dim=0)
    return torch.eye(len(u)) - 2 * torch.outer(w, w) + 2 * torch.outer(v, u)


def test_rotation_is_the_transposed_rotation_matrix():
    z, table = torch.randn(6, 5, requires_grad=True), torch.randn(3, 5)
    ids, cotangent = torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 5)
    (rotation(z, table, ids) * cotangent).sum().backward()
    for i in range(6):
        q, x = table[ids[i]], z[i].detach()
        r = rotation_matrix(normalize(x, dim=0), normalize(q, dim=0))
        torch.testing.assert_close(r.T @ r, torch.eye(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(q.norm() / x.norm() * r @ x, q, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(z.grad[i], q.norm() / x.norm() * r.T @ cotangent[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(z.grad[i].norm(), q.norm() / x.norm() * cotangent[i].norm())
        angle = torch.cosine_similarity(cotangent[i], q, 0)
        torch.testing.assert_close(torch.cosine_similarity(z.grad[i], x, 0), angle, atol=1e-5, rtol=1e-5)


def test_rotation_where_there_is_none_passes_straight_through():
    table = torch.tensor([[1.0, 0.0]])
    for vector in ([-2.0, 0.0], [0.0, 0.0]):
        z = torch.tensor([vector], requires_grad=True)
        (rotation(z, table, torch.tensor([0])) * torch.tensor([[3.0, 4.0]])).sum().backward()
        assert z.grad.tolist() == [[3.0, 4.0]]


def test_rotation_of_parallel_vectors_is_straight_through_scaled():
    z = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    (rotation(z, torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0])) * torch.tensor([[3.0, 4.0, 5.0]])).sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([[1.5, 2.0, 2.5]]))


def test_index_backpropagation_is_that_of_the_softmax(monkeypatch):
    """Against autograd on the one-hot row as the authors write it, where it takes several blocks."""
    from vistok.core.quantize import gradient

    monkeypatch.setattr(gradient, "_BLOCK", 64 * 7)
    z, table = torch.randn(40, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    cotangent = torch.randn(40, 4)
    ids = nearest_code(z, table, "dot")
    p = (z @ table.T).softmax(1)
    hard = one_hot(ids, len(table)).float()
    written = (hard - p.detach() + p) @ table
    expected = torch.autograd.grad((written * cotangent).sum(), (z, table))
    found = torch.autograd.grad((index_backpropagation(z, table, ids) * cotangent).sum(), (z, table))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_unknown_rule():
    with pytest.raises(ValueError, match="gradient: got 'magic', must be a rule or one of straight-through, rotation"):
        rule_of("magic")


# Rounding ----------------------------------------------------------------------------------------------------------

LEVELS = [(8, 5, 3), (2, 2), (7, 6, 5), (3,), (4,) * 6]


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_round_trip_of_all_ids(levels):
    every = torch.arange(math.prod(levels))
    for order in ("first-lowest", "first-highest"):
        digits = unpack(every, levels, order)
        assert torch.equal(pack(digits, levels, order), every)
        assert len(set(map(tuple, digits.tolist()))) == len(every)
        values = fsq_values(digits, levels)
        assert values.min() == -1 and values.max() <= 1
        # Through the bound: the vector that is bounded to a code is rounded to it.
        bounded = values * torch.tensor([level // 2 for level in levels])
        assert torch.equal(fsq_digits(fsq_unbound(bounded, levels), levels), digits)


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_bound_and_unbound(levels):
    z = 4 * torch.rand(200, len(levels)) - 2  # tanh has room for no more in float32
    torch.testing.assert_close(fsq_unbound(fsq_bound(z, levels), levels), z, atol=2e-2, rtol=1e-2)
    counts = torch.tensor(levels)
    found = [set(column.tolist()) for column in fsq_digits(torch.linspace(-9, 9, 999)[:, None] + 0 * counts, levels).T]
    assert found == [set(range(level)) for level in levels]


def test_fsq_ids_of_half_precision_are_those_of_the_same_numbers():
    """The ids are made in float32; casting what is packed, as released code does, breaks a third of them."""
    levels = (7, 6, 5)
    every = torch.arange(math.prod(levels))
    values = fsq_values(unpack(every, levels), levels)
    middle = torch.tensor([3.0, 3.0, 2.0])
    cast = values.bfloat16().float() * middle + middle
    assert (pack(cast.long(), levels) != every).float().mean() > 0.3
    for dtype in (torch.bfloat16, torch.float16):
        z = torch.randn(500, 3).to(dtype)
        assert torch.equal(fsq_digits(z, levels), fsq_digits(z.float(), levels))


def test_bit_orders_are_mirror_images():
    digits = torch.tensor(list(itertools.product((0, 1), repeat=4)))
    low, high = pack(digits, (2,) * 4, "first-lowest"), pack(digits, (2,) * 4, "first-highest")
    assert low[8] == 1 and high[8] == 8  # 1000
    assert torch.equal(pack(digits.flip(1), (2,) * 4, "first-lowest"), high)
    with pytest.raises(ValueError, match="bit_order: got 'big'"):
        pack(digits, (2,) * 4, "big")


def test_sign_of_zero_is_minus():
    assert signs(torch.tensor([-0.5, 0.0, 0.5])).tolist() == [-1, -1, 1]


# Entropy and meters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize("block", [2**22, 64])
def test_entropies_against_the_whole_table(metric, block, monkeypatch):
    from vistok.core.quantize import entropy

    monkeypatch.setattr(entropy, "_BLOCK", block)
    z, table = torch.randn(2, 25, 4, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    mask = torch.rand(2, 25) < 0.7
    rows = z[mask]
    score = rows @ table.T if metric == "dot" else -torch.cdist(rows, table).square()
    p = (score / 0.5).softmax(1)
    mean = p.mean(0)
    expected = (-(p * p.log()).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum())
    found = entropies(z, table, 0.5, metric, mask)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found[0] - found[1], (z, table)),
        torch.autograd.grad(expected[0] - expected[1], (z, table)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_entropy_is_least_where_choices_are_sure_and_even():
    table = torch.eye(8)
    sample, batch = entropies(table, table)
    assert float(sample - batch) == pytest.approx(-math.log(8), abs=1e-3)
    sample, batch = entropies(table[:1].expand(8, -1), table)
    assert float(sample - batch) == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="temperature: got 0"):
        entropies(table, table, 0)


@given(st.lists(st.integers(-1, 7), max_size=30))
def test_counts_and_what_they_tell(ids):
    counts = count_ids(torch.tensor(ids, dtype=torch.int64), 8)
    real = [i for i in ids if i >= 0]
    assert counts.tolist() == [real.count(i) for i in range(8)]
    share = [real.count(i) / len(real) for i in set(real)] if real else []
    bits = -sum(p * math.log2(p) for p in share)
    assert float(usage(counts)) == pytest.approx(len(set(real)) / 8)
    assert float(entropy_bits(counts)) == pytest.approx(bits, abs=1e-5)
    assert float(perplexity(counts)) == pytest.approx(2**bits, rel=1e-5)


def test_soft_lookup_of_a_sure_choice_is_the_hard_one():
    table, ids = torch.randn(6, 3), torch.tensor([4, 0])
    logits = torch.where(one_hot(ids, 6).bool(), 0.0, -torch.inf)
    assert torch.equal(soft_lookup(logits, table), table[ids])
    logits = torch.randn(2, 6)
    torch.testing.assert_close(soft_lookup(logits, table, 1e6), table[logits.argmax(1)])


# Renewal -----------------------------------------------------------------------------------------------------------


def test_moving_averages_without_memory_are_the_means_of_the_batch():
    table, count = torch.randn(4, 3), torch.ones(4)
    hits, sums = torch.tensor([2.0, 0.0, 5.0, 1.0]), torch.randn(4, 3)
    sums[1] = 0
    new_count, new_total, new = ema_update(count, table, hits, sums, decay=0.0)
    torch.testing.assert_close(new_count, hits)
    torch.testing.assert_close(new_total, sums)
    torch.testing.assert_close(new[hits > 0], (sums / hits[:, None])[hits > 0], rtol=1e-3, atol=1e-4)
    assert (new[1] == 0).all()


def test_writing_back_the_smoothed_counts_keeps_their_sum():
    count, hits, sums = torch.tensor([3.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 4.0]), torch.zeros(3, 2)
    sums[2] = 4.0
    kept, _, _ = ema_update(count, torch.ones(3, 2), hits, sums, 0.9, 0.1, write_back=True)
    plain, _, table = ema_update(count, torch.ones(3, 2), hits, sums, 0.9, 0.1)
    torch.testing.assert_close(kept.sum(), plain.sum())
    assert kept[1] > 0 == plain[1]
    torch.testing.assert_close(normalize(table[0], dim=0), normalize(torch.ones(2), dim=0))  # only its length moved


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**31), st.integers(0, 100), st.booleans())
def test_replacements(k, n, seed, step, masked):
    generator = torch.Generator().manual_seed(seed)
    dead = torch.rand(k, generator=generator) < 0.5
    mask = torch.rand(n, generator=generator) < 0.6 if masked else None
    rows = torch.zeros(n, 2)
    found = replacements(dead, rows, seed, torch.tensor(step), mask)
    assert (found[~dead] == -1).all()
    taken = found[found >= 0].tolist()
    real = n if mask is None else int(mask.sum())
    assert len(taken) == len(set(taken)) == min(int(dead.sum()), real)
    assert all(row < n and (mask is None or mask[row]) for row in taken)
    assert torch.equal(found, replacements(dead, rows, seed, torch.tensor(step), mask))


def test_replacements_differ_by_seed_and_step():
    dead, rows = torch.ones(20, dtype=torch.bool), torch.zeros(50, 1)
    drawn = {tuple(replacements(dead, rows, s, torch.tensor(t)).tolist()) for s in range(5) for t in range(5)}
    assert len(drawn) == 25
    often = torch.stack([replacements(dead[:1], rows, 0, torch.tensor(t)) for t in range(5000)])
    counts = often.flatten().bincount(minlength=50)
    assert counts.min() > 60 and counts.max() < 145  # 100 each expected, 10 their deviation


# Codes -------------------------------------------------------------------------------------------------------------


def codes_of(ids, *, scales=(), grid=None, sizes=(4096,), mask=None):
    z = torch.randn(*ids.shape[:2], 3) if not scales else torch.randn(len(ids), scales[-1], 3)
    return Codes(ids, z, CodeFormat(sizes, grid=grid, scales=scales), mask)


def test_bits():
    assert [bits_of(k) for k in (1, 2, 3, 4096, 4097, 64000, 2**50, 2**50 + 1)] == [0, 1, 2, 12, 13, 16, 50, 51]
    ids = torch.zeros(2, 32, dtype=torch.int64)
    assert codes_of(ids).bits.tolist() == [32 * 12] * 2
    assert codes_of(ids[..., None].expand(-1, -1, 2), sizes=(4096, 16)).bits.tolist() == [32 * 16] * 2
    mask = torch.arange(32) < torch.tensor([[5], [0]])
    assert codes_of(ids, mask=mask).bits.tolist() == [60, 0]
    assert Codes(None, torch.zeros(1, 8, 3), CodeFormat(())).bits.tolist() == [8 * 3 * 32]


def test_prefix_of_a_sequence():
    codes = codes_of(torch.arange(20).view(2, 10))
    short = codes.prefix(3)
    assert torch.equal(short.ids, codes.ids[:, :3]) and torch.equal(short.z, codes.z[:, :3])
    assert short.bits.tolist() == [36, 36]
    each = codes.prefix(torch.tensor([2, 5]))
    assert each.ids.tolist() == [[0, 1, -1, -1, -1], [10, 11, 12, 13, 14]]
    assert each.bits.tolist() == [24, 60] and (each.z[0, 2:] == 0).all()
    assert each.prefix(3).mask.tolist() == [[True, True, False], [True] * 3]
    for k in (0, 11, torch.tensor([0, 3])):
        with pytest.raises(ValueError, match=r"k: got .*, must be between 1 and the 10 tokens"):
            codes.prefix(k)


def test_prefix_of_scales_ends_on_a_scale_and_of_a_grid_there_is_none():
    codes = codes_of(torch.zeros(2, 21, dtype=torch.int64), scales=(1, 4, 16), grid=(4, 4))
    assert codes.prefix(5).ids.shape == (2, 5) and codes.prefix(5).z is None
    with pytest.raises(ValueError, match="k: got 6, must end on a scale: 1, 5, 21"):
        codes.prefix(6)
    with pytest.raises(ValueError, match="only a sequence has a prefix"):
        codes_of(torch.zeros(2, 16, dtype=torch.int64), grid=(4, 4)).prefix(4)


def test_depth_of_residual_codes():
    codes = codes_of(torch.zeros(2, 4, 3, dtype=torch.int64), sizes=(16, 16, 8))
    short = codes.depth(2)
    assert short.ids.shape == (2, 4, 2) and short.z is None and short.bits.tolist() == [32, 32]
    with pytest.raises(ValueError, match="k: got 4, must be between 1 and the 3 ids"):
        codes.depth(4)


def test_loss_is_the_sum():
    codes = Codes(None, torch.zeros(1, 1, 1), CodeFormat(()), losses={"a": torch.tensor(1.0), "b": torch.tensor(2.5)})
    assert float(codes.loss) == 3.5
    assert float(Codes(None, torch.zeros(1, 1, 1), CodeFormat(())).loss) == 0

"""tokenring: equal to attention in one process, forward and backward, its messages, its cost model and the claim.

Most checks run all ranks in one process, by the same programs; one starts four processes.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from vistok.attend.tokenring import TokenRing, claim, cost
from vistok.core.attention import Dense, attend, merge_lse
from vistok.parts.ring import Alone, Exchange, Message, Share, busiest, keys_travel
from vistok.parts.sharded import join, sharded_attention, split

WAYS = [(s, c) for s in ("ring", "bidirectional", "zigzag") for c in (False, True)]


def made(n=24, heads=4, kv_heads=4, d=8, b=2, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(b, heads, n, d, generator=rng, dtype=dtype)
    k, v = torch.randn(2, b, kv_heads, n, d, generator=rng, dtype=dtype).unbind()
    return [x.requires_grad_() for x in (q, k, v)]


def dense(q, k, v, causal, scale=None):
    return attend(q, k, v, Dense(q.shape[2], k.shape[2], causal), scale=scale, return_lse=True, executor="dense")


def gradients(out, lse, given):
    """Of something that both depend on."""
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=rng), torch.randn(lse.shape, generator=rng)
    return torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1]).sum(), given)


@pytest.mark.parametrize(("schedule", "causal"), WAYS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_one_process(schedule, causal, ranks):
    for kv_heads in (4, 2):
        given = made(kv_heads=kv_heads)
        out, lse, _ = TokenRing(schedule, causal).simulate(*given, ranks, scale=0.5)
        plain = dense(*given, causal, 0.5)
        for a, b in zip((out, lse), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(out, lse, given), gradients(*plain, given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["ring", "zigzag"])
def test_gradients_in_double_precision(schedule):
    given = made(8, 2, 1, 3, 1, torch.float64)
    operator = TokenRing(schedule, True)
    assert torch.autograd.gradcheck(lambda *x: operator.simulate(*x, 2)[:2], given, fast_mode=True)


def test_half_precision():
    given = made()
    low = [x.detach().bfloat16().requires_grad_() for x in given]
    out, lse, _ = TokenRing("zigzag", True).simulate(*low, 3)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), dense(*given, True)[0], atol=0.05, rtol=0.05)
    out.square().sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 and bool(x.grad.isfinite().all()) for x in low)


def test_merging():
    """In any order and grouping; nothing added where nothing was seen."""
    parts = [(torch.randn(1, 2, 5, 3).double(), torch.randn(1, 2, 5).double()) for _ in range(3)]

    def merged(*these):
        return merge_lse([out for out, _ in these], [lse for _, lse in these])

    whole = merged(*parts)
    for other in (merged(*parts[::-1]), merged(merged(*parts[:2]), parts[2]), merged(parts[0], merged(*parts[1:]))):
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(a, b)
    empty = torch.randn(1, 2, 5, 3).double(), torch.full((1, 2, 5), -torch.inf).double()
    for a, b in zip(merged(parts[0], empty), parts[0], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_pair_is_computed_once_and_zigzag_is_balanced(size, causal, zigzag):
    share = Share(size, 4, zigzag, causal)
    positions = share.positions()
    assert torch.equal(positions.flatten().sort().values, torch.arange(4 * size))
    counted, load = torch.zeros(4 * size, 4 * size), torch.zeros(size)
    for owner in range(size):
        for holder in range(size):
            work = share.work(owner, holder)
            if work is None:
                continue
            rows, keys = positions[owner, work.rows], positions[holder, work.keys]
            seen = torch.ones(len(rows), len(keys))
            seen = seen.tril() if work.causal else seen
            counted[rows[:, None], keys] += seen
            load[holder] += seen.sum()
    expected = torch.ones(4 * size, 4 * size)
    assert torch.equal(counted, expected.tril() if causal else expected)
    if zigzag and causal:
        assert load.max() - load.min() <= 2 * 4  # half a block


def model(size, rows, partial, halved):
    """The schedule as published: (step, source, target, what, elements) of all messages, rows of any width."""
    way = -1 if halved else 1
    found = set()
    for r in range(size):
        for s in range(size - 1):
            # What r holds at step s; past rank 0 only the later half goes on.
            wrapped = halved and (r + s >= size or r == 0)
            found.add((s, r, (r + way) % size, "on", rows // 2 if wrapped else rows))
        for s in range(1, size):
            wrapped = halved and r + s >= size
            found.add((s + 1, r, (r - way * s) % size, "back", partial // 2 if wrapped else partial))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("schedule", "causal"), [("bidirectional", False), ("zigzag", True), ("zigzag", False)])
def test_messages_are_those_of_the_model(schedule, causal, size):
    given = made(kv_heads=2)
    rows = 2 * 24 // size * 4  # rows of all heads
    out, _, log = TokenRing(schedule, causal).simulate(*given, size)
    forward = {(m.step, m.source, m.target, m.what, m.elements) for m in log}
    assert len(forward) == len(log)
    assert forward == model(size, rows * 8, rows * 9, causal)
    out.sum().backward()
    backward = {(m.step, m.source, m.target, m.what, m.elements) for m in log[len(forward) :]}
    assert backward == model(size, rows * 18, rows * 8, causal)  # q, dout, lse, delta; dq
    assert busiest(log[: len(forward)]) == (0 if size == 1 else max(m[4] for m in forward))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_messages_of_the_ring(size):
    given = made(kv_heads=2)
    rows = 2 * 24 // size * 2
    out, _, log = TokenRing("ring").simulate(*given, size)
    ahead = {(s, r, (r + 1) % size, "on", 2 * 8 * rows) for r in range(size) for s in range(size - 1)}
    assert {(m.step, m.source, m.target, m.what, m.elements) for m in log} == ahead
    count = len(log)
    out.sum().backward()
    behind = {(s, r, (r + 1) % size, "back", 2 * 8 * rows) for r in range(size) for s in range(1, size + 1)}
    behind = behind if size > 1 else set()
    assert {(m.step, m.source, m.target, m.what, m.elements) for m in log[count:]} == ahead | behind


def test_causal_without_a_zigzag_sends_only_what_is_seen():
    log = TokenRing("bidirectional", True).simulate(*made(), 4)[2]
    assert {(m.source, m.target) for m in log if m.what == "on"} == {(1, 0), (2, 1), (3, 2)}
    assert sum(m.what == "back" for m in log) == 6


def test_cost_model():
    common = dict(ranks=4, tokens=24_000, head_dim=128, bandwidth=16e9)
    assert cost(heads=32, kv_heads=32, flops=1e15, **common).better == "tokenring"  # bound by sending
    assert cost(heads=32, kv_heads=32, flops=1e11, **common).better == "ring"  # by computing: a tail, and no gain
    for kv_heads in (15, 8, 1):
        grouped = cost(heads=32, kv_heads=kv_heads, flops=1e15, **common)
        assert grouped.better == "ring" and grouped.ring < grouped.on
    even = cost(heads=32, kv_heads=16, flops=1e15, **common)
    assert even.ring == even.on < even.back
    mesh, ring = (cost(8, 8192, 8, 8, 64, 1e9, 1e15, full_mesh=mesh) for mesh in (True, False))
    assert mesh.token_seconds < ring.token_seconds and mesh.ring_seconds == ring.ring_seconds
    alone = cost(1, 1024, 8, 8, 64, 1e9, 1e12)
    assert alone.ring_seconds == alone.token_seconds == pytest.approx(4 * 1024**2 * 8 * 64 / 1e12)
    assert cost(1, 1024, 8, 8, 64, 1e9, 1e12, causal=True).ring_seconds == alone.ring_seconds / 2
    # Three steps of 2 rows, a key of 10 elements each way, a byte each at a byte a second: computing costs nothing.
    by_hand = cost(3, 6, 1, 1, 10, 1.0, 1e9, element_bytes=1)
    assert (by_hand.ring, by_hand.on, by_hand.back) == (40, 20, 22)
    assert by_hand.ring_seconds == pytest.approx(80, abs=1e-3)
    assert by_hand.token_seconds == pytest.approx(20 + 20 + 22 + 22, abs=1e-3)


def test_cost_counts_what_is_sent():
    given = made(kv_heads=2)
    counted = cost(3, 24, 4, 2, 8, 1.0, 1.0, batch=2)
    loads = {name: TokenRing(name).simulate(*given, 3)[2] for name in ("ring", "bidirectional")}
    assert busiest(loads["ring"]) == counted.ring
    for what, elements in (("on", counted.on), ("back", counted.back)):
        assert {m.elements for m in loads["bidirectional"] if m.what == what} == {elements}


def test_what_does_not_fit_is_said():
    given = made()
    with pytest.raises(ValueError, match="schedule: got 'star'"):
        TokenRing("star")
    with pytest.raises(ValueError, match="tokens: got 24, must be divided by 5"):
        TokenRing().simulate(*given, 5)
    with pytest.raises(ValueError, match="tokens: got 24, must be divided by 16"):
        TokenRing("zigzag").simulate(*given, 8)
    with pytest.raises(ValueError, match="length: got 3"):
        Share(2, 3, zigzag=True)
    with pytest.raises(ValueError, match="size: got 0"):
        Alone(0)
    share = Share(2, 12)
    parts = [split(x, share) for x in given]
    with pytest.raises(ValueError, match=r"q, k, v: got .* must have 6 tokens"):
        sharded_attention(*parts, Alone(2), Share(2, 6), "ring")
    torch.testing.assert_close(join(parts[0], share), given[0])


def test_a_message_that_does_not_fit_is_noticed():
    x = torch.zeros(1, 1, 2, 3)

    def program(sends, receives):
        wait = yield Exchange(0, sends, receives)
        wait()
        return ()

    with pytest.raises(RuntimeError, match="rank 1 was not sent what it expects of 0"):
        Alone(2).run([program([(1, "on", (x,))], []), program([], [(0, "on", (x[:, :, :1],))])])
    with pytest.raises(RuntimeError, match="nobody took"):
        Alone(2).run([program([(1, "on", (x,))], []), program([], [])])
    world = Alone(2)
    assert world.run([program([(1, "on", (x,))], []), program([], [(0, "on", (x,))])]) == [(), ()]
    assert world.log == [Message(0, 0, 1, "on", 6)]
    with pytest.raises(RuntimeError, match="before the others"):
        Alone(2).run([program([], []), keys_travel(Share(1, 2), 0, (x,), lambda held, owner: ())])


def test_one_process_without_a_group():
    given = made()
    torch.testing.assert_close(TokenRing("zigzag", True)(*given), dense(*given, True)[0])


def work(rank, folder):
    """What each process does: all ways in a group of four, and some in two groups of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found = {}
    for schedule, causal in WAYS:
        for size, group in ((4, None), (2, pairs[rank // 2])):
            system, given = TokenRing(schedule, causal), made(kv_heads=2, seed=0 if size == 4 else rank // 2)
            share = system.share(24, size)
            own = [split(x, share)[rank % size].detach().requires_grad_() for x in given]
            out = system(*own, group)
            above = torch.randn(2, 4, 24, 8, generator=torch.Generator().manual_seed(1))
            grads = torch.autograd.grad(out, own, split(above, share)[rank % size])
            for name, x in zip(("out", "q", "k", "v"), (out, *grads), strict=True):
                found[f"{schedule}.{causal}.{size}.{name}"] = x.detach().contiguous()
    save_file(found, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.xdist_group("distributed")
def test_processes_agree_with_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=4)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(4)]
    above = torch.randn(2, 4, 24, 8, generator=torch.Generator().manual_seed(1))
    for schedule, causal in WAYS:
        for size, first in ((4, 0), (2, 0), (2, 2)):
            given = made(kv_heads=2, seed=first // 2)
            out, _ = dense(*given, causal)
            expected = (out, *torch.autograd.grad(out, given, above))
            share = TokenRing(schedule, causal).share(24, size)
            for name, x in zip(("out", "q", "k", "v"), expected, strict=True):
                parts = [part[f"{schedule}.{causal}.{size}.{name}"] for part in found[first : first + size]]
                torch.testing.assert_close(join(torch.stack(parts), share), x.detach(), rtol=1e-5, atol=1e-5)


def test_a_short_claim():
    class Trial:
        seed = 0

    outcome = claim(Trial(), tokens=64)
    assert outcome.holds and outcome.value == 16 * 8 * 65 and outcome.baseline == 2 * 16 * 8 * 64
    assert "with 2 key heads 4096 and 8320" in outcome.note

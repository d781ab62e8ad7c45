"""tokenselect: its sheet's properties, a layer step by step, in language models and beside a reducer, and the claim."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from tests.host.families import FAMILIES, prompt
from tests.host.reducers import Spread
from tests.host.texts import alone, batch, language
from vistok.attend import tokenselect
from vistok.attend._recall import Recall
from vistok.attend.tokenselect import TokenSelect, claim, reading_list, token_select, token_votes
from vistok.bench.attend_trial import AttendTrial
from vistok.host import apply
from vistok.host.attention import AttentionCall

SMALL = dict(n_init=2, n_local=5, k=4, chunk=3)


def rope(x, by):
    """``x`` (..., T, d) float64 turned by positions (..., T)."""
    half = x.shape[-1] // 2
    angle = by[..., None] * 100.0 ** -(torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def tensors(n, heads=4, kv=2, b=1, d=8):
    torch.manual_seed(n)
    return (
        torch.randn(b, heads, n, d).double() * 2,
        torch.randn(b, kv, n, d).double(),
        torch.randn(b, kv, n, d).double(),
    )


def call_of(q, k, v, new, memory, start=0):
    """Of unturned tensors (B, H, N, d), the last ``new`` of which are asked for; positions from ``start``."""
    at = torch.arange(start, start + k.shape[2]).expand(len(k), -1)
    turn = lambda x, by: rope(x, by[:, None])  # noqa: E731
    counts = (torch.full((len(k),), n) for n in (k.shape[2], new))
    q = turn(q[:, :, k.shape[2] - new : k.shape[2]], at[:, -new:])
    return AttentionCall(q, turn(k, at), v, *counts, 0.3, 0, 1, at, turn, memory)


def by_hand(q, k, v, new, method):
    """(H, new, d) of one row, a query at a time, from unturned tensors (H or Hk, N, d)."""
    heads, kv, n = q.shape[0], k.shape[0], k.shape[1]
    budget = method.n_init + method.k + method.n_local
    own = lambda h: h // (heads // kv)  # noqa: E731
    scored = (lambda h: h % kv) if method.parity == "authors" else own
    out = torch.zeros(heads, new, v.shape[2]).double()
    for first in range(n - new, n, method.chunk):
        chunk = range(first, min(first + method.chunk, n))
        seen = chunk[-1] + 1
        read = list(range(seen))
        if seen > budget:
            candidates = range(method.n_init, seen - method.n_local)
            total = dict.fromkeys(candidates, -math.inf if method.vote == "max" else 0.0)
            for h in range(heads):
                mean = sum(rope(q[h, t], torch.tensor(float(method.n_local + i))) for i, t in enumerate(chunk))
                products = {j: float(mean @ k[scored(h), j]) / len(chunk) for j in candidates}
                most = max(products.values())
                norm = sum(math.exp(p - most) for p in products.values())
                for j, p in products.items():
                    if method.vote == "max":
                        total[j] = max(total[j], p)
                    else:
                        total[j] += math.exp(p - most) / norm if method.vote == "softmax_sum" else p
            best = sorted(candidates, key=lambda j: (-total[j], j))[: method.k]
            read = [*range(method.n_init), *sorted(best), *range(seen - method.n_local, seen)]
        for t in chunk:
            mine = [j for j in read if j <= t]
            place = {j: float(read.index(j)) for j in mine}
            for h in range(heads):
                query = rope(q[h, t], torch.tensor(place[t]))
                logits = torch.stack([query @ rope(k[own(h), j], torch.tensor(place[j])) * 0.3 for j in mine])
                out[h, t - (n - new)] = logits.softmax(0) @ v[own(h), mine]
    return out


@pytest.mark.parametrize("parity", ["paper", "authors"])
@pytest.mark.parametrize("vote", ["softmax_sum", "sum", "max"])
def test_a_prompt_step_by_step(parity, vote):
    method = TokenSelect(**SMALL, similarity=2.0, vote=vote, parity=parity)
    q, k, v = tensors(22, b=2)
    out = method.attend(call_of(q, k, v, 22, {}))
    for row in range(2):
        torch.testing.assert_close(out[row], by_hand(q[row], k[row], v[row], 22, method))
    moved = method.attend(call_of(q, k, v, 22, {}, start=7))
    torch.testing.assert_close(moved, out)


def test_parities_differ_where_heads_share_keys():
    q, k, v = tensors(22)
    found = [TokenSelect(**SMALL, parity=p).attend(call_of(q, k, v, 22, {})) for p in ("paper", "authors")]
    assert not torch.allclose(*found)
    query, keys = torch.randn(1, 4, 8), torch.randn(1, 2, 9, 8)
    seen = torch.ones(1, 9, dtype=torch.bool)
    order = [0, 2, 1, 3]  # heads 0 and 2 score key head 0 of the released code
    torch.testing.assert_close(
        token_votes(query, keys, seen, modulo=True), token_votes(query[:, order], keys, seen, modulo=False)
    )


def test_cached_tokens_and_a_query_at_a_time():
    method = TokenSelect(**(SMALL | {"chunk": 1}), similarity=2.0)
    q, k, v = tensors(20)
    memory = {}
    for n in range(9, 21):
        out = method.attend(call_of(q[:, :, :n], k[:, :, :n], v[:, :, :n], 1, memory))
        assert (out is None) == (n <= method.budget)
        if out is not None:
            torch.testing.assert_close(out[0], by_hand(q[0, :, :n], k[0, :, :n], v[0, :, :n], 1, method))


def test_votes_are_bounded():
    query, keys = torch.randn(2, 4, 8), torch.randn(2, 2, 12, 8)
    among = torch.arange(12).expand(2, -1) < torch.tensor([[12], [7]])
    votes = token_votes(query, keys, among)
    torch.testing.assert_close(votes.sum(1), torch.full((2,), 4.0))
    assert bool((votes[1, 7:] == 0).all())
    query[:, 0] *= 1000  # one head that is sure decides a sum of products, and no more than one vote
    assert bool((token_votes(query, keys, among) <= 4).all())
    peaked = (query[:, 0, None] * keys[:, 0]).sum(2)
    assert torch.equal(token_votes(query, keys, among, "sum").argmax(1), peaked.argmax(1))
    alone = token_votes(query[:, :1], keys[:, :1], among)
    assert bool((alone <= 1).all()) and alone.amax().item() == pytest.approx(1)


def test_reading_list():
    read = reading_list(torch.tensor([[6, 4], [0, 0], [3, 2]]), torch.tensor([12, 5, 8]), 1, 4)
    assert read.tolist() == [[0, 4, 6, 8, 9, 10, 11], [0, 1, 2, 3, 4, -1, -1], [0, 2, 3, 4, 5, 6, 7]]
    chosen = token_select(torch.randn(3, 4, 8), torch.randn(3, 2, 40, 8), 3, 6, 5)
    read = reading_list(chosen, torch.full((3,), 40), 3, 6)
    assert read.shape == (3, 14) and bool((read.diff(dim=1) > 0).all())
    assert read[:, :3].tolist() == [[0, 1, 2]] * 3 and read[:, -6:].tolist() == [list(range(34, 40))] * 3


def test_order_of_storage_does_not_matter():
    """Votes go with their keys, however these lie in pages; and the same tokens are read."""
    query, keys, page = torch.randn(1, 4, 8).double(), torch.randn(1, 2, 24, 8).double(), torch.randperm(6)
    where = (page[:, None] * 4 + torch.arange(4)).flatten()
    among = torch.ones(1, 24, dtype=torch.bool)
    votes = token_votes(query, keys, among)
    torch.testing.assert_close(token_votes(query, keys[:, :, where], among), votes[:, where])


@pytest.mark.parametrize(("similarity", "again"), [(1.1, 0), (-1.0, 7), (0.9999, 3)])
def test_a_similar_query_reads_the_same(monkeypatch, similarity, again):
    """Of eight queries the last four are equal: above 1 none reads again, at -1 all but the first."""
    made = []
    select = tokenselect.token_select
    monkeypatch.setattr(tokenselect, "token_select", lambda *given: made.append(select(*given)) or made[-1])
    method = TokenSelect(**(SMALL | {"chunk": 1}), similarity=similarity)
    q, k, v = tensors(30)
    q[:, :, 25:] = q[:, :, 25:26]
    # Equal queries, and equal again once turned: the score turns all to the same position.
    memory = {}
    for n in range(22, 30):
        method.attend(call_of(q[:, :, :n], k[:, :, :n], v[:, :, :n], 1, memory))
    assert len(made) == 8 - again
    method.attend(call_of(q[:, :, :25], k[:, :, :25], v[:, :, :25], 1, memory))  # tokens were taken back
    assert len(made) == 9 - again


def test_rows_of_other_lengths_are_as_alone():
    method = TokenSelect(**SMALL)
    for kind in ("Llama", "Qwen3"):
        model = language(kind)
        for side in ("left", "right"):
            rows = batch(30, 17, 8, side=side)
            with torch.no_grad(), apply(model, method):
                found = model(**rows).logits
                for row, mask in enumerate(rows["attention_mask"].bool()):
                    expected = model(**alone(rows, row)).logits[0]
                    torch.testing.assert_close(found[row][mask], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@torch.no_grad()
def test_in_language_models(kind):
    model, rows = language(kind), batch(26, 19)
    plain, how = model(**rows).logits, dict(max_new_tokens=8, do_sample=False)
    given = {name: rows[name] for name in ("input_ids", "attention_mask")}
    dense = model.generate(**given, **how)
    with apply(model, "tokenselect", n_init=4, n_local=8, k=14, chunk=8):
        assert torch.equal(model(**rows).logits, plain)
    with apply(model, "tokenselect", k=100):
        assert torch.equal(model.generate(**given, **how), dense)
        assert torch.equal(model.generate(**given, **how, num_beams=2), model.generate(**given, **how, num_beams=2))
    with apply(model, TokenSelect(**SMALL)):
        assert not torch.allclose(model(**rows).logits, plain)
        made = model.generate(**given, **how)
    with apply(model, TokenSelect(**SMALL)):  # the same by hand
        ids, mask, cache, at = rows["input_ids"], rows["attention_mask"], DynamicCache(), rows["position_ids"]
        step = model(ids, attention_mask=mask, position_ids=at, past_key_values=cache)
        for _ in range(8):
            ids = torch.cat([ids, step.logits[:, -1:].argmax(2)], 1)
            mask, at = torch.cat([mask, mask[:, :1] * 0 + 1], 1), at[:, -1:] + 1
            step = model(ids[:, -1:], attention_mask=mask, position_ids=at, past_key_values=cache)
    assert torch.equal(made, ids)
    assert torch.equal(model(**rows).logits, plain)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl"])
@torch.no_grad()
def test_beside_a_reducer(name):
    family = FAMILIES[name]
    inputs = prompt(family, [[0, 0], [0]]).inputs
    with apply(family.model, Spread(), 0.5):
        plain = family.model(**inputs).logits
    with apply(family.model, [Spread(), "tokenselect"], 0.5) as session:
        assert torch.equal(family.model(**inputs).logits, plain)
    assert session.tokens_kept == session.tokens_in // 2 and isinstance(session.methods[-1], TokenSelect)
    with apply(family.model, [Spread(), TokenSelect(**SMALL)], 0.5):
        found = family.model(**inputs).logits
        again = family.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert again.shape[1] == inputs["input_ids"].shape[1] + 4
    assert not torch.allclose(found, plain) and found.shape == plain.shape
    if name == "llava-clip":
        with apply(family.model, "holov", 0.5):
            plain = family.model(**inputs).logits
        with apply(family.model, ["holov", "tokenselect"], 0.5):
            assert torch.equal(family.model(**inputs).logits, plain)
        # The second row without its padding, and without the first.
        row = {"input_ids": inputs["input_ids"][1:], "attention_mask": inputs["attention_mask"][1:]}
        real = row["attention_mask"][0].bool()
        row = {key: value[:, real] for key, value in row.items()} | {"pixel_values": inputs["pixel_values"][2:]}
        with apply(family.model, [Spread(), TokenSelect(**SMALL)], 0.5):
            torch.testing.assert_close(family.model(**row).logits[0, -2:], found[1, -2:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_init": -1}, "n_init: got -1"),
        ({"chunk": 0}, "chunk: got 0"),
        ({"n_local": 4, "chunk": 5}, "n_local: got 4, must be 5 or more"),
        ({"k": -1}, "k: got -1"),
        ({"vote": "mean"}, "vote: got 'mean'"),
    ],
)
def test_what_does_not_fit_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        TokenSelect(**given)


def test_the_claim_can_hold_and_can_fail(monkeypatch):
    for better in (True, False):
        figures = lambda self, model, method, b=better: 0.9 if method is None else 0.5 + 0.1 * b * method.k  # noqa: E731
        monkeypatch.setattr(Recall, "accuracy", figures)
        outcome = claim(AttendTrial(), steps=2)
        assert outcome.holds is better and "dense 0.900" in outcome.note and outcome.baseline == 0.5


def test_recall_is_measured_with_the_method_in():
    model, task = language("Llama", vocab_size=288), Recall(20)
    ids, answers = task.draw(3, torch.Generator().manual_seed(0))
    assert ids.shape == (3, 36) and answers.shape == (3, 16)
    for prompt_, right in zip(ids.tolist(), answers.tolist(), strict=True):
        said = dict(divmod(t, 16) for t in prompt_[:20] if t < 256)
        assert [said[t - 272] for t in prompt_[20:]] == right
    for method in (None, TokenSelect(), TokenSelect(**SMALL)):
        assert 0 <= task.accuracy(model, method, count=2) <= 1

"""token-sparse-attention: its sheet's properties, heads by hand, in language models, beside a reducer; the claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.host.families import FAMILIES, prompt
from tests.host.reducers import Spread
from tests.host.texts import alone, batch, language
from vistok.attend._recall import Recall
from vistok.attend.token_sparse_attention import (
    TokenSparseAttention,
    _AtRandom,
    claim,
    kept_tokens,
    select_layers,
    token_sparse_attention,
    window_scores,
)
from vistok.bench.attend_trial import AttendTrial
from vistok.core.attention import BlockMask, attend
from vistok.host import apply

SMALL = dict(window=4, kernel=3, coverage=0.3, min_tokens=3)


def tensors(n=30, heads=4, kv=2, b=2, d=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, n, d, generator=rng).double() for h in (heads, kv, kv))
    return 2 * q, k, v


def scores_by_hand(q, k, window, n, scale):
    """(H, n - window) of one row, a query and a key at a time."""
    heads, kv = q.shape[0], k.shape[0]
    found = torch.zeros(heads, n - window).double()
    for h in range(heads):
        for t in range(n - window, n):
            logits = torch.stack([q[h, t] @ k[h // (heads // kv), j] * scale for j in range(t + 1)])
            found[h] += logits.softmax(0)[: n - window] / window
    return found


def kept_by_hand(scores, window, kernel, coverage, min_tokens):
    """The sorted tokens of each head of one row, and how many of the prefix are dropped."""
    heads, prefix = scores.shape
    reach = kernel // 2
    smooth = [
        [
            sum(float(scores[h, j]) for j in range(i - reach, i + reach + 1) if 0 <= j < prefix) / kernel
            for i in range(prefix)
        ]
        for h in range(heads)
    ]
    mean = [sum(row[i] for row in smooth) / heads for i in range(prefix)]
    total, count = 0.0, 0
    for share in sorted(m / sum(mean) for m in mean):
        total += share
        count += total < coverage
    count += count > 0
    keep = prefix if not count else max(min_tokens, prefix - count)
    best = [sorted(range(prefix), key=lambda i, row=row: (-row[i], i))[:keep] for row in smooth]
    return [sorted(b) + list(range(prefix, prefix + window)) for b in best], prefix - keep


def test_scores_equal_loops():
    q, k, _ = tensors()
    lengths = torch.tensor([30, 21])
    found = window_scores(q, k, 4, lengths, 0.3)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row, :, : n - 4], scores_by_hand(q[row], k[row], 4, n, 0.3))
        assert bool((found[row, :, n - 4 :] == 0).all())
    single = window_scores(q.float(), k.float(), 4, lengths, 0.3)
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("coverage", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_tokens_equal_loops(coverage, kernel):
    q, k, v = tensors()
    lengths = torch.tensor([30, 17])
    out, index = token_sparse_attention(q, k, v, 4, kernel, coverage, 3, lengths=lengths, scale=0.3)
    for row, n in enumerate(lengths.tolist()):
        scores = scores_by_hand(q[row], k[row], 4, n, 0.3)
        expected, dropped = kept_by_hand(scores, 4, kernel, coverage, 3)
        assert all([i for i in head if i >= 0] == e for head, e in zip(index[row].tolist(), expected, strict=True))
        assert {len(e) for e in expected} == {n - dropped}
        for h, mine in enumerate(expected):
            for t in range(n):
                if t not in mine:
                    assert bool((out[row, h, t] == 0).all())
                    continue
                keys = [j for j in mine if j <= t]
                weights = (k[row, h // 2, keys] @ q[row, h, t] * 0.3).softmax(0)
                torch.testing.assert_close(out[row, h, t], weights @ v[row, h // 2, keys])


def test_dropped_mass_is_below_the_coverage_before_one_more():
    q, k, _ = tensors(60)
    lengths = torch.full((2,), 60)
    scores = window_scores(q, k, 4, lengths, 0.3)
    kept, dropped = kept_tokens(scores, lengths, 4, 1, 0.3, 3)
    assert bool((dropped > 1).all()) and bool((kept.sum(2) == 60 - dropped[:, None]).all())
    shares = scores[..., :56].mean(1)
    shares = (shares / shares.sum(1, keepdim=True)).sort(1).values
    for row, n in enumerate(dropped.tolist()):
        assert shares[row, : n - 1].sum() < 0.3 <= shares[row, :n].sum()


def test_nothing_is_dropped():
    q, k, v = tensors()
    assert token_sparse_attention(q, k, v, 4, 3, 0.0, 3) is None
    assert token_sparse_attention(q, k, v, 4, 3, 0.5, 26) is None
    assert token_sparse_attention(q, k, v, 4, 3, 1e-9, 3) is None
    few = token_sparse_attention(q, k, v, 4, 3, 0.5, 25, lengths=torch.tensor([30, 29]))
    assert few[1][1].tolist() == [[*range(29)]] * 4  # a row that has no more than fit is dense
    whole = scaled_dot_product_attention(q[1:], k[1:], v[1:], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(few[0][1:, :, :29], whole[:, :, :29])


def test_another_kernel_works_on_the_compressed_sequence():
    q, k, v = tensors(40)

    def blocks(q, k, v, scale):
        """Blocks of 4 see themselves and the first one."""
        n = -(-q.shape[2] // 4)
        mask = torch.eye(n, dtype=torch.bool)
        mask[:, 0] = True
        return attend(q, k, v, BlockMask(mask[None, None], q.shape[2], q.shape[2], (4, 4)), scale=scale)

    out, index = token_sparse_attention(q, k, v, 4, 3, 0.4, 3, attn=blocks)
    assert index.shape[2] < 40
    for row in range(2):
        for h in range(4):
            at = index[row, h][index[row, h] >= 0]
            given = (x[None, None, at] for x in (q[row, h], k[row, h // 2], v[row, h // 2]))
            torch.testing.assert_close(out[row, h, at], blocks(*given, 8**-0.5)[0, 0])


def test_layers_that_drift_least():
    drifts = torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert select_layers(drifts) == (1, 3) and select_layers(drifts, 0.0) == (1,)
    assert select_layers(drifts, 1.0) == (0, 1, 2, 3)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@torch.no_grad()
def test_in_language_models(kind):
    model, method = language(kind), TokenSparseAttention(**SMALL)
    for side in ("left", "right"):
        rows = batch(30, 17, 6, side=side)
        plain = model(**rows).logits
        with apply(model, "token-sparse-attention"):
            assert torch.equal(model(**rows).logits, plain)
        with apply(model, "token-sparse-attention", **(SMALL | {"coverage": 0.0})):
            assert torch.equal(model(**rows).logits, plain)
        with apply(model, method):
            found = model(**rows).logits
            for row, mask in enumerate(rows["attention_mask"].bool()):
                torch.testing.assert_close(found[row][mask], model(**alone(rows, row)).logits[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, plain) and torch.equal(model(**rows).logits, plain)


@torch.no_grad()
def test_every_key_stays_and_decoding_is_dense():
    model, rows = language(), batch(30)
    with apply(model, TokenSparseAttention(**SMALL)):
        cache = model(**rows, use_cache=True).past_key_values
        assert all(layer.keys.shape[2] == 30 for layer in cache.layers)
        inside = model(torch.tensor([[5]]), past_key_values=cache).logits
        more = model.generate(rows["input_ids"], max_new_tokens=5, do_sample=False)
        beams = model.generate(rows["input_ids"], max_new_tokens=5, do_sample=False, num_beams=2)
        cache.crop(-1)
    torch.testing.assert_close(model(torch.tensor([[5]]), past_key_values=cache).logits, inside)
    assert more.shape == beams.shape == (1, 35)


@torch.no_grad()
def test_beside_a_reducer():
    family = FAMILIES["qwen2.5-vl"]
    inputs = prompt(family, [[0, 0], [0]]).inputs
    with apply(family.model, Spread(), 0.5):
        plain = family.model(**inputs).logits
    for method, same in ((TokenSparseAttention(), True), (TokenSparseAttention(**SMALL, layers=(0, 2)), False)):
        with apply(family.model, [Spread(), method], 0.5) as session:
            assert torch.equal(family.model(**inputs).logits, plain) is same
        assert session.tokens_kept == session.tokens_in // 2


@pytest.mark.parametrize(
    "given", [{"window": 0}, {"kernel": 4}, {"kernel": 0}, {"min_tokens": -1}, {"coverage": 1.0}, {"coverage": -0.1}]
)
def test_what_does_not_fit_is_said(given):
    with pytest.raises(ValueError, match="got"):
        TokenSparseAttention(**given)


def test_layers_must_be_there():
    with (
        apply(language(), TokenSparseAttention(layers=(1, 4))),
        pytest.raises(ValueError, match=r"layers: got \(1, 4\)"),
    ):
        language()(batch(5)["input_ids"])


@torch.no_grad()
def test_chance_drops_as_many():
    how = dict(window=4, kernel=1, coverage=0.3, min_tokens=2)
    outs = []

    class Sees(TokenSparseAttention):
        def attend(self, call):
            outs.append(super().attend(call))
            return outs[-1]

    model, rows = language(), batch(30, 30)
    at_random = _AtRandom(**how, layers=(1,))
    with apply(model, Sees(**how, layers=(1,))):
        model(**rows)
    with apply(model, at_random):
        model(**rows)
    mine = (outs[1] == 0).all(3)
    assert at_random.dropped == [mine.float().mean().item()] and 0 < at_random.dropped[0] < 1


def test_the_claim_can_hold_and_can_fail(monkeypatch):
    for better in (True, False):

        def figures(self, model, method, b=better):
            return 0.9 if method is None else 0.4 if isinstance(method, _AtRandom) else 0.895 if b else 0.88

        monkeypatch.setattr(Recall, "accuracy", figures)
        outcome = claim(AttendTrial(), steps=2)
        assert outcome.holds is better and "dense 0.900" in outcome.note and outcome.baseline == 0.4

"""VisionDrop against plain loops, its stages inside a language model, and what its sheet says must hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.core.attention import attention_marginals
from vistok.host.reducer import Evidence
from vistok.reduce import visiondrop
from vistok.reduce.visiondrop import VisionDrop, dominant_contextual


def evidence(seed=0, b=2, n=24, heads=2):
    g = torch.Generator().manual_seed(seed)
    x, keys = (torch.randn(b, n, width, generator=g, dtype=torch.float64) for width in (6, 4 * heads))
    return Evidence(
        features=x[..., :3],
        encoder_features=x,
        encoder_keys=keys,
        cls_attention=torch.rand(b, heads, n, generator=g),
    )


def inside(seed=0, b=2, n=24):
    g = torch.Generator().manual_seed(seed)
    return Evidence(
        features=torch.randn(b, n, 6, generator=g, dtype=torch.float64),
        llm_received=torch.rand(b, n, generator=g),
        llm_keys=torch.randn(b, n, 4, generator=g, dtype=torch.float64),
    )


def plain(x, score, metric, dominant, contextual, average=False):
    """One picture: positions and values, dominant then contextual, and who joined which anchor."""
    best = sorted(sorted(range(len(x)), key=lambda j: (-float(score[j]), j))[:dominant])
    rest = [j for j in range(len(x)) if j not in best]
    anchors = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    groups = {a: [] for a in anchors}
    for j in rest:
        if anchors and j not in anchors:
            groups[max(anchors, key=lambda a: float(torch.cosine_similarity(metric[j], metric[a], 0)))].append(j)
    values = [x[j] for j in best]
    for a, members in groups.items():
        if average:
            values.append(x[[a, *members]].mean(0))
        else:
            values.append(x[a] + (x[members].mean(0) if members else 0))
    return best + anchors, torch.stack(values), groups


@settings(max_examples=30)
@given(st.integers(0, 9999), st.integers(1, 23), st.integers(0, 23), st.booleans())
def test_stage_against_a_loop(seed, dominant, contextual, average):
    contextual = min(contextual, 24 - dominant)
    seen = inside(seed)
    places, values, source = dominant_contextual(
        seen.features, seen.llm_received, seen.llm_keys, dominant, contextual, average
    )
    for i in range(2):
        wanted, tokens, groups = plain(
            seen.features[i], seen.llm_received[i], seen.llm_keys[i], dominant, contextual, average
        )
        assert places[i].tolist() == wanted
        torch.testing.assert_close(values[i], tokens)
        assert torch.equal(values[i, :dominant], seen.features[i, wanted[:dominant]])  # bit for bit
        ended = {j: wanted[s] for j, s in enumerate(source[i].tolist()) if s >= 0}
        joined = {m: a for a, members in groups.items() for m in members}
        assert ended == {j: j for j in wanted} | joined


def test_nothing_is_merged_where_the_rest_is_all_contextual():
    seen = inside()
    places, values, _ = dominant_contextual(seen.features, seen.llm_received, seen.llm_keys, 10, 14)
    assert torch.equal(values, seen.features.gather(1, places[..., None].expand(-1, -1, 6)))
    assert torch.equal(places.sort(1).values, torch.arange(24).expand(2, 24))


@pytest.mark.parametrize("keep", [1, 2, 8, 19, 23])
def test_encoder_stage(keep):
    seen = evidence()
    reduction = VisionDrop().reduce(seen, keep)
    contextual = min(math.ceil(keep / 8), keep - 1)
    for i in range(2):
        metric = seen.encoder_keys[i].view(24, 2, 4).mean(1)
        places, values, _ = plain(
            seen.encoder_features[i], seen.cls_attention[i].sum(0), metric, keep - contextual, contextual
        )
        order = torch.tensor(places).argsort()
        assert reduction.keep[i].tolist() == sorted(places)
        torch.testing.assert_close(reduction.tokens[i], values[order])


def test_released_order_puts_contextual_tokens_last():
    seen = evidence()
    ours, released = VisionDrop().reduce(seen, 16), VisionDrop(parity="authors").reduce(seen, 16)
    assert torch.equal(ours.keep, released.keep)
    metric = seen.encoder_keys[0].view(24, 2, 4).mean(1)
    places, values, _ = plain(seen.encoder_features[0], seen.cls_attention[0].sum(0), metric, 14, 2)
    torch.testing.assert_close(released.tokens[0], values)
    for slot, place in enumerate(places):
        assert released.source[0, place] == slot
        assert ours.keep[0, ours.source[0, place]] == place


def test_score_is_the_causal_average_and_starves_the_last_token():
    """Received attention of 3 + 8 tokens (text, picture) by brute force."""
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 2, 11, 4, generator=g, dtype=torch.float64) for _ in range(2))
    places = torch.arange(3, 11)[None]
    received = attention_marginals(q[:, :, 3:], k, places=places)[0][0, 3:]
    wanted = torch.zeros(8, dtype=torch.float64)
    for head in range(2):
        for i in range(3, 11):
            row = torch.softmax(k[0, head, : i + 1] @ q[0, head, i] / 2, 0)
            wanted[: i - 2] += row[3:] / 16
    torch.testing.assert_close(received, wanted)
    assert float(received[-1]) <= 1 / 8  # seen by itself only
    equal = torch.zeros_like(q)
    falling = attention_marginals(equal[:, :, 3:], equal, places=places)[0][0, 3:]
    assert (falling.diff() < 0).all()


def test_unbiased_scores_average_over_the_queries_that_see_a_token():
    n = 24
    seen = inside(b=1)
    per_query = torch.rand(n, n).tril()  # row: query, column: key
    received = per_query.mean(0)[None]
    fair = torch.tensor([per_query[j:, j].mean() for j in range(n)])[None]
    biased = Evidence(features=seen.features, llm_received=received, llm_keys=seen.llm_keys)
    unbiased = Evidence(features=seen.features, llm_received=fair, llm_keys=seen.llm_keys)
    ours = VisionDrop(unbiased=True).at_layer(biased, 9, 8)
    assert torch.equal(ours.keep, VisionDrop().at_layer(unbiased, 9, 8).keep)
    assert not torch.equal(ours.keep, VisionDrop().at_layer(biased, 9, 8).keep)


def test_layer_stage_from_none_to_all():
    seen = inside()
    assert VisionDrop().at_layer(seen, 0, 8).tokens.shape == (2, 0, 6)
    whole = VisionDrop().at_layer(seen, 24, 8)
    assert torch.equal(whole.tokens, seen.features)
    reduction = VisionDrop(contextual=1 / 4).at_layer(seen, 12, 8)
    for i in range(2):
        places, values, _ = plain(seen.features[i], seen.llm_received[i], seen.llm_keys[i], 9, 3)
        torch.testing.assert_close(reduction.tokens[i], values[torch.tensor(places).argsort()])


def test_batch_does_not_matter():
    seen = evidence(b=3)
    whole = VisionDrop().reduce(seen, 10)
    for i in range(3):
        one = slice(i, i + 1)
        names = ("features", "encoder_features", "encoder_keys", "cls_attention")
        alone = VisionDrop().reduce(Evidence(**{name: getattr(seen, name)[one] for name in names}), 10)
        torch.testing.assert_close(alone.tokens[0], whole.tokens[i])
        assert torch.equal(alone.source[0], whole.source[i])


def test_schedule_of_the_paper():
    schedule = VisionDrop().schedule(576, 32, 32)
    assert schedule.input == 48 and dict(schedule.layers) == {8: 35, 16: 26, 24: 19}
    assert schedule.mean(32) == 32
    split = [math.ceil(count / 8) for count in (48, 35, 26, 19)]
    assert split == [6, 5, 4, 3]  # contextual tokens of the authors' stages


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 12, 27, 28, 40])
@pytest.mark.parametrize("keep", [1, 2, 22, 64, 150, 196])
def test_schedule_of_any_depth_and_count(layers, keep):
    schedule = VisionDrop().schedule(196, keep, layers)
    counts = [schedule.input, *schedule.layers.values()]
    assert schedule.mean(layers) == keep
    assert counts == sorted(counts, reverse=True) and 1 <= counts[-1] and counts[0] <= 196
    assert all(0 < layer < layers for layer in schedule.layers)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("contextual", 0.0), ("fall", 1.5), ("depths", (0.5, 0.25)), ("depths", (0.0, 0.5)), ("parity", "both")],
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        VisionDrop(**{name: wrong})


@pytest.mark.parametrize(("pruned", "ms", "holds"), [(0.77, 20.0, True), (0.76, 20.0, False), (0.77, 50.0, False)])
def test_claim(pruned, ms, holds):
    class Trial:
        def accuracy(self, method, keep=1.0, tasks=()):
            return 0.8 if method is None else pruned

        def ttft_ms(self, method, keep=1.0):
            assert method is None or (method == VisionDrop() and keep == 1 / 9)
            return 60.0 if method is None else ms

    outcome = visiondrop.claim(Trial())
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.8, pruned, holds)
    assert f"{60 / ms:.2f} times" in outcome.note

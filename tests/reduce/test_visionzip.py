"""VisionZip against a plain loop; its merge itself is held against one in tests/core/test_dominant.py."""

from __future__ import annotations

import pytest
import torch

from tests.reduce.synthetic import Trial, evidence
from vistok.reduce import visionzip
from vistok.reduce.visiondrop import VisionDrop
from vistok.reduce.visionzip import VisionZip


def slots(seen, i, keep, contextual):
    """Positions and values of picture ``i``: dominant in raster order, then contextual."""
    x, score = seen.encoder_features[i].double(), seen.cls_attention[i].sum(0).tolist()
    keys = seen.encoder_keys[i].double().view(len(x), seen.cls_attention.shape[1], -1).mean(1)
    dominant = sorted(sorted(range(len(x)), key=lambda j: -score[j])[: keep - contextual])
    rest = [j for j in range(len(x)) if j not in dominant]
    anchors = [rest[a * max(1, len(rest) // contextual)] for a in range(contextual)]
    joined = {a: [] for a in anchors}
    for j in rest:
        if j not in joined and anchors:
            joined[max(anchors, key=lambda a: float(torch.cosine_similarity(keys[j], keys[a], 0)))].append(j)
    values = [x[j] for j in dominant]
    values += [x[a] + (x[members].mean(0) if members else 0) for a, members in joined.items()]
    return dominant + anchors, torch.stack(values)


@pytest.mark.parametrize(("keep", "contextual"), [(1, 0), (2, 0), (4, 1), (13, 2), (32, 5), (63, 10)])
def test_equals_a_loop(keep, contextual):
    seen = evidence(VisionZip(), (8, 8), 2, seed=keep)
    reduction = VisionZip().reduce(seen, keep)
    for i in range(2):
        places, values = slots(seen, i, keep, contextual)
        order = sorted(range(keep), key=places.__getitem__)
        assert reduction.keep[i].tolist() == sorted(places)
        torch.testing.assert_close(reduction.tokens[i].double(), values[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("keep", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_shares_of_the_authors(keep, contextual):
    seen = evidence(VisionZip(), (14, 14), 1)
    reduction = VisionZip(parity="authors").reduce(seen, keep)
    dominant = keep - contextual
    best = seen.cls_attention.mean(1).topk(dominant).indices[0].sort().values
    assert reduction.source[0, best].tolist() == list(range(dominant))
    assert torch.equal(reduction.tokens[0, :dominant], seen.encoder_features[0, best])
    assert int((reduction.source[0] >= dominant).sum()) == 196 - dominant  # the others are all in the last slots


def test_released_order_puts_contextual_tokens_last():
    seen = evidence(VisionZip(), (8, 8), 2)
    ours, released = VisionZip().reduce(seen, 32), VisionZip(parity="authors").reduce(seen, 32)
    assert torch.equal(ours.keep, released.keep) and not torch.equal(ours.tokens, released.tokens)
    for i in range(2):
        places, values = slots(seen, i, 32, 5)
        torch.testing.assert_close(released.tokens[i].double(), values, rtol=1e-5, atol=1e-6)
        assert released.source[i, places].tolist() == list(range(32))
        assert ours.keep[i, ours.source[i, places]].tolist() == places


def test_is_the_first_stage_of_visiondrop_at_its_share():
    seen = evidence(VisionZip(), (8, 8), 2)
    zipped, dropped = VisionZip(contextual=1 / 8).reduce(seen, 32), VisionDrop().reduce(seen, 32)
    assert torch.equal(zipped.tokens, dropped.tokens) and torch.equal(zipped.source, dropped.source)


@pytest.mark.parametrize(("name", "wrong"), [("contextual", 1.5), ("parity", "both")])
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        VisionZip(**{name: wrong})


def test_claim_is_95_percent_at_a_tenth():
    assert visionzip.claim(Trial(dense=0.8, VisionZip=0.761)).holds
    outcome = visionzip.claim(trial := Trial(dense=0.8, VisionZip=0.759))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.759)
    assert [call[2] for call in trial.calls if call[1] is not None] == [0.1]

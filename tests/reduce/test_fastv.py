"""FastV against a plain ranking and against the attention maps of a model that ran without it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial, evidence
from vistok.host.reducer import Evidence, Reducer
from vistok.reduce import fastv
from vistok.reduce.fastv import FastV


def last_rows(family, inputs, layer):
    """(B, T) attention of each row's last real token in decoder layer ``layer``, mean over heads, without fusion."""
    model = family.model.model.language_model
    fused = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        maps = family.model(**inputs, output_attentions=True).attentions[layer]
    finally:
        model.set_attn_implementation(fused)
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return maps.mean(1)[torch.arange(len(mask)), last]


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 3), st.integers(0, 3))
def test_equals_a_plain_ranking_also_where_scores_tie(seed, n, heads, levels):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(levels + 1, (2, heads, 1, n), generator=generator).double() / 8
    given_ = Evidence(features=torch.arange(2.0 * n).view(2, n, 1), llm_attention=attention)
    for keep in range(n + 1):
        reduction = FastV().at_layer(given_, keep, 1)
        for row, kept in zip(attention.tolist(), reduction.keep.tolist(), strict=True):
            score = [sum(head[0][i] for head in row) / heads for i in range(n)]
            assert kept == sorted(sorted(range(n), key=lambda i: (-score[i], i))[:keep])
        assert torch.equal(reduction.tokens[..., 0], given_.features[..., 0].gather(1, reduction.keep))


def test_parts_of_a_cut_picture_are_ranked_together():
    given_ = evidence(FastV(), crops=((3, 3), (3, 4)), batch=1)
    flat = replace(given_, crops=())
    assert torch.equal(FastV().reduce(given_, 6).keep, FastV().reduce(flat, 6).keep)


def test_counts_of_the_paper():
    """Half of 576 tokens; the layer that ranks them runs on them already."""
    assert FastV().schedule(576, 297, 32).layers == {1: 288}
    assert FastV(layer=3).schedule(576, 306, 32).layers == {2: 288}
    assert FastV(layer=3).schedule(576, 306, 32).mean(32) == 306
    assert FastV().schedule(576, 64, 32).layers == {1: 47}


def test_a_budget_that_the_first_layers_would_spend_moves_the_stage():
    """Six layers of 196 tokens: a quarter of them leaves layer 0 whole, a ninth does not."""
    assert FastV().schedule(196, 49, 6).layers == {1: 20}
    assert FastV().schedule(196, 22, 6).layers == {0: 22}
    assert FastV(layer=9).schedule(196, 180, 6).layers == {4: 148}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("keep", "layer", "left"), [(8, 1, 5), (4, 0, 4)])
@torch.no_grad()
def test_choice_is_that_of_the_dense_model(keep, layer, left, side):
    """Of the last real token's row in layer K - 1 of the model as it is, where nothing is dropped before."""
    family = FAMILIES["llava-clip"]
    batch = prompt(family, [[0], [0, 0]], side)
    rows = last_rows(family, batch.inputs, layer)
    with vistok.apply(family.model, "fastv", keep=keep) as session:
        family.model(**batch.inputs)
    for picture in session.pictures:
        score = rows[picture.row, batch.columns[picture.row][picture.index]]
        assert picture.layers == {layer: left} and picture.tokens_kept == 16
        assert torch.equal(picture.layer_keep[layer], score.topk(left).indices.sort().values)


@dataclass(frozen=True)
class Given(Reducer):
    """Keeps these tokens of the pictures, before the language model."""

    keep: tuple[tuple[int, ...], ...] = ()

    def select(self, evidence, keep):
        return torch.tensor(self.keep)


@torch.no_grad()
def test_a_stage_before_layer_0_is_a_reduction_before_the_language_model():
    """Logits, generated tokens and the bytes of the cache."""
    family = FAMILIES["llava-clip"]
    inputs = prompt(family, [[0], [0]]).inputs
    with vistok.apply(family.model, "fastv", keep=4) as session:
        logits = family.model(**inputs).logits
        kept, size = [p.layer_keep[0].tolist() for p in session.pictures], session.kv_bytes
        tokens = family.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with vistok.apply(family.model, Given(tuple(map(tuple, kept))), keep=4) as session:
        torch.testing.assert_close(family.model(**inputs).logits, logits)
        assert session.kv_bytes == size
        assert torch.equal(family.model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


def test_layer_zero_is_refused():
    with pytest.raises(ValueError, match=r"^layer: got 0"):
        FastV(layer=0)


def test_claim():
    assert fastv.claim(Trial(dense=0.8, FastV=0.795)).holds
    outcome = fastv.claim(trial := Trial(dense=0.8, FastV=0.78))
    assert not outcome.holds and (outcome.baseline, outcome.value) == (0.8, 0.78)
    assert [keep for _, method, keep, _ in trial.calls if method] == [17 / 32]

"""Methods whose cache keeps the final survivors only."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

from tests.host.families import FAMILIES, prompt
from tests.host.reducers import Staged
from vistok.host import apply

LLAVA = FAMILIES["llava-clip"]
STAGES = {1: 0.5, 3: 0.125}


@dataclass(frozen=True)
class Cuts(Staged):
    cache = "survivors"


def read(method, rows, **how):
    model, batch = LLAVA.model, prompt(LLAVA, [list(r) for r in rows])
    cache = DynamicCache(config=model.config.text_config)
    with apply(model, method, keep=0.25, **how) as session, torch.no_grad():
        model(**batch.inputs, past_key_values=cache)
        bytes_read = session.kv_bytes
        step = torch.full((len(rows), 1), 30)
        mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(step)], 1)
        logits = model(input_ids=step, attention_mask=mask, past_key_values=cache).logits[:, -1]
    return cache, logits, bytes_read, mask


@pytest.mark.parametrize("rows", [([0],), ([0, 0], [0]), ([0], [])], ids=["one", "unequal", "no-picture"])
@pytest.mark.parametrize("position", ["keep", "recompact"])
def test_layers_from_the_first_stage_on_hold_the_survivors(rows, position):
    whole, _, more, _ = read(Staged(1.0, STAGES), rows, position=position)
    cache, _, fewer, _ = read(Cuts(1.0, STAGES), rows, position=position)
    assert fewer < more
    last = whole.layers[-1].all_columns(len(rows), "cpu")
    for number, (cut, full) in enumerate(zip(cache.layers, whole.layers, strict=True)):
        ours, theirs = (layer.all_columns(len(rows), "cpu") for layer in (cut, full))
        assert cut.seen == full.seen
        for row in range(len(rows)):
            mine = ours[row][ours[row] >= 0].tolist()
            want = theirs[row][theirs[row] >= 0].tolist()
            if number >= min(STAGES):
                want = [c for c in want if c in last[row].tolist()]
            assert mine == want
            for column in mine[:-1]:  # all but the decoded token, whose states the cut has changed
                at, there = ours[row].tolist().index(column), theirs[row].tolist().index(column)
                assert torch.equal(cut.keys[row, :, at], full.keys[row, :, there])
                assert torch.equal(cut.values[row, :, at], full.values[row, :, there])


def test_decoding_reads_the_survivors_and_nothing_else():
    """The plain model on a cache of the same keys, put together by hand."""
    model = LLAVA.model
    cache, logits, _, mask = read(Cuts(1.0, STAGES), ([0],))
    by_hand = DynamicCache(config=model.config.text_config)
    lm, hidden = model.model.language_model, model.get_input_embeddings()(torch.tensor([[30]]))
    positions = torch.tensor([[mask.shape[1] - 1]])
    with torch.no_grad():
        rotary = lm.rotary_emb(hidden, positions)
        for number, layer in enumerate(lm.layers):
            keys, values = cache.layers[number].keys[:, :, :-1], cache.layers[number].values[:, :, :-1]
            by_hand.update(keys, values, number)
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=by_hand)
        want = model.lm_head(lm.norm(hidden))[:, -1]
    torch.testing.assert_close(logits, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [([0],), ([0, 0], [0])], ids=["one", "unequal"])
def test_beams_and_a_second_turn_go_on_with_it(rows):
    model, batch = LLAVA.model, prompt(LLAVA, [list(r) for r in rows])
    with apply(model, Cuts(1.0, STAGES), keep=0.25):
        cache = DynamicCache(config=model.config.text_config)
        first = model.generate(**batch.inputs, max_new_tokens=3, do_sample=False, past_key_values=cache)
        ids = torch.cat([first, torch.tensor([[30, 31]]).repeat(len(rows), 1)], 1)
        ones = torch.ones_like(ids[:, batch.inputs["input_ids"].shape[1] :])
        mask = torch.cat([batch.inputs["attention_mask"], ones], 1)
        second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4)
        assert second.shape[1] == ids.shape[1] + 4
        beams = model.generate(**batch.inputs, max_new_tokens=3, num_beams=1, do_sample=False)
        assert torch.equal(beams, first)
        assert model.generate(**batch.inputs, max_new_tokens=3, num_beams=3, do_sample=False).shape == first.shape

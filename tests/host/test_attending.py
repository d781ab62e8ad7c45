"""Attention of an answer's tokens by layer, against the maps of the plain model with eager attention."""

from __future__ import annotations

import copy

import pytest
import torch

import vistok
from tests.host.families import FAMILIES, prompt
from tests.host.plain import eager_maps
from vistok.host import Reducer
from vistok.host.attending import AnswerAttention


def attend(family, method=None, keep=1.0, new=1):
    inputs = prompt(family, [[0]]).inputs
    applied = vistok.apply(family.model, Reducer() if method is None else method, keep=keep)
    with torch.no_grad(), applied as session, AnswerAttention(session) as attention:
        made = family.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return attention, session.pictures[0], made, inputs


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl", "internvl", "gemma3"])
def test_with_all_tokens_it_is_the_row_of_the_plain_models_map(name):
    family = FAMILIES[name]
    attention, picture, _, inputs = attend(family)
    maps, _ = eager_maps(family, inputs)
    visual = (inputs["input_ids"][0] == family.model.config.image_token_id).nonzero()[:, 0]
    columns = visual[picture.layout.offsets]
    expected = torch.stack([layer[0, :, -1].mean(0)[columns] for layer in maps])
    assert attention.rows.shape == (len(maps), 1, picture.tokens_in)
    torch.testing.assert_close(attention.rows[:, 0], expected, atol=1e-6, rtol=1e-4)


def test_each_later_token_looks_back_from_the_one_before_it():
    family = FAMILIES["llava-clip"]
    attention, _, made, inputs = attend(family, new=4)
    model = copy.deepcopy(family.model)
    model.set_attn_implementation({"text_config": "eager"})
    whole = {**inputs, "input_ids": made[:, :-1], "attention_mask": torch.ones_like(made[:, :-1])}
    with torch.no_grad():
        maps = model(**whole, output_attentions=True).attentions
    visual = whole["input_ids"][0] == model.config.image_token_id
    expected = torch.stack([layer[0].mean(0)[-4:][:, visual] for layer in maps])
    torch.testing.assert_close(attention.rows, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["fastervlm", "pyramiddrop", "aim", "mustdrop", "lvlm-csp"])
def test_a_token_that_is_gone_gets_none_and_one_that_is_there_some(name):
    attention, picture, _, _ = attend(FAMILIES["llava-clip"], name, keep=0.4, new=3)
    now = picture.keep
    for layer, row in enumerate(attention.rows):
        now = picture.layer_keep.get(layer, now)
        assert attention.tokens[layer].tolist() == now.tolist()
        there = torch.zeros(picture.tokens_in, dtype=torch.bool).index_fill(0, now, True)
        assert torch.equal(~row[0].isnan(), there)
        assert bool((row[0][there] > 0).all()) and float(row[0].nansum()) < 1
    later = ~attention.rows[:, 1:].isnan()
    assert bool((later <= ~attention.rows[:, :1].isnan()).all())  # none comes back after the prompt


def test_mustdrop_lets_keys_go_after_the_prompt_and_so_they_get_none():
    attention, picture, _, _ = attend(FAMILIES["llava-clip"], "mustdrop", keep=0.4, new=2)
    last = picture.layer_keep[max(picture.layer_keep)]
    first = min(picture.layer_keep)
    there = torch.zeros(picture.tokens_in, dtype=torch.bool).index_fill(0, last, True)
    assert torch.equal(~attention.rows[first, 1].isnan(), there)


def test_nothing_of_it_stays_in_the_model():
    family = FAMILIES["llava-clip"]
    inputs = prompt(family, [[0]]).inputs
    with torch.no_grad():
        before = family.model(**inputs).logits
        attend(family, "pyramiddrop", keep=0.5, new=2)
        assert torch.equal(family.model(**inputs).logits, before)
    assert not any(layer._forward_pre_hooks for layer in family.model.model.language_model.layers)


def test_what_cannot_be_read_is_refused():
    family = FAMILIES["llava-clip"]
    with vistok.apply(family.model, "yopo") as session, pytest.raises(ValueError, match="changes how layers attend"):
        AnswerAttention(session)
    for rows, sentence in (([[0], [0]], "got 2 rows, must be one"), ([[0, 0]], "must hold one picture")):
        inputs = prompt(family, rows).inputs
        refused = pytest.raises(ValueError, match=sentence)
        with vistok.apply(family.model, "fastervlm", keep=5) as session, AnswerAttention(session), refused:
            family.model(**inputs)
    hybrid = FAMILIES["qwen3.5"]
    with vistok.apply(hybrid.model, "fastervlm", keep=5) as session, pytest.raises(ValueError, match="not every layer"):
        AnswerAttention(session)


def test_before_any_answer_there_are_no_rows():
    with vistok.apply(FAMILIES["llava-clip"].model, "fastervlm", keep=5) as session:
        attention = AnswerAttention(session)
    with pytest.raises(RuntimeError, match="no prompt has been answered yet"):
        _ = attention.rows

"""LVLM_CSP against the language model run by hand: few tokens, all tokens, few tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import vistok
from tests.host.families import FAMILIES, prompt
from tests.host.reference import generation_inputs, language_inputs, one_row
from tests.reduce.synthetic import Trial, evidence
from vistok.reduce import lvlm_csp
from vistok.reduce.lvlm_csp import LVLMCSP

LLAVA = FAMILIES["llava-clip"]
MIDDLE = LVLMCSP(scatter=(1 / 4, 1 / 2))


@torch.no_grad()
def by_hand(model, row, tokens, system, schedule, kept=None):
    """Logits (L', V) of a row whose picture has the places ``tokens``, and the tokens kept last. ``kept``: those,
    where they are known (of a prompt that goes on)."""
    lm = model.model.language_model
    hidden, positions = row["embeds"], row["positions"]
    tokens = torch.tensor(tokens)
    n, places = len(tokens), torch.arange(hidden.shape[1])
    visual = torch.isin(places, tokens)
    active, embeds = torch.ones_like(visual), hidden.clone()
    numbers = torch.cumsum(row["visual"], 0) - 1 if "planes" in row else None
    for number, layer in enumerate(lm.layers):
        count = schedule.layers.get(number)
        if count is not None and number == 0:
            some = torch.tensor([i * (n // count) for i in range(count)])
            active = ~visual | torch.isin(places, tokens[some])
        elif count == n:
            if system.restore == "add-delta":
                moved = (hidden - embeds)[0, tokens[some]]
                unit = torch.nn.functional.normalize(embeds[0, tokens], dim=1)
                nearest = (unit @ unit[some].T).argmax(1)
                left = torch.tensor([i for i in range(n) if i not in some])
                hidden[0, tokens[left]] = embeds[0, tokens[left]] + moved[nearest[left]]
            active = torch.ones_like(visual)
        elif count is not None:
            if kept is None:
                kept = last_attention(lm, layer, hidden[:, active], positions[..., active])
                kept = places[active & visual][kept[visual[active]].topk(count).indices]
            active = active & (~visual | torch.isin(places, kept))
        rotary = lm.rotary_emb(hidden, positions[..., active])
        out = layer(hidden[:, active], attention_mask=None, position_embeddings=rotary, position_ids=None)
        hidden = hidden.clone()
        hidden[:, active] = out
        if number < len(row.get("planes", ())):
            seen = row["visual"] & active
            hidden[0, seen] += row["planes"][number][numbers[seen]]
    return model.lm_head(lm.norm(hidden[:, active]))[0], kept


def last_attention(lm, layer, hidden, positions):
    """(L,) mean over heads of the last token's attention before ``layer``."""
    import sys

    attention = layer.self_attn
    x = layer.input_layernorm(hidden)
    q, k = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim)) for name in "qk")
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *lm.rotary_emb(hidden, positions))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q[:, :, -1:] @ k.transpose(2, 3) * attention.scaling).softmax(-1)[0, :, 0].mean(0)


def placed(batch, row, single):
    """The places of the row's only picture in the row without its padding."""
    return [t - int(single["real"][0]) for t in batch.columns[row][0]]


@pytest.mark.parametrize("restore", ["identity", "add-delta"])
@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "qwen3-vl", "internvl", "llava-next"])
def test_equals_layers_run_by_hand(name, restore):
    family = FAMILIES[name]
    system = LVLMCSP(scatter=(1 / 4, 1 / 2), restore=restore)
    batch = prompt(family, [[0], [0]])
    with torch.no_grad(), vistok.apply(family.model, system, keep=0.45) as session:
        logits = family.model(**batch.inputs).logits
    given_ = language_inputs(family.model, **batch.inputs)
    for row, picture in enumerate(session.pictures):
        n = picture.tokens_in
        schedule = system.schedule(n, round(0.45 * n), 4)
        assert schedule.layers[1] == n > schedule.layers[0] and picture.layers == dict(schedule.layers)
        single = one_row(given_, row, batch.inputs["attention_mask"])
        places = placed(batch, row, single)
        expected, kept = by_hand(family.model, single, places, system, schedule)
        torch.testing.assert_close(logits[row, -len(expected) :], expected, rtol=1e-3, atol=1e-3)
        assert sorted(places[i] for i in picture.layer_keep[2].tolist()) == sorted(kept.tolist())
        stride = n // schedule.layers[0]
        assert picture.layer_keep[0].tolist() == [i * stride for i in range(schedule.layers[0])]
        assert picture.layer_keep[1].tolist() == list(range(n))


def test_decoding_and_a_second_turn_see_what_each_layer_holds():
    model, batch = LLAVA.model, prompt(LLAVA, [[0], [0]])
    schedule, cache = MIDDLE.schedule(16, 7, 4), DynamicCache()
    with vistok.apply(model, MIDDLE, keep=7) as session:
        first = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
        ids = torch.cat([first, torch.tensor([[30, 31]] * 2)], 1)
        mask = torch.cat([batch.inputs["attention_mask"], torch.ones(2, 6, dtype=torch.int64)], 1)
        second = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False
        )
    text = second.shape[1] - 1 - 16
    counts = [schedule.layers[0], 16, *[schedule.layers[2]] * 2]
    assert [layer.keys.shape[2] for layer in cache.layers] == [text + count for count in counts]
    given_ = generation_inputs(model, **batch.inputs)
    for row in range(2):
        single = one_row(given_, row, batch.inputs["attention_mask"])
        places = placed(batch, row, single)
        kept = torch.tensor([places[i] for i in session.pictures[row].layer_keep[2].tolist()])
        for start, said in ((first.shape[1] - 4, first), (second.shape[1] - 4, second)):
            real = int(mask[row, : batch.inputs["input_ids"].shape[1]].sum())
            for column in range(start, start + 4):
                before = said[row, batch.inputs["input_ids"].shape[1] : column][None]
                whole = dict(single)
                whole["embeds"] = torch.cat([single["embeds"], model.get_input_embeddings()(before)], 1)
                later = single["positions"][..., -1:] + 1 + torch.arange(before.shape[1])
                whole["positions"] = torch.cat([single["positions"], later], -1)
                assert whole["embeds"].shape[1] == real + before.shape[1]
                logits, _ = by_hand(model, whole, places, MIDDLE, schedule, kept)
                assert int(logits[-1].argmax()) == int(said[row, column])


@torch.no_grad()
def test_rows_of_unlike_pictures_and_none():
    """The states that come back go to their own rows, whatever the padding."""
    batch = prompt(LLAVA, [[0, 0], [], [0]])
    with vistok.apply(LLAVA.model, MIDDLE, keep=7):
        together = LLAVA.model(**batch.inputs).logits
        alone = LLAVA.model(**prompt(LLAVA, [[0]]).inputs).logits
    assert bool(together.isfinite().all())
    single = prompt(LLAVA, [[0]])
    ids = batch.inputs["input_ids"][2][batch.inputs["attention_mask"][2].bool()][None]
    inputs = {**single.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids),
              "pixel_values": batch.inputs["pixel_values"][2:]}  # fmt: skip
    with vistok.apply(LLAVA.model, MIDDLE, keep=7):
        alone = LLAVA.model(**inputs).logits
    torch.testing.assert_close(together[2, -2:], alone[0, -2:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_tokens_is_the_dense_model():
    batch = prompt(LLAVA, [[0], [0]])
    plain = LLAVA.model(**batch.inputs).logits
    with vistok.apply(LLAVA.model, "lvlm-csp", keep=1.0):
        assert torch.equal(LLAVA.model(**batch.inputs).logits, plain)


@given(st.integers(1, 48), st.integers(2, 80), st.floats(0.01, 1), st.floats(0, 1), st.floats(0.1, 1), st.data())
def test_schedule_spends_the_budget(num_layers, n, start, length, fall, data):
    keep = data.draw(st.integers(1, n - 1))
    end = min(1.0, start + length)
    if end <= start:
        return
    system = LVLMCSP(scatter=(start, end), fall=fall)
    schedule = system.schedule(n, keep, num_layers)
    counts, now = [], None
    for layer in range(num_layers):
        now = schedule.layers.get(layer, now)
        counts.append(now)
    assert schedule.mean(num_layers) == pytest.approx(sum(counts) / num_layers)
    assert min(counts) >= 1 and schedule.input == n
    few, scattered = counts[0], [layer for layer, count in enumerate(counts) if count == n > counts[0]]
    assert scattered == list(range(scattered[0], scattered[-1] + 1)) if scattered else True
    assert counts[-1] <= few or counts[-1] == n
    assert (keep - 2) * num_layers < sum(counts) <= keep * num_layers


def test_schedule_of_the_papers_figure():
    """65% fewer on 32 layers."""
    schedule = LVLMCSP().schedule(256, 90, 32)
    assert schedule.layers == {0: 74, 12: 256, 15: 72}
    assert schedule.returns == (12,)
    assert schedule.mean(32) == (74 * 12 + 256 * 3 + 72 * 17) / 32 == 90


@given(st.integers(1, 100), st.data())
def test_representatives_stand_at_a_uniform_stride(n, data):
    keep = data.draw(st.integers(1, n))
    found = LVLMCSP().select(evidence(LVLMCSP(), (1, n), batch=1), keep)[0].tolist()
    assert found == [i * (n // keep) for i in range(keep)] and len(set(found)) == keep and found[-1] < n


def test_other_representatives():
    system = LVLMCSP("cls")
    given_ = evidence(system, (4, 5))
    expected = given_.cls_attention.mean(1).topk(6).indices
    assert torch.equal(system.select(given_, 6).sort(1).values, expected.sort(1).values)
    assert system.needs == {"cls_attention": -2} and LVLMCSP().needs == {}
    drawn = LVLMCSP("random", seed=3).select(given_, 6)
    assert torch.equal(drawn[0], drawn[1]) and len(set(drawn[0].tolist())) == 6


def test_coming_back():
    generator = torch.Generator().manual_seed(0)
    aside, states = torch.randn(2, 9, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    keep = torch.tensor([[0, 3, 6], [1, 2, 8]])
    same, moved = LVLMCSP().come_back(aside, keep, states), LVLMCSP(restore="add-delta").come_back(aside, keep, states)
    for row in range(2):
        for i in range(9):
            if i in keep[row]:
                slot = keep[row].tolist().index(i)
                assert torch.equal(same[row, i], states[row, slot]) and torch.equal(moved[row, i], states[row, slot])
                continue
            assert torch.equal(same[row, i], aside[row, i])
            near = max(
                range(3), key=lambda s: float(torch.cosine_similarity(aside[row, i], aside[row, keep[row, s]], 0))
            )
            torch.testing.assert_close(moved[row, i], aside[row, i] + states[row, near] - aside[row, keep[row, near]])


def test_pruning_keeps_what_the_last_token_attends_to():
    given_ = evidence(LVLMCSP(), (4, 5))
    found = LVLMCSP().at_layer(given_, 6, 7)
    assert torch.equal(found.keep, given_.llm_attention[:, :, 0].mean(1).topk(6).indices.sort(1).values)


MISTAKES = [
    ({"choice": "seg"}, "choice: got 'seg'"),
    ({"restore": "mean"}, "restore: got 'mean'"),
    ({"scatter": (0.5, 0.5)}, r"scatter: got \(0.5, 0.5\)"),
    ({"scatter": (0.0, 0.25)}, "scatter: got"),
    ({"fall": 0}, "fall: got 0"),
]


@pytest.mark.parametrize(("hyper", "message"), MISTAKES)
def test_mistakes_are_named(hyper, message):
    with pytest.raises(ValueError, match=message):
        LVLMCSP(**hyper)


@torch.no_grad()
def test_does_not_compose():
    with (
        vistok.apply(LLAVA.model, ["fastervlm", MIDDLE], keep=[0.9, 0.45]),
        pytest.raises(ValueError, match=r"LVLMCSP.*(all 16 must|only method)"),
    ):
        LLAVA.model(**prompt(LLAVA, [[0]]).inputs)


def test_claim_is_no_loss_at_35_percent():
    assert lvlm_csp.claim(trial := Trial(dense=0.8, LVLMCSP=0.8)).holds
    assert not lvlm_csp.claim(Trial(dense=0.8, LVLMCSP=0.79)).holds
    assert [call[2] for call in trial.calls if call[1] is not None] == [0.35]

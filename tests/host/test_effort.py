"""Methods that spend less on each visual token, against the language model run by hand with masks instead."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from tests.host.families import FAMILIES, IMAGE, language_model, prompt
from tests.host.reducers import Spread, spread
from tests.host.reference import generation_inputs, language_inputs, one_row
from vistok.core.effort import local_mask
from vistok.host import UnsupportedModel, apply
from vistok.host.effort import Effort, LayerEffort

LLAVA = FAMILIES["llava-clip"]
FIRST = LayerEffort(3, units=0.5)
SECOND = LayerEffort(5, causal=True, blind=(1, 2), silent=(1, 2))
THIRD = LayerEffort(1, units=0.25, blind=(0, 1, 2, 3), silent=(3,))
ALL = LayerEffort(99, causal=True)


@dataclass(frozen=True)
class Works(Effort):
    """Four layers of efforts, and where it stops."""

    efforts: Sequence[LayerEffort] = (FIRST, SECOND, THIRD, FIRST)
    end: int = 4

    def layers(self, num_layers, num_heads):
        return self.efforts

    def stop(self, num_layers):
        return self.end


def grids(pictures):
    """The grids of each picture of each row, from what a session tells of them."""
    found = {}
    for picture in pictures:
        found.setdefault(picture.row, []).append(picture.crops or (picture.grid,))
    return found


@torch.no_grad()
def by_hand(model, row, pictures, works, left=None):
    """Logits (L', V) of a row. ``pictures``: for each its grids and the places of its tokens in the row, some of
    which may be gone (None). ``left``: the places that go in, default all."""
    lm = language_model(model)
    length = row["embeds"].shape[1]
    places = torch.arange(length) if left is None else left
    hidden, positions = row["embeds"][:, places], row["positions"][..., places]
    near, visual = torch.zeros(length, length, dtype=torch.bool), torch.zeros(length, dtype=torch.bool)

    def windows(window):
        near.zero_()
        for parts, tokens in pictures:
            block = torch.block_diag(*(local_mask(grid, window).float() for grid in parts)).bool()
            there = [i for i, token in enumerate(tokens) if token is not None]
            at = torch.tensor([tokens[i] for i in there])
            visual[at] = True
            near[at[:, None], at] = block[there][:, there]
        return near, visual

    numbers = torch.cumsum(row["visual"], 0) - 1 if "planes" in row else None
    for number, (layer, effort) in enumerate(zip(lm.layers, works.efforts, strict=True)):
        near, visual = windows(effort.window)
        if number == works.end:
            stay = ~visual[places]
            hidden, positions, places = hidden[:, stay], positions[..., stay], places[stay]
        mine, text = visual[places], ~visual[places]
        before = places <= places[:, None]
        window = near[places][:, places] & (before if effort.causal else True)
        allowed = torch.where(mine[:, None] & mine, window, before)
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim)) for name in "qkv")
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *lm.rotary_emb(hidden, positions))
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v.transpose(1, 2)))
        weights = (q @ k.transpose(2, 3) * attention.scaling).masked_fill(~allowed, -torch.inf).softmax(-1)
        for head in effort.blind:
            weights[:, head, :, mine] = 0
        found = weights @ v
        for head in effort.silent:
            found[:, head, mine] = 0
        hidden = hidden + attention.o_proj(found.transpose(1, 2).flatten(2))
        x, mlp = layer.post_attention_layernorm(hidden), layer.mlp
        units = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        cut = torch.arange(units.shape[-1]) >= int(units.shape[-1] * effort.units)
        units = units.masked_fill(~text[:, None] & cut, 0)
        hidden = hidden + mlp.down_proj(units)
        if number < len(row.get("planes", ())):
            seen = row["visual"][places]
            hidden[0, seen] += row["planes"][number][numbers[places[seen]]]
    return model.lm_head(lm.norm(hidden))[0]


def check(family, rows, works, side="left", keep=None):
    """Every real token's logits, of a padded batch. ``keep``: tokens of each picture that a reducer leaves before."""
    model, batch = family.model, prompt(family, rows, side)
    methods = [works] if keep is None else [Spread(), works]
    with torch.no_grad(), apply(model, methods, keep=1.0 if keep is None else keep) as session:
        logits = model(**batch.inputs).logits
    given, mask = language_inputs(model, **batch.inputs), batch.inputs["attention_mask"]
    parts = grids(session.pictures)
    for row in range(len(rows)):
        single = one_row(given, row, mask)
        shift = int(single["real"][0])
        pictures = []
        for grid, tokens in zip(parts.get(row, []), batch.columns[row], strict=True):
            stay = range(len(tokens)) if keep is None else spread(len(tokens), round(keep * len(tokens)))
            pictures.append((grid, [t - shift if i in stay else None for i, t in enumerate(tokens)]))
        gone = {t - shift for tokens in batch.columns[row] for t in tokens} - {t for _, p in pictures for t in p}
        left = torch.tensor([c for c in range(len(single["real"])) if c not in gone])
        expected = by_hand(model, single, pictures, works, left)
        found = logits[row][mask[row].bool()] if logits.shape[1] == mask.shape[1] else logits[row]
        if len(found) != len(expected):  # rows that lost tokens are padded on the left: what follows the last picture
            found, expected = found[-2:], expected[-2:]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    return session


@pytest.mark.parametrize("family", [pytest.param(f, id=name) for name, f in FAMILIES.items() if f.effort])
def test_equals_masks_by_hand(family):
    rows = [[0], [0, family.sizes - 1]]
    check(family, rows, Works())
    check(family, rows, Works(end=2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_rows_without_pictures(side):
    check(LLAVA, [[0, 0], [], [0]], Works(), side)


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
def test_after_a_reducer_neighbours_are_those_that_are_left(name):
    session = check(FAMILIES[name], [[0], [0, 0]], Works(), keep=0.5)
    assert all(picture.tokens_kept == round(0.5 * picture.tokens_in) for picture in session.pictures)


@pytest.mark.parametrize("name", ["llava-clip", "qwen3-vl"])
@torch.no_grad()
def test_the_largest_causal_window_is_the_dense_model(name):
    family = FAMILIES[name]
    batch = prompt(family, [[0], [0]])
    plain = family.model(**batch.inputs).logits
    with apply(family.model, Works((ALL,) * 4)):
        torch.testing.assert_close(family.model(**batch.inputs).logits, plain, rtol=1e-3, atol=1e-4)


def hand_greedy(model, given, mask, columns, parts, works, steps):
    """Greedy continuations of a batch, everything computed anew for each token."""
    out = []
    for row, tokens in enumerate(columns):
        single = one_row(given, row, mask)
        shift = int(single["real"][0])
        pictures = [(grid, [t - shift for t in picture]) for grid, picture in zip(parts[row], tokens, strict=True)]
        said = []
        for _ in range(steps):
            token = by_hand(model, single, pictures, works)[-1].argmax()
            said.append(int(token))
            single["embeds"] = torch.cat([single["embeds"], model.get_input_embeddings()(token)[None, None]], 1)
            single["positions"] = torch.cat([single["positions"], single["positions"][..., -1:] + 1], -1)
        out.append(said)
    return out


@pytest.mark.parametrize("end", [2, 4])
def test_decoding_does_not_read_visual_tokens_in_blind_heads(end):
    model, batch, works = LLAVA.model, prompt(LLAVA, [[0, 0], [0]]), Works(end=end)
    with apply(model, works) as session:
        found = model.generate(**batch.inputs, max_new_tokens=5, do_sample=False)
    mask = batch.inputs["attention_mask"]
    expected = hand_greedy(model, generation_inputs(model, **batch.inputs), mask, batch.columns,
                           grids(session.pictures), works, 5)  # fmt: skip
    assert found[:, mask.shape[1] :].tolist() == expected


def test_beams_know_which_keys_are_visual():
    """With a cache, whose rows the beams reorder, as without one."""
    batch, found = prompt(LLAVA, [[0, 0], [0]]), []
    for cached in (True, False):
        with apply(LLAVA.model, Works(end=3)):
            found.append(
                LLAVA.model.generate(
                    **batch.inputs, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=cached
                ).tolist()
            )
    assert found[0] == found[1]


@pytest.mark.parametrize("end", [2, 4])
def test_a_second_turn_with_a_picture_on_the_same_cache(end):
    """The second picture reads the text of both turns, and of the pictures only itself."""
    model, batch, works = LLAVA.model, prompt(LLAVA, [[0]]), Works(end=end)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(9))
    cache = DynamicCache()
    with apply(model, works) as session:
        first = model.generate(**batch.inputs, max_new_tokens=3, do_sample=False, past_key_values=cache)
        parts = grids(session.pictures)[0] * 2
        ids = torch.cat([first, torch.tensor([[30, *[IMAGE] * 16, 31]])], 1)
        mask = torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        found = model.generate(**inputs, pixel_values=pixels, past_key_values=cache, max_new_tokens=4, do_sample=False)
    start = first.shape[1] + 1
    columns = [[batch.columns[0][0], list(range(start, start + 16))]]
    both = torch.cat([batch.inputs["pixel_values"], pixels])
    given = generation_inputs(model, **inputs, pixel_values=both)
    assert found[:, ids.shape[1] :].tolist() == hand_greedy(model, given, mask, columns, [parts], works, 4)
    assert [layer.keys.shape[2] for layer in cache.layers] == [found.shape[1] - 1 - 32 * (i >= end) for i in range(4)]


def test_a_window_costs_what_is_counted():
    """Against PyTorch's own count of a whole forward. Its rules for fused attention are ours."""
    works = Works((LayerEffort(3, units=0.5), LayerEffort(3, silent=(0, 1), blind=(0, 1)), ALL, ALL), 3)
    batch = prompt(LLAVA, [[0], [0, 0]])
    with torch.no_grad(), apply(LLAVA.model, works) as session, FlopCounterMode(display=False) as counter:
        LLAVA.model(**batch.inputs)
    assert session.flops == counter.get_total_flops()


def test_costs_less_where_there_is_much_to_see():
    """A grid of 32 x 32: 1024 tokens with a window of 3 and a quarter of the units, against the dense model."""
    import transformers as tf

    from tests.host.families import TEXT, VISION

    vision = tf.CLIPVisionConfig(**VISION, image_size=128, patch_size=4)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE)
    model = tf.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[IMAGE] * 1024, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 128, 128)}
    spent = []
    for works in (Works((ALL,) * 4), Works((LayerEffort(3, units=0.25),) * 4), Works((LayerEffort(3),) * 4, 1)):
        with torch.no_grad(), apply(model, works) as session:
            model(**inputs)
        spent.append(session._log.flops["prefill"])
    assert spent[1] < 0.3 * spent[0] and spent[2] < 0.12 * spent[0]


@torch.no_grad()
def test_nothing_is_left_in_the_model():
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    plain = model(**batch.inputs).logits
    config = model.model.language_model.config
    before = config._attn_implementation, [sorted(vars(layer.mlp)) for layer in model.model.language_model.layers]
    with apply(model, Works()):
        assert config._attn_implementation != before[0]
        assert not torch.equal(model(**batch.inputs).logits, plain)
    after = config._attn_implementation, [sorted(vars(layer.mlp)) for layer in model.model.language_model.layers]
    assert after == before and torch.equal(model(**batch.inputs).logits, plain)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="at most one that spends less"):
        apply(LLAVA.model, [Works(), Works()])
    odd = copy.deepcopy(LLAVA.model)
    odd.model.language_model.layers[1].mlp.gate_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="a gated one of three plain linear layers"):
        apply(odd, Works())
    apply(odd, Works((LayerEffort(3),) * 4))

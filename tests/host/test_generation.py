"""generate() in all its ways, and conversations on one cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.host.families import FAMILIES, IMAGE, prompt
from tests.host.reducers import Spread, Staged, spread
from tests.host.reference import generation_inputs, greedy, one_row
from vistok.host import apply
from vistok.host.cache import adopt, past_mask
from vistok.host.rows import pack, places, take

LLAVA = FAMILIES["llava-clip"]
QUARTER = lambda n: spread(n, round(0.25 * n))  # noqa: E731
STAGED = Staged(0.5, {2: 0.125})


def staged_by_hand(batch):
    half = lambda n: spread(n, round(0.5 * n))  # noqa: E731
    eighth = lambda n: [half(n)[i] for i in spread(len(half(n)), round(0.125 * n))]  # noqa: E731
    return batch.left(half), {2: batch.left(eighth)}


def gathered(batch, row=0):
    """Row ``row`` with a quarter of its picture, as inputs of the plain model's generate()."""
    by_hand = one_row(generation_inputs(LLAVA.model, **batch.inputs), row, batch.inputs["attention_mask"])
    left = batch.left(QUARTER)[row] - int((batch.inputs["attention_mask"][row] == 0).sum())
    embeds, positions = by_hand["embeds"][:, left], by_hand["positions"][..., left]
    return {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": torch.ones(embeds.shape[:2])}


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["beams", "beams-returned", "sampling", "samples-returned", "no-cache"],
)
def test_ways_of_generating(how):
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    how = {"max_new_tokens": 8, **how}
    torch.manual_seed(3)
    reference = gathered(batch)
    if how.get("use_cache", True):
        want = model.generate(**reference, **how)
    else:
        by_hand = one_row(generation_inputs(model, **batch.inputs), 0, batch.inputs["attention_mask"])
        want = torch.tensor([greedy(model, by_hand, batch.left(QUARTER)[0], 8)])
    torch.manual_seed(3)
    with apply(model, Spread(), keep=0.25):
        got = model.generate(**batch.inputs, **how)
    assert got[:, batch.inputs["input_ids"].shape[1] :].tolist() == want.tolist()


def test_beams_of_a_batch_with_pictures_of_unequal_number():
    model, batch = LLAVA.model, prompt(LLAVA, [[0, 0], [], [0]])
    with apply(model, Spread(), keep=0.25) as session:
        got = model.generate(**batch.inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    assert [(p.row, p.index) for p in session.pictures] == [(0, 0), (0, 1), (2, 0)]
    width = batch.inputs["input_ids"].shape[1]
    for row in (0, 2):
        want = model.generate(**gathered(batch, row), max_new_tokens=6, num_beams=3, do_sample=False)
        assert got[row, width:].tolist() == want[0].tolist()


def conversation(staged, second_picture, rows=([0],)):
    """Turn one, then turn two on its cache; the same by hand."""
    model, batch = LLAVA.model, prompt(LLAVA, [list(r) for r in rows])
    count = len(rows)
    turn = torch.tensor([[30, 31, *([IMAGE] * 16 if second_picture else []), 33, 34]]).repeat(count, 1)
    pixels = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(9))
    method = STAGED if staged else Spread()
    cache = DynamicCache() if second_picture else DynamicCache(config=model.config.text_config)
    with apply(model, method, keep=0.25):
        first = model.generate(**batch.inputs, max_new_tokens=5, do_sample=False, past_key_values=cache)
        ids = torch.cat([first, turn], 1)
        mask = torch.cat(
            [batch.inputs["attention_mask"], torch.ones_like(ids[:, batch.inputs["input_ids"].shape[1] :])], 1
        )
        inputs = {"input_ids": ids, "attention_mask": mask}
        if second_picture:
            inputs["pixel_values"] = pixels
        second = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    inputs["pixel_values"] = batch.inputs["pixel_values"]
    if second_picture:
        both = zip(batch.inputs["pixel_values"].split([len(r) for r in rows]), pixels, strict=True)
        inputs["pixel_values"] = torch.cat([torch.cat([one, two[None]]) for one, two in both])
    start = first.shape[1] + 2
    columns = [[*pictures, *([list(range(start, start + 16))] if second_picture else [])] for pictures in batch.columns]
    whole = type(batch)(inputs, columns)
    left, stages = staged_by_hand(whole) if staged else (whole.left(QUARTER), {})
    given = generation_inputs(model, **inputs)
    for row in range(count):
        by_hand = one_row(given, row, mask)
        shift = int((mask[row] == 0).sum())
        own = {layer: columns[row] - shift for layer, columns in stages.items()}
        want = greedy(model, by_hand, left[row] - shift, 6, own)
        assert second[row, ids.shape[1] :].tolist() == want
    return cache


@pytest.mark.parametrize("second_picture", [False, True], ids=["text", "picture"])
@pytest.mark.parametrize("staged", [False, True], ids=["input", "staged"])
def test_a_second_turn_on_the_same_cache(staged, second_picture):
    cache = conversation(staged, second_picture)
    assert cache.get_seq_length() == 2 + 16 + 1 + 4 + 5 + 4 + 16 * second_picture + 5


@pytest.mark.parametrize("staged", [False, True], ids=["input", "staged"])
def test_a_second_turn_of_a_padded_batch(staged):
    conversation(staged, second_picture=False, rows=([0, 0], [0]))
    conversation(staged, second_picture=True, rows=([0, 0], [0]))


@pytest.mark.parametrize("position", ["keep", "recompact"])
@pytest.mark.parametrize("staged", [False, True], ids=["input", "staged"])
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl"])
def test_a_second_turn_of_other_families(name, staged, position):
    family = FAMILIES[name]
    model, batch = family.model, prompt(family, [[0]])
    cache, method = DynamicCache(), STAGED if staged else Spread()
    with apply(model, method, keep=0.25, position=position):
        how = {"do_sample": False, "suppress_tokens": [IMAGE]}  # a random model may well say <image>
        first = model.generate(**batch.inputs, max_new_tokens=4, past_key_values=cache, **how)
        ids = torch.cat([first, torch.tensor([[30, 31]])], 1)
        ones = torch.ones_like(ids)
        got = model.generate(
            input_ids=ids, attention_mask=ones, past_key_values=cache, max_new_tokens=5, do_sample=False
        )
    whole = {**batch.inputs, "input_ids": ids, "attention_mask": ones}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = (ids == IMAGE).int()
    by_hand = one_row(generation_inputs(model, **whole), 0, ones)
    conversed = type(batch)(whole, batch.columns)
    left, stages = staged_by_hand(conversed) if staged else (conversed.left(QUARTER), {})
    own = {layer: columns[0] for layer, columns in stages.items()}
    want = greedy(model, by_hand, left[0], 5, own, recompact=position == "recompact")
    assert got[0, ids.shape[1] :].tolist() == want


def turn_two(model, first, cache):
    ids = torch.cat([first, torch.tensor([[30, 31]])], 1)
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4, do_sample=False
    )


def test_a_cache_goes_on_outside_where_nothing_has_to_be_translated():
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    inside, outside = DynamicCache(), DynamicCache()
    with apply(model, Spread(), keep=0.25):
        first = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, past_key_values=inside)
        want = turn_two(model, first, inside)
        model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, past_key_values=outside)
    assert torch.equal(turn_two(model, first, outside), want)


@pytest.mark.parametrize("position, method", [("keep", STAGED), ("recompact", Spread())], ids=["staged", "recompact"])
def test_a_cache_says_so_outside_where_it_cannot_go_on_and_goes_on_in_a_later_with(position, method):
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    inside, outside = DynamicCache(), DynamicCache()
    with apply(model, method, keep=0.25, position=position):
        first = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, past_key_values=inside)
        want = turn_two(model, first, inside)
        model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, past_key_values=outside)
    with pytest.raises(RuntimeError, match=r"reduced inside vistok\.apply"):
        turn_two(model, first, outside)
    with apply(model, Spread(), keep=0.5, position=position):
        assert torch.equal(turn_two(model, first, outside), want)


def test_a_cache_of_moved_positions_goes_on_where_positions_are_kept():
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        with apply(model, STAGED, keep=0.25, position="recompact"):
            first = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
    ids = torch.cat([first, torch.tensor([[30, *[IMAGE] * 16, 31]])], 1)
    inputs = {"attention_mask": torch.ones_like(ids), "pixel_values": batch.inputs["pixel_values"]}
    turns = []
    for cache, position in zip(caches, ("recompact", "keep"), strict=True):
        with apply(model, Staged(1.0, {1: 1.0, 3: 0.875}), keep=1.0, position=position):
            out = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=1, do_sample=False, **inputs,
                                 output_logits=True, return_dict_in_generate=True)  # fmt: skip
        turns.append((out.logits[0], [layer.shift.tolist() for layer in cache.layers]))
    # Two of the second picture's tokens are gone from layer 3 on: only there do the two policies differ.
    (moved, shifts), (kept, before) = turns
    assert before == [[8], [8], [14], [14]] and shifts == [[8], [8], [14], [16]]
    assert not torch.equal(moved, kept)


@torch.no_grad()
def test_lengths_and_bytes_of_the_cache():
    model, batch = LLAVA.model, prompt(LLAVA, [[0], [0]])
    with apply(model, Staged(0.5, {1: 0.25, 3: 0.0}), keep=0.25) as session:
        cache = model(**batch.inputs, use_cache=True).past_key_values
    text = batch.inputs["input_ids"].shape[1] - 16
    assert [layer.keys.shape[2] for layer in cache.layers] == [text + 8, text + 4, text + 4, text]
    assert cache.get_seq_length() == text + 16
    assert session.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def test_manual_decoding_without_positions_equals_generate():
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    with apply(model, Spread(), keep=0.25):
        want = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
        out, got = model(**batch.inputs, use_cache=True), []
        for _ in range(4):
            token = out.logits[:, -1:].argmax(-1)
            got.append(int(token))
            out = model(input_ids=token, past_key_values=out.past_key_values)
    assert got == want


def test_static_caches_and_chunked_prefill_are_refused():
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    with apply(model, Spread(), keep=0.25):
        with pytest.raises(ValueError, match="past_key_values"):
            model.generate(**batch.inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**batch.inputs, max_new_tokens=2, prefill_chunk_size=7)


@pytest.mark.parametrize("method", [Spread(), STAGED], ids=["input", "staged"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_without_a_cache_logits_are_the_same(side, method):
    model, batch = LLAVA.model, prompt(LLAVA, [[0, 0], [], [0]], side)
    with apply(model, method, keep=0.25):
        want = model(**batch.inputs, use_cache=True).logits
        got = model(**batch.inputs, use_cache=False)
    assert got.past_key_values is None
    torch.testing.assert_close(got.logits, want, atol=2e-5, rtol=1e-4)


def unpadded_rows():
    """Two rows of equal length, one with a picture and much text, one with two pictures."""
    short, long = prompt(LLAVA, [[0, 0]], text=(5, 6, 7)), prompt(LLAVA, [[0]], text=tuple(range(30, 50)))
    assert short.inputs["input_ids"].shape == long.inputs["input_ids"].shape
    inputs = {name: torch.cat([long.inputs[name], short.inputs[name]]) for name in short.inputs}
    return type(short)(inputs, long.columns + short.columns)


@pytest.mark.parametrize("staged", [False, True], ids=["input", "staged"])
def test_rows_without_padding_that_lose_different_numbers_of_tokens(staged):
    model, batch = LLAVA.model, unpadded_rows()
    cache, method = DynamicCache(), STAGED if staged else Spread()
    left, stages = staged_by_hand(batch) if staged else (batch.left(QUARTER), {})
    given, width = generation_inputs(model, **batch.inputs), batch.inputs["input_ids"].shape[1]
    with apply(model, method, keep=0.25):
        got = model.generate(**batch.inputs, max_new_tokens=6, do_sample=False, past_key_values=cache)
        del batch.inputs["attention_mask"]
        assert torch.equal(model.generate(**batch.inputs, max_new_tokens=6, do_sample=False), got)
    for row in (0, 1):
        by_hand = one_row(given, row, torch.ones(2, width))
        own = {layer: columns[row] for layer, columns in stages.items()}
        assert got[row, width:].tolist() == greedy(model, by_hand, left[row], 6, own)
    with pytest.raises(RuntimeError, match="padded rows"):
        model(input_ids=got[:, -1:], past_key_values=cache)


def test_rows_of_a_reduced_layer_move_together():
    cache = DynamicCache()
    (layer,) = adopt(cache, 1)
    layer.columns, layer.dropped, layer.padded, layer.armed = torch.tensor([[-1, 4], [2, 3]]), 3, True, True
    layer.shift = torch.tensor([7, 8])
    keys = torch.arange(2.0)[:, None, None, None].expand(2, 1, 2, 1)
    layer.update(keys, keys)
    assert (cache.get_seq_length(), cache.get_mask_sizes(1, 0)) == (5, (3, 3))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert layer.columns.tolist() == [[2, 3], [2, 3]] and layer.shift.tolist() == [8, 8]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 3]))
    assert layer.columns.shape == (3, 2) and layer.keys.shape[0] == len(layer.shift) == 3
    layer.update(keys[:1].expand(3, -1, -1, -1), keys[:1].expand(3, -1, -1, -1))
    assert layer.all_columns(3, keys.device)[0].tolist() == [2, 3, 5, 6]
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 0]]).expand(3, -1)
    assert past_mask(layer.all_columns(3, keys.device), mask)[0].tolist() == [True, False, True, False]
    cache.crop(-2)
    assert cache.get_seq_length() == 5
    with pytest.raises(RuntimeError, match="crop: got -1"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_packing_rows():
    alive = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]]).bool()
    assert pack(alive[:1], None).tolist() == [[0, 2, 3, 5]]
    assert pack(alive, None).tolist() == [[-1, -1, 0, 2, 3, 5], [0, 1, 2, 3, 4, 5], [-1, 0, 1, 2, 4, 5]]
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    assert pack(alive, valid).tolist() == [[0, 2, 3, 5], [2, 3, 4, 5], [0, 1, 2, 5]]
    index = torch.tensor([[-1, 0, 2]])
    assert take(torch.tensor([[5.0, 6.0, 7.0]]), index).tolist() == [[0, 5, 7]]
    assert places(index, 3).tolist() == [[1, -1, 2]]

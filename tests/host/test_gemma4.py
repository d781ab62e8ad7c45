"""What is particular to Gemma 4: keys that layers share, inputs of the layers' own, windows, padded patches."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from tests.host.families import FAMILIES, IMAGE, LARGE, SMALL, gemma4, language_model, prompt
from tests.host.plain import eager_maps
from tests.host.reducers import Asks, Mean, Spread, Staged, spread
from tests.host.reference import generation_inputs, greedy, one_row
from tests.host.test_evidence_fields import ranked
from tests.host.test_families import places_in, quarter, same_rows, staged_left
from vistok.host import Reduction, Schedule, UnsupportedModel, apply
from vistok.host.cache import ReadingLayer, ReducedLayer, adopt

PLAIN, SHARED = FAMILIES["gemma4"], FAMILIES["gemma4-shared"]
BOTH = pytest.mark.parametrize("family", [PLAIN, SHARED], ids=["plain", "shared"])
BETWEEN = {1: 0.5}
"""A stage after the layer that makes the windowed layers' keys and before the one that reads them."""
INSIDE = {1: 0.5, 3: 0.125}
"""And one among the layers that read."""
STAGINGS = {"input": {}, "between": BETWEEN, "inside": INSIDE}
BY_STAGES = pytest.mark.parametrize("stages", STAGINGS.values(), ids=list(STAGINGS))


def method_of(stages):
    return Staged(0.75, stages) if stages else Spread()


def left_of(batch, stages):
    """Columns left at the input, and from each stage on, by ``method_of(stages)`` and a keep of 0.25."""
    return staged_left(batch, 0.75, stages) if stages else (batch.left(lambda n: spread(n, quarter(n))), {})


# Other configurations -----------------------------------------------------------------------------------------------

S, F = "sliding_attention", "full_attention"
CONFIGURATIONS = {
    "own-inputs": dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=99),
    "one-shared": dict(SMALL, num_kv_shared_layers=1, layer_types=[F, S, F, F]),
    "both-ways-shared": dict(SMALL, use_bidirectional_attention="vision", layer_types=[F, S, S, F]),
    "full-layers": dict(SMALL, layer_types=[F, F, F, F]),
    "experts": dict(LARGE, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16),
    "soft-capped": dict(LARGE, final_logit_softcapping=4.0),
}


@cache
def configured(name):
    torch.manual_seed(0)
    model = gemma4(**CONFIGURATIONS[name]).eval()
    model.generation_config.eos_token_id = None
    if model.config.text_config.enable_moe_block:
        model.set_experts_implementation("eager")
    return model


def capped(model, got):
    """``got`` before the soft cap on the logits."""
    cap = model.config.text_config.final_logit_softcapping
    return got if cap is None else cap * torch.atanh(got / cap)


@BY_STAGES
@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.no_grad()
def test_other_configurations(name, stages):
    model, batch = configured(name), prompt(SHARED, [[0], [1, 0]])
    left, later = left_of(batch, stages)
    with apply(model, method_of(stages), keep=0.25) as session, FlopCounterMode(display=False) as counter:
        got = model(**batch.inputs).logits
    assert session.flops == counter.get_total_flops()
    same_rows(model, batch, capped(model, got), left, later, atol=2e-4)
    plain = model(**batch.inputs).logits
    with apply(model, Staged(1.0, dict.fromkeys(stages, 1.0)), keep=1.0):
        assert torch.equal(model(**batch.inputs).logits, plain)


# Keys that layers share ---------------------------------------------------------------------------------------------


def turns(family, stages, rows, picture, **how):
    """Two turns on one cache, the second with a picture a row or without: (the second's inputs, its answer, the answer
    by hand, the cache)."""
    model, batch = family.model, prompt(family, [list(row) for row in rows])
    greedily = {"do_sample": False, "suppress_tokens": [IMAGE]}
    more = prompt(family, [[1] for _ in rows]).inputs if picture else {}
    turn = torch.tensor([[30, *[IMAGE] * 6 * picture, 31, 32]]).repeat(len(rows), 1)
    cache = DynamicCache(config=model.config.text_config)
    with apply(model, method_of(stages), keep=0.25, **how):
        first = model.generate(**batch.inputs, past_key_values=cache, max_new_tokens=3, **greedily)
        ids = torch.cat([first, turn], 1)
        new = ids.shape[1] - batch.inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, new), value=1)
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int()}
        pictures = {key: more[key] for key in ("pixel_values", "image_position_ids") if picture}
        second = model.generate(**inputs, **pictures, past_key_values=cache, max_new_tokens=4, **greedily)
    for key in ("pixel_values", "image_position_ids"):
        inputs[key] = batch.inputs[key]
        if picture:
            counts = [len(row) for row in rows]
            both = zip(batch.inputs[key].split(counts), more[key].split(1), strict=True)
            inputs[key] = torch.cat([torch.cat(pair) for pair in both])
    start = first.shape[1] + 1
    columns = [[*spans, *([list(range(start, start + 6))] if picture else [])] for spans in batch.columns]
    whole = type(batch)(inputs, columns)
    left, later = left_of(whole, stages)
    given, want = generation_inputs(model, **inputs), []
    for row in range(len(rows)):
        by_hand = one_row(given, row, mask)
        to_places = places_in(by_hand)
        own = {layer: to_places(columns[row]) for layer, columns in later.items()}
        want.append(greedy(model, by_hand, to_places(left[row]), 4, own, recompact="position" in how))
    return ids, second[:, ids.shape[1] :].tolist(), want, cache


@BOTH
@BY_STAGES
@pytest.mark.parametrize("picture", [False, True], ids=["text", "picture"])
@pytest.mark.parametrize("rows", [([0],), ([0, 1], [0])], ids=["one", "padded"])
def test_a_second_turn_on_the_same_cache(family, stages, picture, rows):
    ids, got, want, cache = turns(family, stages, rows, picture)
    assert got == want
    assert cache.get_seq_length() == ids.shape[1] + 3
    if family is SHARED:
        assert [type(layer) for layer in cache.layers] == [ReducedLayer] * 2 + [ReadingLayer] * 2
        sizes = [layer.held for layer in cache.layers]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(stages) + 1


@BOTH
@BY_STAGES
def test_a_second_turn_at_recompacted_positions(family, stages):
    _, got, want, _ = turns(family, stages, ([0],), False, position="recompact")
    assert got == want


@pytest.mark.parametrize("config", [False, True], ids=["bare", "configured"])
@torch.no_grad()
def test_layers_that_read_hold_nothing_and_are_handed_what_is_left(config):
    model, batch, handed = SHARED.model, prompt(SHARED, [[0], [0]]), {}

    def see(number):
        def hook(module, args, kwargs):
            shared = kwargs["shared_kv_states"].get(module.layer_type)
            handed[number] = None if shared is None else shared[0].shape[2]

        return hook

    layers = language_model(model).layers
    text = batch.inputs["input_ids"].shape[1] - 16
    with apply(model, Staged(0.75, INSIDE), keep=0.25) as session:
        handles = [
            layer.self_attn.register_forward_pre_hook(see(number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        cache = DynamicCache(config=model.config.text_config) if config else DynamicCache()
        model(**batch.inputs, past_key_values=cache)
        assert [handed[n] for n in (2, 3)] == [text + 8, text + 2]
        assert [layer.held for layer in cache.layers] == [text + 12, text + 8, text + 8, text + 2]
        assert session.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers[:2])
        mask = torch.ones(2, text + 17, dtype=torch.long)
        model(input_ids=torch.tensor([[30], [30]]), attention_mask=mask, past_key_values=cache)
        assert [handed[n] for n in (2, 3)] == [text + 9, text + 3]
        for handle in handles:
            handle.remove()
    with pytest.raises(RuntimeError, match="past_key_values: this cache was reduced"):
        model(input_ids=torch.tensor([[30], [30]]), past_key_values=cache)


@pytest.mark.parametrize("name", STAGINGS)
@torch.no_grad()
def test_what_nobody_reads_is_not_computed(name):
    """Where only the last logits are wanted, only the last column goes on once the keys are made and the last stage is
    done; the plain model has it so, too."""
    stages, widths = STAGINGS[name], {}
    model, batch = SHARED.model, prompt(SHARED, [[0], [1, 0], []], side="right")
    with apply(model, method_of(stages), keep=0.25):
        want = model(**batch.inputs).logits
        handles = [
            layer.register_forward_hook(lambda module, args, output, n=n: widths.update({n: output.shape[1]}))
            for n, layer in enumerate(language_model(model).layers)
        ]
        for count in (1, 3):
            got = model(**batch.inputs, logits_to_keep=count)
            torch.testing.assert_close(got.logits, want[:, -count:], atol=2e-5, rtol=1e-4)
            assert widths[3] == count and (widths[2] == count) == (name != "inside")
        model(**batch.inputs, logits_to_keep=1, output_hidden_states=True)
        assert widths[3] == want.shape[1]
        for handle in handles:
            handle.remove()


@BOTH
@BY_STAGES
@torch.no_grad()
def test_the_logits_that_are_asked_for(family, stages):
    """Which the model itself takes only where as many tokens come out as go in."""
    model, batch = family.model, prompt(family, [[0], [1, 0]])
    with apply(model, method_of(stages), keep=0.25):
        want = model(**batch.inputs).logits
        for count in (1, 5, torch.tensor([0, 3])):
            got = model(**batch.inputs, logits_to_keep=count).logits
            part = slice(-count, None) if isinstance(count, int) else count
            torch.testing.assert_close(got, want[:, part], atol=2e-5, rtol=1e-4)


@dataclass(frozen=True)
class Cuts(Staged):
    cache = "survivors"


@pytest.mark.parametrize("rows", [([0],), ([0, 0], [0])], ids=["one", "unequal"])
@torch.no_grad()
def test_layers_hold_and_read_the_survivors(rows):
    """A step of decoding, against the layers run by hand on the keys of a cache that holds what each layer saw."""
    model, batch = SHARED.model, prompt(SHARED, [list(row) for row in rows])
    step, caches = torch.full((len(rows), 1), 30), []
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(step)], 1)
    stages = {1: 0.5, 3: 0.25}
    for kind in (Cuts, Staged):
        caches.append(DynamicCache(config=model.config.text_config))
        with apply(model, kind(1.0, stages), keep=0.25):
            model(**batch.inputs, past_key_values=caches[-1])
    cut, whole = (cache.layers for cache in caches)
    left = [layer.all_columns(len(rows), step.device) for layer in whole]
    assert [layer.held for layer in cut] == [left[0].shape[1], *[left[3].shape[1]] * 3]
    by_row = []
    lm, last, stay = language_model(model), mask.shape[1] - 1, left[3]
    for row in range(len(rows)):
        hidden, shared, rotary = lm.embed_tokens(step[row : row + 1]), {}, {}
        own = lm.project_per_layer_inputs(hidden, lm.get_per_layer_inputs(step[row : row + 1]))
        for number, layer in enumerate(lm.layers):
            kind, cache = lm.config.layer_types[number], DynamicCache(config=lm.config)
            rotary[kind] = lm.rotary_emb(hidden, torch.tensor([[last]]), kind)
            source = number % 2
            columns = left[source][row]
            read = columns >= 0
            read &= mask[row][columns.clamp(min=0)].bool()
            if number:  # from the first stage on only what the last one left
                read &= torch.isin(columns, stay[row])
            if kind == S:
                read &= columns > last - lm.config.sliding_window
            keys, values = (t[row : row + 1, :, read] for t in (whole[source].keys, whole[source].values))
            if number == source:
                cache.update(keys, values, number)
            else:
                made = [t[:, :, -1:] for t in shared[kind]]
                shared[kind] = tuple(torch.cat(pair, 2) for pair in zip((keys, values), made, strict=True))
            hidden = layer(
                hidden,
                own[:, :, number],
                shared_kv_states=shared,
                position_embeddings=rotary[kind],
                past_key_values=cache,
            )
        by_row.append(model.lm_head(lm.norm(hidden)))
    with apply(model, Cuts(1.0, stages), keep=0.25):
        got = model(input_ids=step, attention_mask=mask, past_key_values=caches[0]).logits
    torch.testing.assert_close(got, torch.cat(by_row), atol=2e-5, rtol=1e-4)


def test_what_a_layer_reads_follows_the_layer_that_holds_it():
    cache = DynamicCache()
    source, reader = adopt(cache, 2, {1: 0})
    assert type(source) is ReducedLayer and type(reader) is ReadingLayer
    source.columns, source.dropped, source.armed = torch.tensor([[-1, 4], [2, 3]]), 3, True
    reader.columns, reader.dropped = torch.tensor([[4], [3]]), 4
    keys = torch.arange(2.0)[:, None, None, None].expand(2, 1, 2, 1)
    source.update(keys, keys)
    assert (source.held, reader.held, source.seen, reader.seen) == (2, 1, 5, 5)
    source.update(keys[:, :, :1], keys[:, :, :1])
    assert reader.all_columns(2, keys.device).tolist() == [[4, 5], [3, 5]]
    cache.reorder_cache(torch.tensor([1, 1]))
    assert reader.columns.tolist() == [[3], [3]] and reader.reordered
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 3]))
    assert reader.columns.shape == (3, 1) and reader.get_mask_sizes(2) == (4, 4)
    cache.crop(-1)
    assert (source.held, reader.held) == (2, 1) and cache.get_seq_length() == 5
    cache.reset()
    assert (source.held, reader.held, reader.columns) == (0, 0, None)


@BOTH
@pytest.mark.parametrize("how", [{"num_beams": 3, "do_sample": False}, {"num_return_sequences": 2, "do_sample": True}])
@BY_STAGES
def test_beams_and_samples(family, how, stages):
    """With a cache, whose rows the beams reorder, as without one."""
    batch, found = prompt(family, [[0], [1, 0]]), []
    for cached in (True, False):
        torch.manual_seed(3)
        with apply(family.model, method_of(stages), keep=0.25) as session:
            found.append(
                family.model.generate(**batch.inputs, max_new_tokens=4, use_cache=cached, **how)[:, -4:].tolist()
            )
        assert [(p.row, p.index) for p in session.pictures] == [(0, 0), (1, 0), (1, 1)]
    assert found[0] == found[1]


@BOTH
@BY_STAGES
def test_recompacted_positions(family, stages):
    """Layers that read keys keep the positions by which those were turned."""
    batch = prompt(family, [[0, 1], [0]])
    left, later = left_of(batch, stages)
    given, width = generation_inputs(family.model, **batch.inputs), batch.inputs["input_ids"].shape[1]
    how = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with apply(family.model, method_of(stages), keep=0.25, position="recompact"):
        got = family.model.generate(**batch.inputs, **how)
    for row in range(2):
        by_hand = one_row(given, row, batch.inputs["attention_mask"])
        to_places = places_in(by_hand)
        own = {layer: to_places(columns[row]) for layer, columns in later.items()}
        logits, where = [], (by_hand, to_places(left[row]), 6, own)
        want = greedy(family.model, *where, recompact=True, logits=logits)
        assert got.sequences[row, width:].tolist() == want
        torch.testing.assert_close(torch.stack([x[row] for x in got.logits]), torch.stack(logits), atol=2e-4, rtol=1e-4)
        kept = []
        greedy(family.model, *where, logits=kept)
        assert not torch.allclose(kept[0], logits[0], atol=1e-3)


@BOTH
@BY_STAGES
@torch.no_grad()
def test_a_cache_changes_nothing(family, stages):
    for side in ("left", "right"):
        batch = prompt(family, [[0, 1], [], [0]], side)
        with apply(family.model, method_of(stages), keep=0.25):
            want = family.model(**batch.inputs, use_cache=True).logits
            got = family.model(**batch.inputs, use_cache=False).logits
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@BOTH
def test_eager_attention_gives_the_same(family):
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    batch = prompt(family, [[0, 1], [0]])
    for method in (Spread(), Staged(0.5, {1: 0.25, 3: 0.125}, {"llm_attention": "last"})):
        with apply(family.model, method, keep=0.25):
            want = family.model.generate(**batch.inputs, max_new_tokens=5, do_sample=False)
        with apply(eager, method, keep=0.25):
            assert torch.equal(eager.generate(**batch.inputs, max_new_tokens=5, do_sample=False), want)


@dataclass(frozen=True)
class ComesBack(Spread):
    """Sets half of the tokens aside before layer ``aside`` and brings them back before layer ``back``."""

    aside: int = 0
    back: int = 1

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        return Schedule(num_tokens, {self.aside: num_tokens // 2, self.back: num_tokens})

    def at_layer(self, evidence, keep, layer) -> Reduction:
        return Reduction.select(evidence.features, self.select(evidence, keep))


@torch.no_grad()
def test_tokens_come_back_where_their_keys_are():
    batch = prompt(SHARED, [[0], [1]])
    for aside, back, wrong in ((0, 1, 0), (0, 2, 0), (1, 3, 1)):
        refused = pytest.raises(UnsupportedModel, match=rf"keys that layer {wrong} makes; they must be back by")
        with apply(SHARED.model, ComesBack(aside=aside, back=back)), refused:
            SHARED.model(**batch.inputs)
    plain = SHARED.model(**batch.inputs).logits
    with apply(SHARED.model, ComesBack(aside=2, back=3)):
        got = SHARED.model(**batch.inputs).logits
    assert got.shape == plain.shape and not torch.equal(got, plain)
    with apply(PLAIN.model, ComesBack(aside=1, back=3)):
        assert bool(PLAIN.model(**batch.inputs).logits.isfinite().all())


# Evidence ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_evidence_of_layers_that_read_keys(layer, side):
    batch = prompt(SHARED, [[0], [0, 0]], side)
    wants = {"llm_attention": "visual", "llm_received": None, "llm_keys": None, "llm_importance": (0.3, 4)}
    method = Staged(1.0, {layer: 0.25}, wants)
    with apply(SHARED.model, method, keep=0.5):
        SHARED.model(**batch.inputs)
    attentions, keys = eager_maps(SHARED, batch.inputs)
    ((_, evidence),) = method.seen
    for place, (row, number) in enumerate([(0, 0), (1, 0), (1, 1)]):
        columns = torch.tensor(batch.columns[row][number])
        full = attentions[layer][row][:, :, columns]
        torch.testing.assert_close(evidence.llm_attention[place], full[:, columns], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(evidence.llm_received[place], full[:, columns].mean((0, 1)), atol=1e-5, rtol=1e-4)
        made = keys[layer % 2][row].mean(0)[columns]
        torch.testing.assert_close(evidence.llm_keys[place], made, atol=1e-5, rtol=1e-4)
        real = batch.inputs["attention_mask"][row].nonzero()[:, 0]
        rank = ranked(attentions[layer][row], real, 0.3, 4)[:, torch.searchsorted(real, columns)]
        torch.testing.assert_close(evidence.llm_importance[place], rank, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_evidence_after_a_stage_and_an_earlier_turn():
    """Rows of attention before layer 3, of what a stage before layer 1 and another turn have left; by hand."""
    model, batch = SHARED.model, prompt(SHARED, [[0]])
    method = Staged(1.0, {1: 0.5, 3: 0.25}, {"llm_attention": "last"})
    cache = DynamicCache(config=model.config.text_config)
    ids = torch.tensor([[30, *[IMAGE] * 6, 31, 32]])
    more = prompt(SHARED, [[1]]).inputs
    width = batch.inputs["input_ids"].shape[1]
    seen = {}
    with apply(model, method, keep=0.5):
        model(**batch.inputs, past_key_values=cache)
        attention = language_model(model).layers[3].self_attn
        see = lambda module, args, kwargs: seen.update(shared=kwargs["shared_kv_states"])  # noqa: E731
        handle = attention.register_forward_pre_hook(see, with_kwargs=True)
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
        pictures = {key: more[key] for key in ("pixel_values", "image_position_ids")}
        mask = torch.ones(1, width + ids.shape[1], dtype=torch.long)
        model(**inputs, **pictures, attention_mask=mask, past_key_values=cache)
        handle.remove()
    (_, before), (_, evidence) = method.seen[-2:]
    assert before.num_tokens == 6 and evidence.num_tokens == 3
    keys = cache.layers[1].keys  # made for the columns that layer 1 saw, of which layer 3 reads fewer
    assert keys.shape[2] == (width - 16 + 8) + (3 + 3)
    assert seen["shared"]["full_attention"][0].shape[2] == (width - 16 + 4) + (3 + 2)
    assert 0 < float(evidence.llm_attention.sum(-1).max()) < 1


# Pictures ------------------------------------------------------------------------------------------------------------


@BOTH
@torch.no_grad()
def test_places_come_from_the_positions_of_the_patches(family):
    """However the patches of a picture lie in its row, padding among them: the same tokens, the same evidence."""
    batch, wants = prompt(family, [[0, 1]]), {"received_attention": -2, "patch_pixels": None, "encoder_features": None}
    mixed = dict(batch.inputs)
    order = torch.stack([torch.randperm(72, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    for key in ("pixel_values", "image_position_ids"):
        mixed[key] = mixed[key].gather(1, order[..., None].expand_as(mixed[key]))
    found = []
    for inputs in (batch.inputs, mixed):
        method = Asks(wants)
        with apply(family.model, method, keep=0.25) as session:
            logits = family.model(**inputs).logits
        found.append((method.seen, logits))
        assert [picture.grid for picture in session.pictures] == [(4, 4), (2, 3)]
    (ours, plain), (theirs, shuffled) = found
    torch.testing.assert_close(shuffled, plain, atol=1e-4, rtol=1e-4)
    for one, other in zip(ours, theirs, strict=True):
        for name in wants:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_pixels_of_a_token_are_a_square_of_the_picture():
    """What the family's own image processor makes of a picture."""
    values = np.random.default_rng(0).integers(0, 256, (5 * 14, 14 * 14, 3), dtype=np.uint8)
    processor = Gemma4ImageProcessorPil(patch_size=7, pooling_kernel_size=2, do_resize=False, max_soft_tokens=70)
    made = processor(Image.fromarray(values), return_tensors="pt")
    count = int(made["num_soft_tokens_per_image"][0])
    made = {key: made[key] for key in ("pixel_values", "image_position_ids")}
    ids = torch.tensor([[1, *[IMAGE] * count, 5, 6]])
    method = Asks({"patch_pixels": None})
    with apply(PLAIN.model, method, keep=0.5):
        PLAIN.model(input_ids=ids, **made, mm_token_type_ids=(ids == IMAGE).int())
    (evidence,) = method.seen
    assert evidence.grid == (5, 14)
    grey = (torch.tensor(values) / 255).mean(-1)
    squares = grey.view(5, 2, 7, 14, 2, 7).permute(0, 3, 1, 4, 2, 5).reshape(70, 4 * 49)
    torch.testing.assert_close(evidence.patch_pixels[0], squares)


@pytest.mark.parametrize("name", ["standardize", "use_clipped_linears"])
@torch.no_grad()
def test_other_encoders(name):
    torch.manual_seed(0)
    model, batch = gemma4({name: True}, **LARGE).eval(), prompt(PLAIN, [[0, 1]])
    tower = model.model.vision_tower
    if name == "standardize":
        tower.std_bias.normal_()
        tower.std_scale.uniform_(0.5, 2)
    else:
        for part in tower.modules():
            if hasattr(part, "output_max"):
                part.output_min.fill_(-0.5)
                part.output_max.fill_(0.5)
    method = Asks({"encoder_features": None, "project": None})
    with apply(model, method, keep=0.25) as session, FlopCounterMode(display=False) as counter:
        model(**batch.inputs)
    assert session.flops == counter.get_total_flops()
    for evidence in method.seen:
        torch.testing.assert_close(evidence.project(evidence.encoder_features), evidence.features, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_merged_token_has_the_input_of_its_anchor():
    """Of the layer's own inputs; the part that is projected from the token's value is that of the merged value."""
    model, batch, seen = SHARED.model, prompt(SHARED, [[0]]), []
    handle = language_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["per_layer_inputs"]), with_kwargs=True
    )
    plain = model(**batch.inputs)
    handle.remove()
    with apply(model, Mean(), keep=0.25):
        handle = language_model(model).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["per_layer_inputs"]), with_kwargs=True
        )
        got = model(**batch.inputs)
        handle.remove()
    columns = batch.columns[0][0]
    left = [c for c in range(plain.logits.shape[1]) if c not in columns or (c - columns[0]) % 4 == 0]
    assert got.logits.shape[1] == len(left)
    assert torch.equal(seen[1], seen[0][:, left])


@torch.no_grad()
def test_a_prompt_of_embeddings():
    model, batch = SHARED.model, prompt(SHARED, [[0]])
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
    rest = {key: batch.inputs[key] for key in ("pixel_values", "image_position_ids", "mm_token_type_ids")}
    with apply(model, Asks({"text": None}), keep=0.25):
        want = model(**batch.inputs).logits
        got = model(inputs_embeds=embeds, **rest).logits
    torch.testing.assert_close(got, want)


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_is_refused():
    with pytest.raises(UnsupportedModel, match="use_bidirectional_attention='all': not supported yet"):
        apply(gemma4(use_bidirectional_attention="all"), Spread())
    blind = copy.deepcopy(PLAIN.model)
    blind.config.vision_config = None
    with pytest.raises(UnsupportedModel, match="without a vision encoder"):
        apply(blind, Spread())
    flex = copy.deepcopy(PLAIN.model)
    flex.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModel, match=r"flex_attention.*need 'sdpa' or 'eager'"):
        apply(flex, Spread())
    with pytest.raises(ValueError, match="reselect: got True"):
        apply(PLAIN.model, Spread(), reselect=True)


@torch.no_grad()
def test_videos_and_audio_are_refused():
    inputs = prompt(PLAIN, [[0]]).inputs
    clip = {
        "pixel_values_videos": inputs["pixel_values"],
        "video_position_ids": inputs["image_position_ids"],
        "num_frames_per_video": torch.tensor([1]),
    }
    with apply(PLAIN.model, Spread(), keep=0.5):
        with pytest.raises(ValueError, match="pixel_values_videos: video is not supported yet"):
            PLAIN.model(input_ids=inputs["input_ids"], **clip)
        with pytest.raises(ValueError, match="pixel_values_videos: video is not supported yet"):
            PLAIN.model.generate(input_ids=inputs["input_ids"], max_new_tokens=1, **clip)
        with pytest.raises(ValueError, match="input_features: audio is not supported yet"):
            PLAIN.model(**inputs, input_features=torch.zeros(1, 8, 16), input_features_mask=torch.ones(1, 8))


@torch.no_grad()
def test_patches_that_make_no_picture_are_refused():
    inputs = prompt(PLAIN, [[0]]).inputs
    places = inputs["image_position_ids"].clone()
    for wrong in (torch.where(places == 7, 6, places), torch.where(places[..., 1:] == 7, -1, places)):
        with (
            apply(PLAIN.model, Spread(), keep=0.5),
            pytest.raises(UnsupportedModel, match="image_position_ids that are no whole pictures"),
        ):
            PLAIN.model(**inputs | {"image_position_ids": wrong})

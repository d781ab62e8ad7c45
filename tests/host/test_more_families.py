"""What is particular to Idefics3, Mistral 3, GLM-4.6V, Gemma 3, PaliGemma and Qwen3.5; the rest is in other files."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from tests.host.families import (
    FAKE,
    FAMILIES,
    GLOBAL,
    IMAGE,
    TEXT,
    VISION,
    Family,
    _glm,
    _llava_next,
    _qwen_pictures,
    language_model,
    prompt,
    tiles,
)
from tests.host.reducers import Asks, Spread, Staged, spread
from tests.host.reference import generation_inputs, greedy, one_row
from tests.host.test_effort import Works
from tests.host.test_families import places_in, same_rows, staged_left
from vistok.host import UnsupportedModel, apply
from vistok.host.cache import ReducedLayer
from vistok.host.hosts import host_of

IDEFICS, MISTRAL, HYBRID = FAMILIES["idefics3"], FAMILIES["mistral3"], FAMILIES["qwen3.5"]
GEMMA, PALI = FAMILIES["gemma3"], FAMILIES["paligemma"]


# Tiles with text between them ---------------------------------------------------------------------------------------


def tiled(*pictures):
    """A row of ``pictures``, each (rows, columns) of tiles, with pixels and the places of the tokens."""
    line, places, count = [1, 10], [], 0
    for rows, columns in pictures:
        ids, tokens = tiles(rows, columns)
        places.append([len(line) + t for t in tokens])
        line += ids
        count += rows * columns + 1
    pixels = torch.randn(1, count, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.tensor([[*line, 5, 6]]), "pixel_values": pixels}, places


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (2, 2), (2, 3)])
@torch.no_grad()
def test_tiles_show_their_part_of_the_picture(shape):
    rows, columns = shape
    inputs, _ = tiled((0, 0), shape, (0, 0))
    with apply(IDEFICS.model, Spread(), keep=0.5) as session:
        IDEFICS.model(**inputs)
    first, picture, last = session.pictures
    assert first.grid == last.grid == (4, 4)
    assert picture.tokens_in == 16 * (rows * columns + 1) and picture.crops == ((4, 4),) * (rows * columns + 1)
    boxes = [(x / columns, y / rows, (x + 1) / columns, (y + 1) / rows) for y in range(rows) for x in range(columns)]
    assert [part.box for part in picture.layout.parts] == [(0, 0, 1, 1), *boxes]


@torch.no_grad()
def test_the_thumbnail_comes_first_and_the_text_between_tiles_stays():
    inputs, (places,) = tiled((2, 2))
    method = Asks()
    with apply(IDEFICS.model, method, keep=0.25) as session:
        got = IDEFICS.model(**inputs).logits
    (evidence,), (picture,) = method.seen, session.pictures
    features = IDEFICS.model.get_image_features(inputs["pixel_values"]).pooler_output[0].view(5, 16, -1)
    torch.testing.assert_close(evidence.features[0], features[[4, 0, 1, 2, 3]].flatten(0, 1))
    assert picture.keep.tolist() == spread(80, 20)
    ids = inputs["input_ids"][0]
    assert got.shape[1] == int((ids != IMAGE).sum()) + 20
    assert [ids[places[i] - 1] for i in (0, 16)] == [GLOBAL, 70] and ids[places[0] - 2] == FAKE


@torch.no_grad()
def test_names_of_tiles_and_ends_of_rows_are_no_part_of_the_question():
    inputs, _ = tiled((0, 0), (1, 2))
    method = Asks({"text_ids": None})
    with apply(IDEFICS.model, method, keep=0.5):
        IDEFICS.model(**inputs)
    asked = [ids[mask].tolist() for e in method.seen for ids, mask in zip(e.text_ids, e.text_mask, strict=True)]
    assert asked == [[FAKE, FAKE, 70, FAKE, 5, 6], [FAKE, 5, 6]]
    method = Asks({"text_ids": None})
    with apply(MISTRAL.model, method, keep=0.5):
        MISTRAL.model(**prompt(MISTRAL, [[0, 0]]).inputs)
    (evidence,) = method.seen
    asked = [ids[mask].tolist() for ids, mask in zip(evidence.text_ids, evidence.text_mask, strict=True)]
    assert asked == [[94, 20, 94, 21, 5, 6, 7, 8], [94, 21, 5, 6, 7, 8]]


@torch.no_grad()
def test_in_a_prompt_of_embeddings_each_tile_is_a_picture():
    inputs, _ = tiled((1, 2))
    embeds = IDEFICS.model.get_input_embeddings()(inputs["input_ids"])
    with apply(IDEFICS.model, Spread(), keep=4) as session:
        IDEFICS.model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    assert [picture.grid for picture in session.pictures] == [(4, 4)] * 3


@torch.no_grad()
def test_padding_and_other_sizes_of_tiles_are_refused():
    inputs, _ = tiled((0, 0))
    mask = torch.ones(1, 1, 56, 56, dtype=torch.long)
    with apply(IDEFICS.model, Spread()):
        IDEFICS.model(**inputs, pixel_attention_mask=mask)
        mask[..., 28:] = 0
        with pytest.raises(UnsupportedModel, match="pixel_attention_mask with padding"):
            IDEFICS.model(**inputs, pixel_attention_mask=mask)
        with pytest.raises(UnsupportedModel, match="28 x 28 pixels"):
            IDEFICS.model(**inputs | {"pixel_values": inputs["pixel_values"][..., :28, :28]})


# Other decoders and encoders of a family ----------------------------------------------------------------------------


def test_what_a_family_does_not_support():
    pixtral = tf.PixtralVisionConfig(**VISION, image_size=56, patch_size=7)
    windows = tf.MistralConfig(**TEXT, sliding_window=8)
    config = tf.Mistral3Config(vision_config=pixtral, text_config=windows, image_token_index=IMAGE)
    with pytest.raises(UnsupportedModel, match="sliding-window layers"):
        apply(tf.Mistral3ForConditionalGeneration(config), Spread())
    vision = tf.SiglipVisionConfig(**VISION, image_size=28, patch_size=7, vision_use_head=False)
    config = tf.PaliGemmaConfig(
        vision_config=vision, text_config=tf.Gemma2Config(**TEXT, head_dim=12), projection_dim=48, hidden_size=48
    )
    with pytest.raises(UnsupportedModel, match="a gemma2 decoder: not supported yet"):
        apply(tf.PaliGemmaForConditionalGeneration(config), Spread())
    flex = copy.deepcopy(GEMMA.model)
    flex.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModel, match=r"flex_attention.*need 'sdpa' or 'eager'"):
        apply(flex, Spread())
    both = copy.deepcopy(GEMMA.model)
    both.model.language_model.config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModel, match="with use_bidirectional_attention"):
        apply(both, Spread())


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.effort])
def test_methods_that_spend_less_are_refused_where_they_are_not_defined(name):
    with pytest.raises(UnsupportedModel, match="Works"):
        apply(FAMILIES[name].model, Works())


@torch.no_grad()
def test_glm_4_6v_is_glm_4_1v_to_the_host():
    torch.manual_seed(0)
    model = _glm("Glm46V").eval()
    pictures, (count,), _ = _qwen_pictures([0])
    ids = torch.tensor([[1, *[IMAGE] * count, 5, 6]])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **pictures}
    assert type(host_of(model)) is type(host_of(FAMILIES["glm-4v"].model))
    plain = model(**inputs).logits
    with apply(model, Asks({"received_attention": -2}), keep=1.0):
        assert torch.equal(model(**inputs).logits, plain)
    with apply(model, Asks({"received_attention": -2}), keep=0.25) as session:
        assert model(**inputs).logits.shape[1] == 3 + 4
    assert session.tokens_kept == 4


@torch.no_grad()
def test_pictures_of_llava_next_video():
    family = Family("llava-next-video", lambda: _llava_next("LlavaNextVideo"), FAMILIES["llava-next"].pictures, sizes=2)
    batch = prompt(family, [[0], [1, 0]])
    plain = family.model(**batch.inputs).logits
    with apply(family.model, Spread(), keep=1.0):
        assert torch.equal(family.model(**batch.inputs).logits, plain)
    left = batch.left(lambda n: spread(n, n // 4))
    with apply(family.model, Spread(), keep=0.25):
        got = family.model(**batch.inputs).logits
    same_rows(family.model, batch, got, left)


# Linear attention ---------------------------------------------------------------------------------------------------


def turns(method, rows=((0,),), **how):
    """Two turns on one cache: (ids and mask of the second, its answer, the cache, the session)."""
    model, batch = HYBRID.model, prompt(HYBRID, [list(row) for row in rows])
    cache = DynamicCache(config=model.config.text_config)
    keys = ("attention_mask", "image_grid_thw", "mm_token_type_ids")
    with apply(model, method, keep=0.25, **how) as session:
        first = model.generate(**batch.inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
        inputs = batch.inputs | {"input_ids": torch.cat([first, torch.tensor([[30, 31, 32]] * len(rows))], 1)}
        new = inputs["input_ids"].shape[1] - batch.inputs["input_ids"].shape[1]
        inputs |= {keys[0]: torch.nn.functional.pad(inputs[keys[0]], (0, new), value=1)}
        inputs |= {keys[2]: torch.nn.functional.pad(inputs[keys[2]], (0, new))}
        more = {key: inputs[key] for key in ("input_ids", *keys)}
        second = model.generate(**more, past_key_values=cache, max_new_tokens=4, do_sample=False)
    return type(batch)(inputs, batch.columns), second[:, inputs["input_ids"].shape[1] :].tolist(), cache, session


@pytest.mark.parametrize("method", [Spread(), Staged(0.5, {1: 0.25, 3: 0.125})], ids=["input", "staged"])
def test_a_second_turn_after_linear_attention(method):
    batch, got, cache, session = turns(method, ((0,), (1, 0)))
    given, mask = generation_inputs(HYBRID.model, **batch.inputs), batch.inputs["attention_mask"]
    left, stages = batch.left(lambda n: spread(n, round(0.25 * n))), {}
    if isinstance(method, Staged):
        left, stages = staged_left(batch, 0.5, {1: 0.25, 3: 0.125})
    for row in range(2):
        by_hand = one_row(given, row, mask)
        to_places = places_in(by_hand)
        own = {layer: to_places(columns[row]) for layer, columns in stages.items()}
        assert got[row] == greedy(HYBRID.model, by_hand, to_places(left[row]), 4, own), row
    assert [type(layer) for layer in cache.layers] == [LinearAttentionLayer] * 2 + [ReducedLayer, LinearAttentionLayer]
    states = [t for i in (0, 1, 3) for t in (cache.layers[i].conv_states[0], cache.layers[i].recurrent_states[0])]
    assert session.kv_bytes == sum(t.nbytes for t in (*states, cache.layers[2].keys, cache.layers[2].values))
    assert turns(method, ((0,), (1, 0)), reselect=True)[1] == got  # which asks again, and gets the same tokens


@torch.no_grad()
def test_attention_is_asked_for_only_where_there_is_some():
    batch, method = prompt(HYBRID, [[1]]), Staged(1.0, {2: 0.5}, {"llm_attention": "last"})
    with apply(HYBRID.model, method, keep=0.5):
        HYBRID.model(**batch.inputs)
    ((_, evidence),) = method.seen
    eager = copy.deepcopy(HYBRID.model)
    eager.set_attn_implementation({"text_config": "eager"})
    (maps,) = eager(**batch.inputs, output_attentions=True).attentions
    torch.testing.assert_close(evidence.llm_attention[0, :, 0], maps[0, :, -1, batch.columns[0][0]])
    refused = pytest.raises(UnsupportedModel, match="llm_attention before decoder layer 3, which is a linear-attention")
    with apply(HYBRID.model, Staged(1.0, {3: 0.5}, {"llm_attention": "last"}), keep=0.5), refused:
        HYBRID.model(**batch.inputs)


@torch.no_grad()
def test_padding_between_turns_of_linear_attention_is_refused():
    model, cache = HYBRID.model, DynamicCache(config=HYBRID.model.config.text_config)
    first = torch.tensor([[1, 5, 6], [1, 7, 8]])
    batch = prompt(HYBRID, [[1, 1], [0]])
    width = batch.inputs["input_ids"].shape[1]
    more = {"attention_mask": torch.ones(2, 3 + width), "position_ids": torch.arange(3, 3 + width).expand(3, 2, -1)}
    with apply(model, Spread(), keep=0.25):
        model(input_ids=first, position_ids=torch.arange(3).expand(3, 2, -1), past_key_values=cache)
        with pytest.raises(ValueError, match="linear-attention layers of this model would read the padding"):
            model(**batch.inputs | more, past_key_values=cache)


@torch.no_grad()
def test_flops_of_linear_attention():
    host, width = host_of(HYBRID.model), 48
    counts = {}
    for kind, layer in (("linear", host.layers[0]), ("full", host.layers[2])):
        x = torch.randn(1, 7, width)
        rotary = host.language_model.rotary_emb(x, torch.arange(7).expand(3, 1, 7))
        with FlopCounterMode(display=False) as counter:
            layer(x, position_embeddings=rotary)
        counts[kind] = {name.rsplit(".")[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        counts[kind]["all"] = counter.get_total_flops()
    assert host.layer_flops(host.layers[2], 7, 7) == counts["full"]["all"]
    maps = sum(counts["linear"][n] for n in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "mlp"))
    recurrence = 7 * 4 * 3 * 2 * 8 * 12
    convolution = 7 * 2 * 4 * (2 * 2 * 8 + 4 * 12)
    assert host.layer_flops(host.layers[0], 7, 7) == maps + convolution + recurrence


# Masks that are more than causal ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_window_ends_where_it_did():
    """Gemma 3: of a picture's 16 tokens one stays; the last token of the text sees 10 columns."""
    model, layers = GEMMA.model, language_model(GEMMA.model).layers
    ids = torch.tensor([[1, *[IMAGE] * 16, 5, 6, 7, 8, 9, 11, 12, 13]])
    inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE).int(), "pixel_values": torch.randn(1, 3, 56, 56)}
    seen = {}

    class One(Spread):
        def __init__(self, at):
            object.__setattr__(self, "at", at)

        def select(self, evidence, keep):
            return torch.tensor([[self.at]])

    hook = layers[0].register_forward_pre_hook(lambda m, a, k: seen.update(mask=k["attention_mask"]), with_kwargs=True)
    for at, near in ((0, False), (13, False), (14, True), (15, True)):  # in column at + 1; the last sees 15 .. 24
        with apply(model, One(at), keep=1):
            model(**inputs)
        assert seen["mask"].shape == (1, 1, 10, 10)
        assert bool(seen["mask"][0, 0, -1, 1]) == near
    hook.remove()


@pytest.mark.parametrize("family", [GEMMA, PALI], ids=["gemma3", "paligemma"])
def test_eager_attention_gives_the_same(family):
    eager = copy.deepcopy(family.model)
    eager.set_attn_implementation("eager")
    batch = prompt(family, [[0, 0], [0]])
    for method in (Spread(), Staged(0.5, {1: 0.25}, {"llm_attention": "last"})):
        with torch.no_grad(), apply(family.model, method, keep=0.25):
            want = family.model.generate(**batch.inputs, max_new_tokens=5, do_sample=False)
        with torch.no_grad(), apply(eager, method, keep=0.25):
            assert torch.equal(eager.generate(**batch.inputs, max_new_tokens=5, do_sample=False), want)


@pytest.mark.parametrize("family", [GEMMA, PALI], ids=["gemma3", "paligemma"])
@torch.no_grad()
def test_beams_and_samples(family):
    batch = prompt(family, [[0], [0, 0]])
    with apply(family.model, Spread(), keep=0.25) as session:
        beams = family.model.generate(**batch.inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    assert len(beams) == 2 and [picture.tokens_kept for picture in session.pictures] == [4, 4, 4]


@torch.no_grad()
def test_recompacted_positions_of_two_rotary_embeddings():
    batch = prompt(GEMMA, [[0, 0], [0]])
    left = batch.left(lambda n: spread(n, 4))
    given = generation_inputs(GEMMA.model, **batch.inputs)
    with apply(GEMMA.model, Spread(), keep=0.25, position="recompact"):
        got = GEMMA.model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
    for row in range(2):
        by_hand = one_row(given, row, batch.inputs["attention_mask"])
        place = {c: i for i, c in enumerate(by_hand["real"].tolist())}
        kept = torch.tensor([place[c] for c in left[row].tolist()])
        assert got[row, -1:].tolist() == greedy(GEMMA.model, by_hand, kept, 1, recompact=True)


@torch.no_grad()
def test_a_cache_with_windows_goes_on_inside_only():
    inputs = prompt(GEMMA, [[0]]).inputs
    with apply(GEMMA.model, Spread(), keep=0.25):
        cache = GEMMA.model(**inputs, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="past_key_values: this cache was reduced"):
        GEMMA.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    plain = GEMMA.model(**inputs, use_cache=True).past_key_values
    with apply(GEMMA.model, Spread(), keep=0.25), pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        mask = torch.ones(1, 2 * inputs["input_ids"].shape[1], dtype=torch.long)
        GEMMA.model(**inputs | {"attention_mask": mask}, past_key_values=plain)


@torch.no_grad()
def test_paligemma_needs_its_token_types():
    inputs = dict(prompt(PALI, [[0]]).inputs)
    del inputs["token_type_ids"]
    with apply(PALI.model, Spread(), keep=0.25), pytest.raises(ValueError, match="token_type_ids: missing"):
        PALI.model(**inputs)


@torch.no_grad()
def test_masks_of_the_layers_are_refused():
    inputs = prompt(PALI, [[0]]).inputs
    length = inputs["input_ids"].shape[1]
    full = torch.ones(1, 1, length, length, dtype=torch.bool)
    with apply(PALI.model, Spread(), keep=0.25), pytest.raises(ValueError, match="attention_mask: got masks of the la"):
        PALI.model(**inputs | {"attention_mask": full})

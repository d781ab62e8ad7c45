"""The evidence of encoder and language model against full attention maps computed the plain way."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.host.families import FAMILIES, IMAGE, SHRUNK, TEXT, blocks, prompt, tower
from tests.host.plain import eager_maps
from tests.host.reducers import Asks, Staged
from vistok.host import apply
from vistok.host.vision import layers_of

LANGUAGE = (
    *("llava-clip", "onevision", "qwen2-vl", "qwen3-vl", "internvl", "idefics3", "glm-4v"),
    *("gemma3", "paligemma", "gemma4"),
)
ENCODER = ("cls_attention", "wide_cls_attention", "received_attention", "given_attention", "encoder_attention")


class Maps:
    """Queries, keys and full attention maps of one encoder layer, flat over patches in the order of the picture."""

    def __init__(self, family, layer, inputs):
        model, seen = family.model, {}
        block = blocks(model)[layer]
        attention = next(getattr(block, n) for n in ("attn", "attention", "self_attn") if hasattr(block, n))
        names = ("qkv",), ("q_norm", "k_norm"), ("q_proj", "k_proj")
        parts = next([getattr(attention, n) for n in some] for some in names if hasattr(attention, some[0]))
        handles = [part.register_forward_hook(lambda m, a, o, i=i: seen.update({i: o})) for i, part in enumerate(parts)]
        handles.append(attention.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True))
        windows = family.name == "qwen2.5-vl"
        if windows:
            embed = tower(model).patch_embed
            handles.append(embed.register_forward_hook(lambda m, a, o: seen.update(embedded=o)))
            enter = lambda m, a, k: seen.update(entered=a[0])  # noqa: E731
            handles.append(blocks(model)[0].register_forward_pre_hook(enter, with_kwargs=True))
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
        if family.name.startswith("gemma4"):
            q, k, cuts = gemma4_patches(seen[0], seen[1], *seen["position_embeddings"], inputs["image_position_ids"])
            self._packed(q, k, cuts, 1.0, torch.arange(len(q)))
            return
        if family.units:
            self._units(seen, attention.num_heads, family.class_token)
            return
        if len(parts) == 1:
            q, k, _ = seen[0].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
            cuts = seen["cu_seqlens"].tolist()
        else:
            q, k = (seen[i][0].unflatten(-1, (attention.num_heads, -1)) for i in (0, 1))
            cuts = [0, *accumulate(int(h * w) // 49 for h, w in inputs["image_sizes"])]
        cos, sin = (t[:, None] for t in seen["position_embeddings"])
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        # Windowed encoders reorder the patches: find each one again by the value it entered with.
        order = torch.arange(len(q))
        if windows:
            order = (seen["embedded"][:, None] == seen["entered"]).all(-1).int().argmax(1)
        self._packed(q, k, cuts, 1 / math.sqrt(q.shape[-1]), order)

    def _units(self, seen, heads, class_token):
        q, k = (seen[i].unflatten(-1, (heads, -1)).transpose(1, 2) for i in (0, 1))
        units, _, length, width = q.shape
        first = int(class_token)
        count = length - first
        full = (q @ k.transpose(2, 3) / math.sqrt(width)).softmax(-1)
        wide_q, wide_k = seen[0], seen[1]
        wide = (wide_q @ wide_k.transpose(1, 2) / math.sqrt(wide_q.shape[-1])).softmax(-1)
        self.given_attention = (full[:, :, first:, first:].sum(-1).mean(1) / count).flatten()
        self.received_attention = full.mean((1, 2))[:, first:].flatten()
        rows = full[:, :, 0, 1:] if class_token else full.mean(2)
        self.cls_attention = rows.transpose(1, 2).flatten(0, 1).T
        self.wide_cls_attention = (wide[:, 0, 1:] if class_token else wide.mean(1)).flatten()
        self.encoder_keys = seen[1][:, first:].flatten(0, 1)
        self.encoder_mean_keys = k[:, :, first:].mean(1).flatten(0, 1)
        self.encoder_attention = torch.zeros(heads, units * count, units * count)
        for unit in range(units):
            part = slice(unit * count, (unit + 1) * count)
            self.encoder_attention[:, part, part] = full[unit, :, first:, first:]

    def _packed(self, q, k, cuts, scale, order):
        kind = torch.bucketize(torch.arange(len(q)), torch.tensor(cuts[1:]), right=True)
        apart = kind[:, None] != kind
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        full = logits.masked_fill(apart, -math.inf).softmax(-1)
        wide = (q.flatten(1) @ k.flatten(1).T / math.sqrt(q[0].numel())).masked_fill(apart, -math.inf).softmax(-1)
        size = (~apart).sum(0)
        self.cls_attention = (full.sum(1) / size)[:, order]
        self.received_attention = self.cls_attention.mean(0)
        self.given_attention = (1 / size)[order]
        self.wide_cls_attention = (wide.sum(0) / size)[order]
        self.encoder_keys = k.flatten(1)[order]
        self.encoder_mean_keys = k.mean(1)[order]
        self.encoder_attention = full[:, order][:, :, order]


def turned(x, cos, sin):
    """``x`` after the rotary embedding."""
    return x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin


def gemma4_patches(q, k, cos, sin, positions):
    """Queries and keys (S, H, d) of all patches without padding, and where the pictures begin and end. The first half
    of a head is turned by a patch's column, the second by its row."""
    real = (positions >= 0).all(-1)
    halves = [
        [turned(*(t.chunk(2, -1)[side] for t in (x, cos[:, :, None], sin[:, :, None]))) for side in (0, 1)]
        for x in (q, k)
    ]
    q, k = (torch.cat(both, -1)[real] for both in halves)
    return q, k, [0, *accumulate(real.sum(1).tolist())]


def of_picture(value, name, first, patches):
    """One picture's field per token: means over its patches, keys joined."""
    index = first + torch.tensor(patches)
    if name == "encoder_attention":
        return value[:, index][:, :, :, index].mean((2, 4))
    if name in ("encoder_keys", "encoder_mean_keys"):
        return value[index].flatten(1)
    return value[..., index].mean(-1)


@pytest.mark.parametrize("layer", [-2, 1])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_encoder_evidence(family, layer):
    sizes = [[0, family.sizes - 1], [0]]
    batch = prompt(family, sizes)
    names = (*ENCODER, "encoder_keys", "encoder_mean_keys")
    method = Asks(dict.fromkeys(names, layer))
    with apply(family.model, method, keep=0.25):
        family.model(**batch.inputs)
    maps = Maps(family, layer % 4, batch.inputs)
    first, by_size = 0, {}
    for size in [size for row in sizes for size in row]:
        by_size.setdefault(size, []).append(first)
        first += family.spent[size]
    assert len(method.seen) == len(by_size)  # pictures of one layout come as one batch
    for size, firsts in by_size.items():
        evidence = method.seen[list(by_size).index(size)]
        assert len(evidence.features) == len(firsts)
        for number, start in enumerate(firsts):
            for name in names:
                want = of_picture(getattr(maps, name), name, start, family.patches(size))
                torch.testing.assert_close(getattr(evidence, name)[number], want, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_several_layers_come_as_a_tuple():
    family = FAMILIES["llava-clip"]
    batch = prompt(family, [[0]])
    method = Asks({"cls_attention": slice(1, -1), "received_attention": (0, 0.9)})
    with apply(family.model, method, keep=0.5):
        family.model(**batch.inputs)
    (evidence,) = method.seen
    for values, layers, name in (
        (evidence.cls_attention, (1, 2), "cls_attention"),
        (evidence.received_attention, (0, 3), "received_attention"),
    ):
        assert len(values) == len(layers)
        for value, layer in zip(values, layers, strict=True):
            torch.testing.assert_close(value[0], getattr(Maps(family, layer, batch.inputs), name), atol=1e-5, rtol=1e-4)


def test_layer_specs():
    assert layers_of(-2, 24) == [22]
    assert layers_of(9 / 24, 24) == [8]
    assert layers_of(9 / 24, 4) == [1]
    assert layers_of(slice(10, -1), 12) == [10]
    assert layers_of((-1, 0.5), 4) == [3, 1]
    for wrong in (4, -5, 1.0, slice(4, None), True, None):
        with pytest.raises(ValueError, match="needs: layer"):
            layers_of(wrong, 4)


@torch.no_grad()
def test_encoder_features_are_what_the_projector_gets():
    for family in FAMILIES.values():
        batch = prompt(family, [[0, family.sizes - 1]])
        method = Asks({"encoder_features": None})
        with apply(family.model, method, keep=0.5) as session:
            family.model(**batch.inputs)
            for evidence in method.seen:
                tokens = session._host.project(evidence.encoder_features)
                torch.testing.assert_close(tokens, evidence.features, atol=1e-5, rtol=1e-4)
        assert {e.grid or e.crops for e in method.seen} == {p.grid or p.crops for p in session.pictures}


@torch.no_grad()
def test_crops_cover_the_picture():
    family = FAMILIES["llava-next"]
    with apply(family.model, Asks(), keep=0.5) as session:
        family.model(**prompt(family, [[0, 1]]).inputs)
    wide, square = (p.layout.parts for p in session.pictures)
    assert [p.grid for p in wide] == [(4, 4), (4, 4), (4, 4)]
    assert [p.box for p in wide] == [(0, 0, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert [p.grid for p in square] == [(4, 4)] + 4 * [(3, 4)]
    assert square[4].box == (0.5, 0.5, 1, 1)


@torch.no_grad()
def test_onevision_shrinks_large_pictures_and_so_does_the_evidence():
    """What is interpolated for the language model is interpolated for the methods, by the model's own packing."""
    method = Asks({"received_attention": 1})
    batch = prompt(SHRUNK_SHORT, [[1]])
    with apply(SHRUNK.model, method, keep=0.25) as session:
        got = SHRUNK.model(**batch.inputs).logits
    (evidence,) = method.seen
    assert evidence.crops == ((4, 4), (3, 4)) and session.tokens_in == 28
    assert got.shape[1] == batch.inputs["input_ids"].shape[1] - 28 + 7
    maps = Maps(FAMILIES["onevision"], 1, batch.inputs | prompt(FAMILIES["onevision"], [[1]]).inputs)
    packed, _ = SHRUNK.model.model.pack_image_features(
        [maps.received_attention.view(5, 16, 1)], batch.inputs["image_sizes"], torch.full((1,), -1.0), "anyres_max_1"
    )
    want = packed[0][packed[0][:, 0] >= 0][:, 0]
    torch.testing.assert_close(evidence.received_attention[0], want, atol=1e-5, rtol=1e-4)


def _shrunk_pictures(sizes):
    inputs, _, _ = FAMILIES["onevision"].pictures(sizes)
    return (
        inputs,
        [16 + 3 * 5] * len(sizes),
        [[*range(16), *(16 + 5 * r + c for r in range(3) for c in range(4))]] * len(sizes),
    )


SHRUNK_SHORT = type(SHRUNK)("short", SHRUNK.build, _shrunk_pictures, sizes=2)


# The language model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "last", "visual"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_language_model_evidence(name, side, kind):
    family = FAMILIES[name]
    batch = prompt(family, [[0], [0, 0]], side)
    method = Staged(1.0, {2: 0.25}, {"llm_attention": kind, "llm_received": None, "llm_keys": None})
    with apply(family.model, method, keep=0.5):
        family.model(**batch.inputs)
    attentions, keys = eager_maps(family, batch.inputs)
    ((layer, evidence),) = method.seen
    assert layer == 2 and len(evidence.features) == 3
    pictures = [(row, number) for row, number in ((0, 0), (1, 0), (1, 1))]
    for place, (row, number) in enumerate(pictures):
        columns = torch.tensor(batch.columns[row][number])
        full = attentions[2][row][:, :, columns]
        real = batch.inputs["attention_mask"][row].nonzero()[:, 0]
        after = [int(c) for c in real if c > columns[-1] and batch.inputs["input_ids"][row, c] != IMAGE]
        queries = {"text": torch.tensor(after), "last": real[-1:], "visual": columns}[kind]
        got = evidence.llm_attention[place]
        if kind == "text":
            got = got[:, evidence.text_mask[place]]
            assert torch.equal(
                evidence.text_ids[place][evidence.text_mask[place]], batch.inputs["input_ids"][row, after]
            )
        torch.testing.assert_close(got, full[:, queries], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(evidence.llm_received[place], full[:, columns].mean((0, 1)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(evidence.llm_keys[place], keys[2][row].mean(0)[columns], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_language_model_evidence_sees_the_keys_of_earlier_turns():
    family = FAMILIES["llava-clip"]
    first, second = prompt(family, [[0], [0, 0]]), prompt(family, [[0], [0]], text=(31, 32, 33))
    mask = torch.cat([first.inputs["attention_mask"], second.inputs["attention_mask"]], 1)
    method = Staged(1.0, {1: 0.5}, {"llm_attention": "last"})
    with apply(family.model, Staged(1.0, {3: 1.0}), keep=1.0):
        cache = family.model(**first.inputs, use_cache=True).past_key_values
    with apply(family.model, method, keep=0.5):
        family.model(**second.inputs | {"attention_mask": mask}, past_key_values=cache)
    pixels = torch.cat(
        [first.inputs["pixel_values"][:1], second.inputs["pixel_values"][:1], first.inputs["pixel_values"][1:],
         second.inputs["pixel_values"][1:]]
    )  # fmt: skip
    ids = torch.cat([first.inputs["input_ids"], second.inputs["input_ids"]], 1)
    attentions, _ = eager_maps(family, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    ((_, evidence),) = method.seen
    width = first.inputs["input_ids"].shape[1]
    for row in (0, 1):
        columns = width + torch.tensor(second.columns[row][0])
        last = int(mask[row].nonzero()[-1, 0])
        want = attentions[1][row][:, last, columns]
        torch.testing.assert_close(evidence.llm_attention[row][:, 0], want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_question():
    family = FAMILIES["llava-clip"]
    batch = prompt(family, [[0], [0, 0]])
    method = Asks({"text": None, "text_mask": None, "text_ids": None})
    with apply(family.model, method, keep=0.5):
        family.model(**batch.inputs)
    (evidence,) = method.seen
    asked = [ids[mask].tolist() for ids, mask in zip(evidence.text_ids, evidence.text_mask, strict=True)]
    assert asked == [[20, 5, 6, 7, 8], [21, 22, 5, 6, 7], [22, 5, 6, 7]]
    embed = family.model.get_input_embeddings()
    torch.testing.assert_close(evidence.text[1], embed(torch.tensor(asked[1])))
    assert not evidence.text[2][~evidence.text_mask[2]].any()


@torch.no_grad()
def test_a_picture_at_the_end_is_asked_about_by_the_text_before_it():
    family = FAMILIES["llava-clip"]
    ids = torch.tensor([[1, 30, 31, *[IMAGE] * 16]])
    method = Asks({"text_ids": None})
    with apply(family.model, method, keep=0.5):
        family.model(input_ids=ids, pixel_values=prompt(family, [[0]]).inputs["pixel_values"])
    assert method.seen[0].text_ids.tolist() == [[30, 31]]


# What is not computed -----------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The second largest dimension of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1:
                self.seen = max(self.seen, sorted(tensor.shape)[-2])
        return out


def wide_llava():
    """256 patches, more than any other dimension."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=2,
        ),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
    )
    return tf.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_no_map_is_made_where_only_rows_are_asked_for():
    model = wide_llava()
    assert model.config._attn_implementation == "sdpa"
    inputs = {"input_ids": torch.tensor([[1, *[IMAGE] * 256, 5]]), "pixel_values": torch.randn(1, 3, 32, 32)}

    def largest(**wants):
        with apply(model, Asks(wants), keep=0.25), Largest() as mode:
            model(**inputs, logits_to_keep=1)
        return mode.seen

    assert largest() < 100
    assert largest(cls_attention=-2) < 100
    assert largest(cls_attention=slice(0, -1), wide_cls_attention=-1, encoder_keys=-2) < 100
    assert largest(received_attention=-2, given_attention=1) < 100  # in blocks of queries
    assert largest(encoder_attention=-2) >= 256


@torch.no_grad()
def test_only_the_layers_asked_for_are_hooked():
    model = FAMILIES["llava-clip"].model
    model(**prompt(FAMILIES["llava-clip"], [[0]]).inputs)
    layers = model.model.vision_tower.encoder.layers
    before = [len(layer.self_attn.q_proj._forward_hooks) for layer in layers]
    with apply(model, Asks({"cls_attention": -2}), keep=0.5):
        inside = [len(layer.self_attn.q_proj._forward_hooks) for layer in layers]
    assert [b - a for a, b in zip(before, inside, strict=True)] == [0, 0, 1, 0]

"""Class-token logits, states, pixels, projector, PageRank, index and carry, against values computed the plain way."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from tests.host.families import FAMILIES, blocks, prompt, tower
from tests.host.plain import eager_maps
from tests.host.reducers import Asks, Spread, Staged
from tests.host.test_evidence import LANGUAGE, Largest, wide_llava
from vistok.core.score import pagerank
from vistok.host import Reduction, apply

CLASS_TOKEN = [name for name, family in FAMILIES.items() if family.class_token]
QWEN_PIXELS = [name for name in FAMILIES if name.startswith(("qwen", "glm"))]
"""Whose processors give patches, not pictures."""


@torch.no_grad()
def outputs(family, modules, inputs):
    """What each of ``modules`` returns in a run of the plain model; what it was given is under (name, "in")."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda m, a, o, name=name: seen.update({name: o, (name, "in"): a}))
        for name, module in modules.items()
    ]
    family.model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def run(family, wants, **how):
    """[(its patches' place among all patches, size, evidence of the picture)] of three pictures of one or two sizes."""
    sizes = [0, family.sizes - 1, 0]
    batch = prompt(family, [sizes[:2], sizes[2:]])
    method = Asks(wants)
    with torch.no_grad(), apply(family.model, method, keep=0.25, **how):
        family.model(**batch.inputs)
    pictures, first, seen = [], 0, {}
    by_size = list(dict.fromkeys(sizes))  # pictures of one layout come as one batch
    for size in sizes:
        evidence, number = method.seen[by_size.index(size)], seen.get(size, 0)
        pictures.append((first, size, evidence, number))
        first, seen[size] = first + family.spent[size], number + 1
    return batch, pictures


def joined(flat, first, patches):
    return flat[first + torch.tensor(patches)].flatten(1)


# The vision encoder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_TOKEN)
def test_class_token_logits(name):
    family, layer = FAMILIES[name], -2
    batch, pictures = run(family, {"cls_logits": layer, "cls_attention": layer})
    block = blocks(family.model)[layer]
    parts = block.attention if name == "internvl" else block.self_attn
    query, key = (parts.q_norm, parts.k_norm) if name == "internvl" else (parts.q_proj, parts.k_proj)
    seen = outputs(family, {"q": query, "k": key}, batch.inputs)
    q, k = (seen[n].unflatten(-1, (4, 8)) for n in "qk")
    plain = torch.einsum("shd,sphd->shp", q[:, 0], k) / math.sqrt(8)
    flat = plain[:, :, 1:].transpose(1, 2).flatten(0, 1)
    for first, size, evidence, number in pictures:
        want = flat[first + torch.tensor(family.patches(size))].mean(1).T
        torch.testing.assert_close(evidence.cls_logits[number], want, atol=1e-5, rtol=1e-4)
        if name == "llava-clip":  # elsewhere a picture has several softmaxes, or a token several patches
            share = evidence.cls_attention[number] / evidence.cls_attention[number].sum(-1, keepdim=True)
            torch.testing.assert_close(evidence.cls_logits[number].softmax(-1), share)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in CLASS_TOKEN])
def test_logits_of_an_encoder_without_a_class_token_are_refused(name):
    model = FAMILIES[name].model
    wanted = rf"^Asks needs cls_logits, which {type(model).__name__} cannot give: .* has no class token"
    with pytest.raises(ValueError, match=wanted):
        apply(model, ["fastervlm", Asks({"cls_logits": -2})], keep=0.5)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_states_after_a_layer(family):
    wants = {"encoder_states": (1, -1), "encoder_features": None}
    batch, pictures = run(family, wants)
    layers = blocks(family.model)
    modules = {1: layers[1], 3: layers[3], "first": layers[0]}
    if family.name == "qwen2.5-vl":
        modules["embed"] = tower(family.model).patch_embed
    seen = outputs(family, modules, batch.inputs)
    order = slice(None)
    if family.name == "qwen2.5-vl":  # patches stand window by window: find each by the value it came with
        order = (seen["embed"][:, None] == seen["first", "in"][0]).all(-1).int().argmax(1)
        assert not torch.equal(order, torch.arange(len(order)))
    for place, layer in enumerate((1, 3)):
        flat = seen[layer][order]
        if "image_position_ids" in batch.inputs:
            flat = flat[(batch.inputs["image_position_ids"] >= 0).all(-1)]
        if flat.ndim == 3:
            flat = flat[:, int(family.class_token) :].flatten(0, 1)
        for first, size, evidence, number in pictures:
            states = evidence.encoder_states[place][number]
            torch.testing.assert_close(states, joined(flat, first, family.patches(size)))
    if family.name.startswith("qwen"):
        for _, _, evidence, _ in pictures:
            assert torch.equal(evidence.encoder_states[1], evidence.encoder_features)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_pixels_of_each_token(family):
    batch, pictures = run(family, {"patch_pixels": None})
    pixels = batch.inputs["pixel_values"]
    if pixels.ndim == 5:  # of a picture's crops only those that it was cut into
        unit = pixels.shape[-1] * pixels.shape[-2] // 49
        units = [family.spent[size] // unit for _, size, _, _ in pictures]
        pixels = torch.cat([picture[:count] for picture, count in zip(pixels, units, strict=True)])
    if family.name in QWEN_PIXELS:
        flat = [patch.view(3, 2, 7, 7).mean((0, 1)).flatten() for patch in pixels]
    elif family.name.startswith("gemma4"):  # the three colours of a pixel side by side
        real = (batch.inputs["image_position_ids"] >= 0).all(-1)
        flat = list(pixels[real].view(-1, 49, 3).mean(-1))
    else:
        sizes = batch.inputs.get("image_sizes") if family.name == "mistral3" else None
        shapes = [pixels.shape[-2:]] * len(pixels) if sizes is None else sizes.tolist()
        corners = [
            (unit, y, x)
            for unit, (h, w) in zip(pixels, shapes, strict=True)
            for y in range(0, h, 7)
            for x in range(0, w, 7)
        ]
        flat = [unit.mean(0)[y : y + 7, x : x + 7].flatten() for unit, y, x in corners]
    for first, size, evidence, number in pictures:
        assert evidence.patch_pixels.dtype == torch.float32
        want = joined(torch.stack(flat), first, family.patches(size))
        torch.testing.assert_close(evidence.patch_pixels[number], want)


def test_pixels_of_a_token_are_a_square_of_the_picture():
    """What Qwen's own image processor makes of a picture: a token is 2 x 2 patches of 7 x 7 pixels."""
    family, side = FAMILIES["qwen2.5-vl"], 14
    values = np.random.default_rng(0).integers(0, 256, (3 * side, 4 * side, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, do_resize=False, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )
    made = processor(Image.fromarray(values), return_tensors="pt")
    batch = prompt(family, [[0]])
    tokens = 12
    ids = torch.cat([batch.inputs["input_ids"][:, :2], torch.full((1, tokens), 98), torch.tensor([[5, 6]])], 1)
    method = Asks({"patch_pixels": None})
    with torch.no_grad(), apply(family.model, method, keep=0.5):
        family.model(input_ids=ids, **made, mm_token_type_ids=(ids == 98).int())
    (evidence,) = method.seen
    assert evidence.grid == (3, 4)
    grey = ((torch.tensor(values) / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])).mean(-1)
    squares = grey.view(3, 2, 7, 4, 2, 7).permute(0, 3, 1, 4, 2, 5).reshape(12, 4 * 49)
    torch.testing.assert_close(evidence.patch_pixels[0], squares, atol=1e-5, rtol=1e-4)


@dataclass(frozen=True)
class Projects(Asks):
    """Calls the projector while it reduces."""

    def select(self, evidence, keep):
        some = evidence.encoder_features[:, 1::2]
        torch.testing.assert_close(evidence.project(some), evidence.features[:, 1::2], atol=1e-5, rtol=1e-4)
        return super().select(evidence, keep)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_the_projector(family):
    batch = prompt(family, [[0, family.sizes - 1], [0]])
    plain = Asks({"encoder_features": None})
    method = Projects({"encoder_features": None, "project": None})
    with apply(family.model, plain, keep=0.5) as session:
        want = family.model(**batch.inputs).logits
        flops = session.flops
    with apply(family.model, method, keep=0.5) as session:
        assert torch.equal(family.model(**batch.inputs).logits, want)
        assert session.flops == flops  # the selection's own are not counted
    assert method.seen and all(evidence.project is None for evidence in plain.seen)


@torch.no_grad()
def test_no_map_is_made():
    model = wide_llava()
    inputs = {"input_ids": torch.tensor([[1, *[98] * 256, 5]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    wants = {"cls_logits": slice(0, -1), "encoder_states": -2, "patch_pixels": None}
    with apply(model, Asks(wants), keep=0.25), Largest() as mode:
        model(**inputs, logits_to_keep=1)
    assert mode.seen < 100


# The language model -----------------------------------------------------------------------------------------------


def ranked(attention, at, temperature, iterations):
    """(H, len(at)) PageRank of the tokens ``at`` of a full map (H, T, T), sharpened.

    The logarithm of a softmax is its logits up to a constant of the row.
    """
    logits = attention[:, at][:, :, at].log() / temperature
    return pagerank(logits.softmax(-1), iterations)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_importance(name, side):
    family = FAMILIES[name]
    batch = prompt(family, [[0], [0, 0]], side)
    method = Staged(1.0, {2: 0.25}, {"llm_importance": (0.3, 4)})
    with apply(family.model, method, keep=0.5):
        family.model(**batch.inputs)
    attentions, _ = eager_maps(family, batch.inputs)
    ((layer, evidence),) = method.seen
    assert layer == 2 and evidence.llm_importance.shape[:2] == (3, 4)
    for place, (row, number) in enumerate([(0, 0), (1, 0), (1, 1)]):
        real = batch.inputs["attention_mask"][row].nonzero()[:, 0]
        rank = ranked(attentions[2][row], real, 0.3, 4)
        at = torch.searchsorted(real, torch.tensor(batch.columns[row][number]))
        torch.testing.assert_close(evidence.llm_importance[place], rank[:, at], atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_importance_leaves_earlier_turns_out():
    family = FAMILIES["llava-clip"]
    first, second = prompt(family, [[0], [0, 0]]), prompt(family, [[0], [0]], text=(31, 32, 33))
    mask = torch.cat([first.inputs["attention_mask"], second.inputs["attention_mask"]], 1)
    method = Staged(1.0, {1: 0.5}, {"llm_importance": (1.0, 3)})
    with apply(family.model, Staged(1.0, {3: 1.0}), keep=1.0):
        cache = family.model(**first.inputs, use_cache=True).past_key_values
    with apply(family.model, method, keep=0.5):
        family.model(**second.inputs | {"attention_mask": mask}, past_key_values=cache)
    old, new = first.inputs["pixel_values"], second.inputs["pixel_values"]
    pixels = torch.cat([old[:1], new[:1], old[1:], new[1:]])
    ids = torch.cat([first.inputs["input_ids"], second.inputs["input_ids"]], 1)
    attentions, _ = eager_maps(family, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    ((_, evidence),) = method.seen
    width = first.inputs["input_ids"].shape[1]
    for row in (0, 1):
        real = width + second.inputs["attention_mask"][row].nonzero()[:, 0]
        rank = ranked(attentions[1][row], real, 1.0, 3)
        at = torch.searchsorted(real, width + torch.tensor(second.columns[row][0]))
        torch.testing.assert_close(evidence.llm_importance[row], rank[:, at], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("how", [(0, 5), (-0.1, 5), (0.1, -1), None, "text"])
def test_importance_needs_a_temperature_and_iterations(how):
    with pytest.raises(ValueError, match=r"^Staged needs llm_importance with .*, must be \(temperature above 0, "):
        apply(FAMILIES["llava-clip"].model, Staged(1.0, {1: 0.5}, {"llm_importance": how}), keep=0.5)


# Which tokens, and what a stage leaves to the next ------------------------------------------------------------------


@dataclass(frozen=True)
class ByCrop(Asks):
    whole_picture = False


@torch.no_grad()
def test_index_counts_a_cut_picture_part_after_part():
    family = FAMILIES["llava-next"]
    method = ByCrop()
    with apply(family.model, method, keep=0.5):
        family.model(**prompt(family, [[0], [0]]).inputs)
    assert [evidence.index.tolist() for evidence in method.seen] == [
        [list(range(start, start + 16))] * 2 for start in (0, 16, 32)
    ]


@dataclass(frozen=True)
class Carries(Staged):
    """Leaves to each token its number of the picture, once before the language model and from then on every time
    ``again`` names the layer."""

    channels: bool = False
    again: tuple[int, ...] = ()

    def told(self, evidence, keep):
        number = evidence.index.gather(1, keep).float()
        return torch.stack([number, -number], 2) if self.channels else number

    def compress(self, evidence, keep):
        reduction = super().compress(evidence, keep)
        return replace(reduction, carry=self.told(evidence, reduction.keep))

    def at_layer(self, evidence, keep, layer) -> Reduction:
        reduction = super().at_layer(evidence, keep, layer)
        return replace(reduction, carry=self.told(evidence, reduction.keep)) if layer in self.again else reduction


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
@torch.no_grad()
def test_index_and_carry_follow_the_tokens_through_methods_and_stages(name):
    family = FAMILIES[name]
    batch = prompt(family, [[0], [0, 0]])
    first = Carries(0.9, {1: 0.5, 3: 0.2}, again=(1,))
    second = Carries(0.8, {2: 0.5, 3: 0.1}, channels=True)
    asks = Asks()
    with apply(family.model, [first, asks, second], keep=[0.5, 0.8, 0.5]) as session:
        family.model(**batch.inputs)
    (seen,) = asks.seen
    n = session.pictures[0].tokens_in
    number = torch.arange(n)
    method = Spread()

    def spread(index, keep):
        return index[method.select(replace(seen, features=index[None, :, None]), keep)[0]]

    after_first = spread(number, round(0.9 * n))
    assert torch.equal(seen.index, after_first.expand(3, -1)) and seen.carry is None
    assert [layer for layer, _ in first.seen] == [1, 3] and [layer for layer, _ in second.seen] == [2, 3]
    for evidence in (evidence for one in (first, second) for _, evidence in one.seen):
        carried = evidence.carry[..., 0] if evidence.carry.ndim == 3 else evidence.carry
        assert torch.equal(carried, evidence.index.float())
        assert evidence.index.shape == evidence.features.shape[:2]
        assert bool((evidence.index.diff(dim=1) > 0).all())
    for picture, index in zip(session.pictures, first.seen[0][1].index, strict=True):
        assert torch.equal(index, picture.keep)
    for picture, index in zip(session.pictures, first.seen[1][1].index, strict=True):
        assert torch.equal(index, picture.layer_keep[2])


@torch.no_grad()
def test_nothing_is_carried_from_a_stage_that_had_nothing_to_do():
    family = FAMILIES["llava-clip"]
    method = Carries(1.0, {1: 0.5, 2: 0.25})
    with apply(family.model, method, keep=0.5):
        family.model(**prompt(family, [[0]]).inputs)
    assert [evidence.carry for _, evidence in method.seen] == [None, None]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "internvl", "glm-4v", "mistral3"])
def test_the_projector_computes_in_the_precision_of_what_it_is_given(name):
    """A model in half precision, as most are served: its own weights, but no rounding in between."""
    family = FAMILIES[name]
    half = copy.deepcopy(family.model).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()
    found = {}
    for model in (half, exact):
        method = Asks({"encoder_features": None, "project": None})
        inputs = prompt(family, [[0]]).inputs
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with apply(model, method, keep=0.5):
            model(**inputs)
        found[model.dtype] = method.seen[0]
    rows = found[torch.bfloat16].encoder_features.float()
    assert rows.dtype != found[torch.bfloat16].encoder_features.dtype
    assert torch.equal(found[torch.bfloat16].project(rows), found[torch.float32].project(rows))
    assert found[torch.bfloat16].project(rows.bfloat16()).dtype == torch.bfloat16
    assert next(half.parameters()).dtype == torch.bfloat16

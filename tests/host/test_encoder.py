"""Methods for vision transformers inside the encoder of a vision-language model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vistok
from tests.host.families import FAMILIES, VIDEOS, prompt, tower
from vistok.host import UnsupportedModel
from vistok.host.layout import plain
from vistok.host.reducer import Reducer
from vistok.host.vision import on_tokens
from vistok.vit.evit import EViT
from vistok.vit.random_drop import RandomDrop
from vistok.vit.tome import ToMe
from vistok.vit.topk import TopK

SERVED = ("llava-clip", "llava-siglip", "llava-next", "onevision", "gemma3", "paligemma")
LAYER = 0  # the small encoders have few layers, of which the projector may read the last but one


def family(name):
    return FAMILIES.get(name) or VIDEOS[name]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", SERVED)
def test_keeping_all_changes_no_bit(name):
    one = family(name)
    inputs = prompt(one, [[0], [0]]).inputs
    plain_ = logits(one.model, inputs)
    with vistok.apply(one.model, TopK(keep=1.0, layers=(LAYER,))) as session:
        assert torch.equal(logits(one.model, inputs), plain_)
    assert session.tokens_kept == session.tokens_in


@pytest.mark.parametrize("name", SERVED)
def test_the_encoder_runs_on_fewer_tokens_and_one_of_each_slot_goes_on(name):
    one = family(name)
    inputs = prompt(one, [[0], [0]]).inputs
    with vistok.apply(one.model, EViT(keep=1.0, layers=(LAYER,))) as session:
        logits(one.model, inputs)
        whole, units = session.flops, session.encoder_tokens[0]
    with vistok.apply(one.model, TopK(keep=0.5, layers=(LAYER,))) as session:
        logits(one.model, inputs)
    assert session.encoder_tokens[LAYER] == units // 2
    assert session.flops < whole
    for picture in session.pictures:
        assert picture.tokens_kept <= picture.tokens_in
        if one.name in ("llava-clip", "llava-siglip", "paligemma"):
            assert picture.tokens_kept == picture.tokens_in // 2
            assert len(set(picture.source.tolist()) - {-1}) == picture.tokens_kept


def test_what_goes_on_are_the_rows_that_left_the_encoder():
    one = family("llava-clip")
    inputs, seen = prompt(one, [[0], [0, 0]]).inputs, {}
    handle = one.model.model.multi_modal_projector.register_forward_hook(lambda m, a, o: seen.update(given=a[0], out=o))
    read = one.model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.update(embeds=k["inputs_embeds"]), with_kwargs=True
    )
    with vistok.apply(one.model, ToMe(r=3)) as session:
        logits(one.model, inputs)
    handle.remove(), read.remove()
    vit_tokens, pictures = seen["out"], session.pictures
    feeding = session.encoder_tokens[-2]
    for unit, picture in enumerate(pictures):
        assert picture.tokens_kept == feeding
        # merged patches have one row, which is the row of the token that stayed
        for token, slot in enumerate(picture.source.tolist()):
            torch.testing.assert_close(vit_tokens[unit, token], vit_tokens[unit, picture.keep[slot]])
        row = seen["embeds"][picture.row]
        for token in picture.keep.tolist():
            assert (row - vit_tokens[unit, token]).abs().amax(1).min() < 1e-5


def test_it_is_the_encoder_alone_followed_by_the_rest():
    """By hand: the tower with the method in it, its rows through the projector and into the prompt."""
    one = family("llava-clip")
    model, inputs = one.model, prompt(one, [[0]], text=(5, 6)).inputs
    with vistok.apply(tower(model), TopK(keep=4, layers=(LAYER,))) as alone, torch.no_grad():
        hidden = tower(model)(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        rows = model.model.multi_modal_projector(hidden[:, 1:])[0]
        kept = alone.states[-1].anchor[0]
    ids = inputs["input_ids"][0]
    image = ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(ids.where(~image, 0)).clone()
    embeds[image] = embeds[image].index_copy(0, kept, rows)
    stays = ~image
    stays[image.nonzero()[kept, 0]] = True
    with torch.no_grad():
        where = stays.nonzero()[:, 0][None]
        expected = model(inputs_embeds=embeds[stays][None], position_ids=where).logits
    with vistok.apply(model, TopK(keep=4, layers=(LAYER,))) as session:
        found = logits(model, inputs)
    assert session.pictures[0].keep.tolist() == kept.tolist()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("after", ["fastervlm", "visionzip", "divprune", "holov"])
def test_methods_before_the_language_model_see_what_left_the_encoder(after):
    one = family("llava-clip")
    inputs = prompt(one, [[0], [0]]).inputs
    with vistok.apply(one.model, ["topk@encoder", after], keep=[0.5, 3]) as session:
        logits(one.model, inputs)
        inside = session.encoder_tokens[-2]
    with vistok.apply(one.model, "topk@encoder", keep=0.5) as alone:
        logits(one.model, inputs)
    for picture, before in zip(session.pictures, alone.pictures, strict=True):
        assert before.tokens_kept == inside and picture.tokens_kept == 3
        assert set(picture.keep.tolist()) <= set(before.keep.tolist())


class Seen(Reducer):
    """Keeps the first tokens, and what it was shown."""

    @property
    def needs(self):
        return {"cls_attention": -1, "encoder_states": -1, "encoder_keys": -1}

    def select(self, evidence, keep):
        self.evidence = evidence
        return torch.arange(keep).expand(len(evidence.features), keep)


def test_evidence_of_a_narrow_layer_is_that_of_its_slots():
    one, method = family("llava-clip"), Seen()
    inputs, seen = prompt(one, [[0], [0]]).inputs, {}
    last = tower(one.model).encoder.layers[-1]
    handles = [
        last.self_attn.k_proj.register_forward_hook(lambda m, a, o: seen.update(keys=o)),
        last.self_attn.q_proj.register_forward_hook(lambda m, a, o: seen.update(queries=o)),
    ]
    with vistok.apply(one.model, [TopK(keep=5, layers=(0,)), method], keep=3) as session:
        logits(one.model, inputs)
    for handle in handles:
        handle.remove()
    assert seen["keys"].shape[1] == 1 + 5
    heads = last.self_attn.num_heads
    q, k = (seen[n].unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("queries", "keys"))
    row = (q[:, :, :1] @ k.transpose(2, 3) * last.self_attn.scale).softmax(-1)[:, :, 0, 1:]
    torch.testing.assert_close(method.evidence.cls_attention, row)
    torch.testing.assert_close(method.evidence.encoder_keys, seen["keys"][:, 1:])
    assert method.evidence.features.shape[1] == 5
    assert session.pictures[0].tokens_kept == 3


@pytest.mark.parametrize("name", ["llava-clip", "onevision", "paligemma"])
def test_counts_what_the_encoder_is_spared(name):
    one = family(name)
    inputs = prompt(one, [[0], [0]]).inputs
    spent = []
    for keep in (1.0, 0.4):
        with (
            vistok.apply(one.model, RandomDrop(keep=keep, layers=(1,))) as session,
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            logits(one.model, inputs)
        modules = counter.get_flop_counts()
        tower_ = next(m for m in modules if m.endswith("vision_tower"))
        spent.append((session.report()["flops_by_stage"]["vision"], sum(modules[tower_].values())))
    assert spent[0][0] - spent[1][0] == spent[0][1] - spent[1][1] > 0


def test_generates_and_leaves_the_model_as_it_was():
    one = family("llava-clip")
    inputs = prompt(one, [[0]]).inputs
    before = logits(one.model, inputs)
    with vistok.apply(one.model, ["evit@encoder", "fastervlm"], keep=[0.7, 4]) as session:
        assert (
            one.model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3
        )
    assert session.report()["encoder_tokens"] == session.encoder_tokens
    assert torch.equal(logits(one.model, inputs), before)


def test_a_single_keep_is_that_of_the_methods_after_the_encoder():
    one = family("llava-clip")
    inputs = prompt(one, [[0]]).inputs
    with vistok.apply(one.model, ["topk@encoder", "fastervlm"], keep=4) as session:
        logits(one.model, inputs)
    assert session.methods[0].keep == TopK().keep and session.pictures[0].tokens_kept == 4


def test_slots_stand_where_the_prompt_has_a_token():
    layout = plain(2, 2)
    anchor = torch.tensor([0, 0, -1, 3, 4, 5, 4, 5])
    assert on_tokens(anchor, layout, torch.tensor([0, 4])).tolist() == [[0, 0, -1, 3], [0, 1, 0, 1]]
    merged = plain(1, 2, merge=2)
    assert on_tokens(torch.tensor([0, 0, 0, -1]), merged, torch.tensor([0])).tolist() == [[0, -1]]


def test_says_what_is_wrong():
    clip, qwen = family("llava-clip").model, family("qwen2-vl").model
    with pytest.raises(ValueError, match="topk@encoder"):
        vistok.apply(clip, "topk")
    with pytest.raises(UnsupportedModel, match="Qwen2"):
        vistok.apply(qwen, "topk@encoder")
    with pytest.raises(ValueError, match="name of a system of the vit family"):
        vistok.apply(clip, "fastervlm@encoder")
    with pytest.raises(UnsupportedModel, match="videos have an encoder of their own"):
        vistok.apply(family("video-llava").model, "topk@encoder")

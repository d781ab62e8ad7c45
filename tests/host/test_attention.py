"""How methods of attention enter language models: what they are shown, what becomes of what they return, and after."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, StaticCache

from tests.host.families import FAMILIES, language_model, prompt
from tests.host.reducers import Spread, Staged
from tests.host.texts import batch, language
from vistok.host import UnsupportedModel, apply
from vistok.host.attending import AnswerAttention
from vistok.host.attention import AttentionCall, AttentionMethod, layer_drifts
from vistok.host.effort import Effort, LayerEffort


@dataclass(frozen=True)
class Leaves(AttentionMethod):
    """Leaves attention as it is, and writes down what it was asked."""

    calls: list = field(default_factory=list, compare=False)

    def attend(self, call):
        self.calls.append(call)


@dataclass(frozen=True)
class Dense(Leaves):
    """Causal attention by hand, from what it is shown."""

    def attend(self, call):
        super().attend(call)
        place = torch.arange(call.q.shape[2])
        last = call.keys[:, None] - call.queries[:, None] + place
        mask = (torch.arange(call.k.shape[2]) <= last[..., None])[:, None]
        grouped = call.q.shape[1] != call.k.shape[1]
        return scaled_dot_product_attention(call.q, call.k, call.v, mask, scale=call.scale, enable_gqa=grouped)


@dataclass(frozen=True)
class Turns(Dense):
    """The same after queries and keys were all moved on, which changes nothing."""

    reads_positions = True

    def attend(self, call):
        by = torch.full((len(call.q), call.q.shape[2]), 5), torch.full((len(call.k), call.k.shape[2]), 5)
        fields = {name: getattr(call, name) for name in AttentionCall.__dataclass_fields__}
        fields |= {"q": call.turn(call.q, by[0]), "k": call.turn(call.k, by[1])}
        return super().attend(AttentionCall(**fields))


def real(logits, mask):
    return logits[mask.bool()] if logits.shape[1] == mask.shape[1] else logits


@torch.no_grad()
def logits_of(model, inputs, method=None, keep=None, **how):
    if method is None:
        return model(**inputs, **how).logits
    with apply(model, method, keep):
        return model(**inputs, **how).logits


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_language_model(kind, side):
    model, inputs = language(kind), batch(9, 4, 7, side=side)
    plain = logits_of(model, inputs)
    method = Leaves()
    assert torch.equal(logits_of(model, inputs, method), plain)
    assert [call.layer for call in method.calls] == [0, 1, 2, 3] and method.calls[0].num_layers == 4
    assert method.calls[0].keys.tolist() == method.calls[0].queries.tolist() == [9, 4, 7]
    for method in (Dense(), Turns()):
        torch.testing.assert_close(
            real(logits_of(model, inputs, method), inputs["attention_mask"]),
            real(plain, inputs["attention_mask"]),
            rtol=1e-4,
            atol=1e-4,
        )
    assert model.config._attn_implementation == "sdpa" and torch.equal(logits_of(model, inputs), plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llava-clip", "onevision", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "internvl"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_beside_reducers(name, side):
    family = FAMILIES[name]
    model, inputs = family.model, prompt(family, [[0], [0, family.sizes - 1]], side).inputs
    plain = logits_of(model, inputs)
    assert torch.equal(logits_of(model, inputs, Leaves(), 1.0), plain)
    reducers = [Spread()] if name in ("qwen3.5", "qwen3-vl") else [Staged()]
    left = logits_of(model, inputs, reducers, 0.5)
    assert torch.equal(logits_of(model, inputs, [*reducers, Leaves()], 0.5), left)
    for how in ({}, {"use_cache": False}):
        for method in (Dense(), Turns()):
            found = logits_of(model, inputs, [method, *reducers], 0.5, **how)
            same = ((found - left).abs().amax(2) < 1e-3).sum(1)  # what stands in padding is nobody's
            assert bool((same >= method.calls[-1].queries).all()) and bool(same[1] >= found.shape[1])
            assert method.calls[0].keys.max() < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl"])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generates_as_before(name, beams):
    family = FAMILIES[name]
    inputs = prompt(family, [[0], [0, 0]]).inputs
    how = dict(max_new_tokens=6, do_sample=False, num_beams=beams)
    with apply(family.model, Staged(), 0.5):
        expected = family.model.generate(**inputs, **how)
    for method in (Leaves(), Turns()):
        with apply(family.model, [Staged(), method], 0.5) as session:
            assert torch.equal(family.model.generate(**inputs, **how), expected)
        assert session.methods[-1] is method and session.tokens_kept and session.kv_bytes


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "glm-4v"])
def test_positions_turn_keys_back(name):
    """Keys moved to position 0 are those that the projection left, whatever is gone."""
    family = FAMILIES[name]
    inputs = prompt(family, [[0], [0, 0]]).inputs

    @dataclass(frozen=True)
    class Back(Turns):
        found: list = field(default_factory=list, compare=False)

        def attend(self, call):
            self.found.append((call.turn(call.k, -call.positions), call.keys))

    lm = language_model(family.model)
    given = []
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda m, args, out: given.append(out)) for layer in lm.layers
    ]
    method = Back()
    with torch.no_grad(), apply(family.model, [Spread(), method], 0.5):
        family.model(**inputs)
    for hook in hooks:
        hook.remove()
    for layer, raw, (back, keys) in zip(lm.layers, given, method.found, strict=True):
        raw = raw.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
        for row, n in enumerate(keys.tolist()):  # on the left of the host's rows is padding
            torch.testing.assert_close(back[row, :, :n], raw[row, :, raw.shape[2] - n :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_conversation_in_pieces():
    model, inputs = language(), batch(20, 20)
    cache, method = DynamicCache(), Turns()
    parts = []
    with apply(model, method) as session:
        for part in inputs["input_ids"].split([11, 1, 8], 1):
            parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), logits_of(model, inputs), rtol=1e-4, atol=1e-4)
    assert method.calls[-1].keys.tolist() == [20, 20] and method.calls[-1].queries.tolist() == [8, 8]
    assert session.kv_bytes == 2 * sum(layer.keys.numel() for layer in cache.layers) * 4
    more = torch.full((2, 1), 5)
    assert session.report()["methods"] == [repr(method)] and session.pictures == session.encoder_tokens == []
    outside = model(more, past_key_values=cache).logits  # the cache goes on
    whole = torch.cat([inputs["input_ids"], more], 1)
    torch.testing.assert_close(outside[:, -1], model(whole).logits[:, -1], rtol=1e-4, atol=1e-4)
    with apply(model, Turns()), pytest.raises(RuntimeError, match="past_key_values: Turns needs the positions"):
        model(more, past_key_values=cache)


@pytest.mark.parametrize("name", ["llava-clip", "internvl"])
@pytest.mark.parametrize("reselect", [False, True])
@torch.no_grad()
def test_a_second_turn(name, reselect):
    family = FAMILIES[name]
    model, inputs = family.model, prompt(family, [[0], [0]]).inputs
    more = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    found = []
    for methods in ([Spread()], [Spread(), Leaves()], [Spread(), Turns()]):
        with apply(model, methods, 0.5, reselect=reselect):
            cache = model(**inputs, use_cache=True).past_key_values
            turn = model(input_ids=more, attention_mask=mask, past_key_values=cache)
            step = model(input_ids=more[:, :1], past_key_values=cache)
            found.append(torch.cat([turn.logits[:, -2:], step.logits], 1))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_memory_is_of_a_conversation_and_a_layer():
    seen = []

    @dataclass(frozen=True)
    class Counts(AttentionMethod):
        def attend(self, call):
            call.memory["count"] = call.memory.get("count", 0) + 1
            seen.append(call.memory["count"])

    model, ids, first, second = language(), batch(5)["input_ids"], DynamicCache(), DynamicCache()
    with apply(model, Counts()):
        for cache in (first, first, second, first, None, None):
            model(ids, past_key_values=cache, use_cache=cache is not None)
    with apply(model, Counts()):
        model(ids, past_key_values=first)
    assert seen == [n for n in (1, 2, 1, 3, 1, 1, 1) for _ in range(4)]


def test_nothing_is_left_after_an_error():
    @dataclass(frozen=True)
    class Fails(AttentionMethod):
        def attend(self, call):
            raise ArithmeticError

    model, inputs = language(), batch(6)
    plain = logits_of(model, inputs)
    with pytest.raises(ArithmeticError):
        logits_of(model, inputs, Fails())
    assert torch.equal(logits_of(model, inputs), plain) and model.config._attn_implementation == "sdpa"
    with pytest.raises(TypeError, match="must define attend"):
        logits_of(model, inputs, AttentionMethod())
    with (
        apply(model, Leaves()),
        pytest.raises(RuntimeError, match="already has a method in it"),
        apply(model, Leaves()),
    ):
        pass


def test_drifts_are_those_of_the_layers():
    model, inputs = language("Llama", rms_norm_eps=1e-5), batch(8, 5)
    found = layer_drifts(model, **inputs)
    assert found.shape == (4,) and found.sum().item() == pytest.approx(1)
    assert not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    ratios = [
        ((b - a).norm(dim=-1) / a.norm(dim=-1))[inputs["attention_mask"].bool()].mean()
        for a, b in pairwise(states[:4])  # the last is normed
    ]
    torch.testing.assert_close(found[:3] / found[0], torch.stack(ratios) / ratios[0])


@dataclass(frozen=True)
class Works(Effort):
    def layers(self, num_layers, num_heads):
        return [LayerEffort(1)] * num_layers


@pytest.mark.parametrize(
    ("method", "how", "message"),
    [
        ([Leaves(), Dense()], {}, "method: got [Leaves"),
        ([Leaves(), Works()], {}, "attention of its own"),
        (Leaves(), {"keep": 1}, "keep: got 1, but"),
        (Leaves(), {"keep": 0.5}, "keeps all tokens; must be None or 1.0"),
        ([Turns(), Spread()], {"position": "recompact"}, "position: got 'recompact' with Turns"),
        ("gna", {}, "must be the name of a reducer"),
        (["gna", Spread()], {}, "must be the name of a reducer"),
        ([Leaves(), Spread()], {"k": 3}, "k: hyper-parameters go with one method"),
        ([Leaves(), Spread()], {"keep": [0.5, 0.5]}, "keep: got 2 values for 1 methods"),
    ],
)
def test_what_does_not_fit_is_said(method, how, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        apply(FAMILIES["llava-clip"].model, method, **how)


def test_models_that_do_not_fit_are_said():
    with pytest.raises(UnsupportedModel, match="sliding windows"):
        apply(language("Mistral", sliding_window=4), Leaves())
    with pytest.raises(UnsupportedModel, match="masks more than what is to come"):
        apply(FAMILIES["paligemma"].model, Leaves())
    with pytest.raises(UnsupportedModel, match="needs a model that attends causally"):
        apply(language("Llama", mask_token_id=3), Leaves())
    with pytest.raises(UnsupportedModel, match="need a decoder with layers"):
        apply(torch.nn.Linear(2, 2), Leaves())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = language("Llama", max_position_embeddings=64, **{"rope_parameters": Frozen(rope)})
    apply(dynamic, Leaves())
    with pytest.raises(UnsupportedModel, match="with dynamic RoPE"):
        apply(dynamic, Turns())
    model = language()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with apply(model, Leaves()), pytest.raises(ValueError, match="past_key_values: got a StaticLayer"):
        model(batch(4)["input_ids"], past_key_values=cache)


class Frozen(dict):
    """A dict that can be cached by."""

    def __hash__(self):
        return hash(tuple(self.items()))


def test_attention_that_is_another_cannot_be_watched():
    with apply(FAMILIES["llava-clip"].model, Leaves()) as session, pytest.raises(ValueError, match="changes how"):
        AnswerAttention(session)

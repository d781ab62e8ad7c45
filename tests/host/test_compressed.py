"""With quantized caches and weights, and with torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForImageTextToText, DynamicCache, TorchAoConfig
from transformers.cache_utils import QuantizedCache

from tests.host.families import FAMILIES, IMAGE, language_model, prompt
from tests.host.reducers import EncoderSpread, Spread, Staged
from vistok.host import Evidence, apply

LLAVA = FAMILIES["llava-clip"]
GREEDY = {"do_sample": False, "suppress_tokens": [IMAGE]}
METHODS = {"input": Spread(), "staged": Staged(0.5, {2: 0.125}, {"llm_attention": "text"})}


class Projects(Spread):
    """Runs the projector itself."""

    @property
    def needs(self):
        return {"encoder_features": None, "project": None}

    def select(self, evidence: Evidence, keep: int) -> torch.Tensor:
        made = evidence.project(evidence.encoder_features.float())
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, evidence.features.float(), rtol=0.1, atol=0.1)
        return super().select(evidence, keep)


def two_turns(cache, method, rows):
    """Ids of two turns, the session, and its cache's bytes after each."""
    model, batch = LLAVA.model, prompt(LLAVA, [list(r) for r in rows])
    with apply(model, method, keep=0.25) as session:
        first = model.generate(**batch.inputs, past_key_values=cache, max_new_tokens=3, **GREEDY)
        ids = torch.cat([first, torch.tensor([[30, 31, 33]]).repeat(len(rows), 1)], 1)
        ones = torch.ones_like(ids[:, batch.inputs["input_ids"].shape[1] :])
        mask = torch.cat([batch.inputs["attention_mask"], ones], 1)
        second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, **GREEDY)
    return second, session


@pytest.mark.parametrize("rows", [([0],), ([0, 0], [0])], ids=["one", "padded"])
@pytest.mark.parametrize("name", METHODS)
def test_a_quantized_cache_holds_the_same_tokens(name, rows):
    config = LLAVA.model.config.text_config
    plain, quantized = DynamicCache(config=config), QuantizedCache("fp8", config)
    _, dense = two_turns(plain, METHODS[name], rows)
    ids, session = two_turns(quantized, METHODS[name], rows)
    assert session.kv_bytes * 4 == pytest.approx(dense.kv_bytes, rel=0.05)  # 8 bits for 32, and two scales a layer
    assert session.flops == dense.flops
    for ours, theirs in zip(quantized.layers, plain.layers, strict=True):
        assert (ours.held, ours.dropped) == (theirs.held, theirs.dropped)
        assert torch.equal(ours.all_columns(len(rows), ids.device), theirs.all_columns(len(rows), ids.device))
    read = (layers[0].held_keys[:, :, :8] for layers in (quantized.layers, plain.layers))  # of the prompt
    torch.testing.assert_close(*read, rtol=0.07, atol=0.02)  # three bits of mantissa
    assert quantized.get_seq_length() == plain.get_seq_length()


def test_a_quantized_cache_gives_nearly_the_same_logits():
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    nexts = []
    for cache in (DynamicCache(config=model.config.text_config), QuantizedCache("fp8", model.config.text_config)):
        with apply(model, METHODS["staged"], keep=0.25), torch.no_grad():
            model(**batch.inputs, past_key_values=cache)
            step = {"input_ids": torch.tensor([[30]]), "past_key_values": cache}
            nexts.append(model(**step).logits[0, -1])
    similarity = torch.cosine_similarity(*nexts, dim=0)
    assert 0.8 < similarity < 1 - 1e-7  # random weights magnify what eight bits lose


def test_a_static_cache_is_refused_by_name():
    with apply(LLAVA.model, Spread(), keep=0.25), pytest.raises(ValueError, match="got a Static"):
        LLAVA.model.generate(**prompt(LLAVA, [[0]]).inputs, cache_implementation="static", max_new_tokens=2)


@pytest.mark.parametrize("name", METHODS)
def test_compiled_without_recompilation(name):
    """The language model compiled, a fixed keep: pictures and questions of one length compile nothing new."""
    model, counter = copy.deepcopy(LLAVA.model), CompileCounter()
    torch._dynamo.reset()
    want, got, frames = [], [], []
    batches = [prompt(LLAVA, [[0]]).inputs for _ in range(3)]
    for number, inputs in enumerate(batches):
        torch.manual_seed(number)
        inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    with torch.no_grad():
        with apply(model, METHODS[name], keep=0.25):
            want = [model(**inputs, use_cache=False).logits for inputs in batches]
        language_model(model).compile(backend=counter)
        with apply(model, METHODS[name], keep=0.25):
            for inputs in batches:
                got.append(model(**inputs, use_cache=False).logits)
                frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames == [frames[0]] * 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory):
    """A model from disk, its linear layers in 8 bits."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    folder = tmp_path_factory.mktemp("llava")
    LLAVA.model.save_pretrained(folder)
    quantized = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantized)


@pytest.mark.parametrize("method", [*METHODS.values(), EncoderSpread(), Projects()], ids=lambda m: type(m).__name__)
def test_quantized_weights(eight_bits, method):
    batch = prompt(LLAVA, [[0]])
    assert type(language_model(eight_bits).layers[0].mlp.up_proj.weight.data) is not torch.Tensor
    inputs = dict(batch.inputs, pixel_values=batch.inputs["pixel_values"].bfloat16())
    with apply(eight_bits, method, keep=0.25) as session, torch.no_grad():
        logits = eight_bits(**inputs).logits
    plain = copy.deepcopy(LLAVA.model).bfloat16()
    with apply(plain, method, keep=0.25) as same, torch.no_grad():
        want = plain(**inputs).logits
    assert [p.keep.tolist() for p in session.pictures] == [p.keep.tolist() for p in same.pictures]
    assert session.flops == same.flops
    assert logits.shape == want.shape
    assert torch.cosine_similarity(logits[0, 1].float(), want[0, 1].float(), dim=0) > 0.9

"""Weights and caches of fewer bits, as a sweep uses them; memory and energy."""

from __future__ import annotations

import pytest
import torch

from vistok.bench import resources
from vistok.bench.compression import CACHES, cached, weight_bytes
from vistok.bench.measure import answer_all, cases_of
from vistok.bench.metrics import answer_probability
from vistok.bench.protocols import multi_turn
from vistok.host import apply
from vistok.world import sample
from vistok.zoo import load
from vistok.zoo.asking import encode


@pytest.fixture(scope="module")
def pictures():
    return list(sample("scenes", 4, split="test"))


@pytest.mark.parametrize("method", [None, "fastv"])
def test_a_cache_of_eight_bits_is_what_generate_makes(model, processor, pictures, method):
    case = cases_of(pictures)[0]
    inputs = encode(processor, [case.picture], [case.question])
    spent = []
    for kind in ("none", "fp8"):
        with cached(model, kind), apply(model, method or "uniform", keep=0.25 if method else 1.0) as session:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        spent.append(session.kv_bytes)
    assert spent[1] * 4 == pytest.approx(spent[0], rel=0.05)
    assert model.generation_config.cache_implementation is None


def test_second_turns_and_probabilities_use_the_cache_too(model, processor, pictures):
    turns = multi_turn(pictures)
    case = cases_of(pictures)[0]
    asked = ([case.picture], [case.question], ["a red circle"])
    plain = answer_probability(model, processor, *asked).mean[0]
    with cached(model, "fp8"):
        eight = answer_probability(model, processor, *asked).mean[0]
        assert len(answer_all(model, processor, "fastv", 0.25, turns)) == len(turns)
    assert eight != plain
    assert eight == pytest.approx(plain, rel=0.2)


def test_four_bits(model, processor, pictures):
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    case = cases_of(pictures)[0]
    inputs = encode(processor, [case.picture], [case.question])
    spent = {}
    for kind in CACHES:
        with cached(model, kind), apply(model, "fastv", keep=0.25) as session:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        spent[kind] = session.kv_bytes
    assert spent["none"] > spent["fp8"] > spent["quanto-2"]
    assert spent["quanto-4"] > spent["quanto-2"]


def test_weights_in_fewer_bits(folder, model):
    pytest.importorskip("torchao", reason="torchao is not installed")
    plain = weight_bytes(model)
    tensors = {t.data_ptr(): t for t in (*model.state_dict().values(), *model.buffers())}
    assert plain == sum(t.numel() * t.element_size() for t in tensors.values())
    eight, four = (weight_bytes(load(folder, weights=bits), bits) for bits in ("int8", "int4"))
    head = model.get_output_embeddings()  # is left as it is
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    saved = sum(3 * weight.numel() - 4 * len(weight) for weight in linear)  # three of four bytes, less a scale a row
    assert plain - eight == pytest.approx(saved, rel=0.02)
    assert four < eight
    with pytest.raises(ValueError, match="weights: got 'int3', must be"):
        load(folder, weights="int3")


def test_peak_memory_is_what_was_needed_beyond_what_was_held():
    held = torch.ones(1 << 20)
    need = resources.peak_bytes(torch.device("cpu"), lambda: torch.ones(1 << 25).sum() + held.sum())
    assert need is None or need == pytest.approx(4 << 25, rel=0.05)
    little = resources.peak_bytes(torch.device("cpu"), lambda: held.sum())
    assert little is None or little < 8 << 20


def test_energy_is_read_where_there_is_a_meter(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "PACKAGES", tmp_path)
    resources._meters.cache_clear()
    assert resources.joules(torch.device("cpu")) is None
    for number, reading in enumerate((2_500_000, 1_000_000)):
        (tmp_path / f"intel-rapl:{number}").mkdir()
        (tmp_path / f"intel-rapl:{number}" / "energy_uj").write_text(f"{reading}\n")
    resources._meters.cache_clear()
    assert resources.joules(torch.device("cpu")) == 3.5
    resources._meters.cache_clear()

"""The scaling benchmark: its fits, its counts, and one tiny run."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch

from benchmarks import scaling
from benchmarks.common import build, inputs_of
from benchmarks.scaling import (
    QUANTITIES,
    Row,
    crops,
    crossing,
    exponents,
    fit,
    fits_of,
    is_cut,
    lengths,
    meaning,
    quadratic,
)
from vistok.bench.measure import applied
from vistok.core import flops

SIZES = (196, 400, 576, 1156, 1764, 2880)


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 1.37, 2.0])
def test_a_power_is_recovered_exactly(exponent):
    found = fit(SIZES, [3.5 * n**exponent for n in SIZES])
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.error == pytest.approx(0, abs=1e-7)
    assert found.points == len(SIZES)


def test_the_fit_is_that_of_least_squares():
    costs = np.random.default_rng(0).uniform(1, 9, len(SIZES))
    found = fit(SIZES, costs)
    (slope, _), cov = np.polyfit(np.log(SIZES), np.log(costs), 1, cov=True)
    assert found.exponent == pytest.approx(slope)
    assert found.error == pytest.approx(math.sqrt(cov[0, 0]))


def test_error_bars_hold_the_truth_about_as_often_as_they_should():
    rng, off = np.random.default_rng(1), []
    for _ in range(2000):
        noise = np.exp(rng.normal(0, 0.1, len(SIZES)))
        found = fit(SIZES, [n**1.3 * e for n, e in zip(SIZES, noise, strict=True)])
        off.append(abs(found.exponent - 1.3) / found.error)
    # Student's t with four degrees of freedom: 2.776 errors are 95%, one is 62.6%.
    assert np.mean(np.array(off) < 2.776) == pytest.approx(0.95, abs=0.02)
    assert np.mean(np.array(off) < 1) == pytest.approx(0.626, abs=0.04)


def test_a_mixture_lies_between_and_says_so_by_its_error():
    found = fit(SIZES, [n + n**2 / 2000 for n in SIZES])
    assert 1 < found.exponent < 2
    assert found.error > 0.01


def test_what_cannot_be_fitted():
    assert fit((196,), (1.0,)) is None
    assert fit((196, 196), (1.0, 2.0)) is None
    assert fit((196, 400, 576), (1.0, None, 2.0)) is None
    assert fit((196, 400, 576), (1.0, 0.0, 2.0)) is None
    two = fit((100, 200), (1.0, 2.0))
    assert two.exponent == pytest.approx(1) and math.isnan(two.error)


@pytest.fixture(scope="module")
def small():
    return {n: build(n, width=64, layers=2) for n in (16, 36, 64)}


@torch.no_grad()
@pytest.mark.parametrize(("method", "keep"), [("dense", None), ("uniform", 9), ("fastv", 9), ("visiondrop", 0.5)])
def test_what_is_not_quadratic_grows_by_each_token(small, method, keep):
    """Operations less those of attention are, to the last one, a number for each token of each layer."""
    for tokens, model in small.items():
        inputs = inputs_of(model)
        with applied(model, method, keep or 1.0) as session:
            model(**inputs, logits_to_keep=1)
        rest = session.flops - quadratic(model, session, inputs)
        vision, text = model.config.vision_config, model.config.text_config
        prompt = lengths(model, session, inputs)
        per_token = flops.transformer_layer(1, 64, 256, text.num_attention_heads, gated=True, keys=0)
        wanted = sum(prompt) * per_token + flops.linear(1, 64, text.vocab_size)
        wanted += 2 * (tokens + 1) * flops.transformer_layer(1, 64, 256, vision.num_attention_heads, keys=0)
        wanted += flops.linear(tokens, 3 * 14 * 14, 64) + flops.linear(tokens, 64, 64, 64)
        assert rest == wanted
        if method == "dense":
            assert prompt == [inputs["input_ids"].shape[1]] * 2


@torch.no_grad()
def test_a_picture_in_crops_counts_each_by_itself():
    model = build(2880, width=64, layers=1)
    inputs = inputs_of(model)
    with applied(model, "uniform", 64) as session:
        model(**inputs, logits_to_keep=1)
    (length,) = lengths(model, session, inputs)
    assert length == inputs["input_ids"].shape[1] - session.tokens_in + 64
    seen = 5 * flops.attention(577, 577, 1, 64)
    assert quadratic(model, session, inputs) == seen + flops.attention(length, length, 1, 64)
    assert [is_cut(n) for n in SIZES] == [False] * 5 + [True]
    with pytest.raises(ValueError, match="tokens: got 577"):
        build(577)


def test_where_attention_costs_as_much_as_the_rest():
    for width, mlp in ((512, 2048), (4096, 11008)):
        at = crossing(width, mlp)
        layer = flops.transformer_layer(int(at), width, mlp, width // 64, gated=True)
        assert flops.attention(int(at), int(at), width // 64, 64) / layer == pytest.approx(0.5, abs=1e-3)


def made_up(method, keep, tokens, **values):
    numbers = {q.key: float(tokens) for q in QUANTITIES} | {"kept": 1.0, "ttft_over_dense": 1.0, "quadratic": 0.25}
    return Row(method=method, keep=keep, tokens=tokens, **numbers | values)


def test_the_picture_in_crops_is_held_against_the_line_of_the_others():
    rows = [made_up(*setting, n) for n in SIZES[:-1] for setting in (("dense", None), ("uniform", 0.25))]
    rows += [made_up("dense", None, 2880, **{q.key: 1440.0 for q in QUANTITIES}), made_up("uniform", 0.25, 2880)]
    found = fits_of(rows)
    assert list(found) == [("dense", None), ("uniform", 0.25)]
    for (method, _), fits in found.items():
        assert ("select_ms" in fits) == (method != "dense"), "dense selects nothing"
        for line in fits.values():
            assert line.points == 5 and line.exponent == pytest.approx(1) and line.cost(2880) == pytest.approx(2880)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in crops(rows)]
    assert ["dense", "", "0.50", "-", *["0.50"] * 6] in cells
    assert ["uniform", "0.25", *["1.00"] * 8] in cells
    text = " ".join(meaning(rows, 512, 2048))
    assert "no law" in text and "25.0% at N = 196" in text and "4,096 tokens" in text
    assert not list(crops([row for row in rows if not is_cut(row.tokens)]))


def test_a_machine_that_does_not_tell_its_memory():
    rows = [made_up("dense", None, n, peak_bytes=None) for n in SIZES]
    rows += [made_up("uniform", 64, n, peak_bytes=None) for n in SIZES]
    assert fits_of(rows)["uniform", 64]["peak_bytes"] is None
    cells = [[cell.strip() for cell in line.split("|")] for line in [*exponents(rows), *scaling.measured(rows)]]
    assert [row[-2] for row in cells if row[1:2] == ["uniform"]] == ["-"]
    assert [row[-3] for row in cells if row[1:3] == ["196", "dense"]] == ["-"]


@torch.no_grad()
@pytest.mark.parametrize("form", ["--json", "--markdown", None])
def test_a_tiny_run(monkeypatch, capsys, form):
    sizes, model = "--sizes 36 16 64 --keep 4 0.25", "--repeats 1 --width 64 --layers 2"
    words = ["scaling", *sizes.split(), "--methods", "uniform,fastv", *model.split()]
    monkeypatch.setattr(sys, "argv", [*words, *([form] if form else [])])
    scaling.main()
    out, err = capsys.readouterr()
    assert err.count("N = ") == 3 and "3 of 3 sizes" in err
    if form == "--json":
        lines = [json.loads(line) for line in out.splitlines()]
        rows, fits = ([line for line in lines if line["kind"] == kind] for kind in ("row", "fit"))
        assert [(row["tokens"], row["method"], row["keep"]) for row in rows[:5]] == [
            (16, "dense", None), (16, "uniform", 4), (16, "fastv", 4), (16, "uniform", 0.25), (16, "fastv", 0.25)
        ]  # fmt: skip
        for row in rows:
            assert row["kept"] == {None: row["tokens"], 4: 4, 0.25: row["tokens"] / 4}[row["keep"]]
            parts = row["vision_ms"] + row["select_ms"] + row["prefill_ms"]
            assert 0 < parts < row["ttft_ms"] and row["decode_ms"] > 0
            assert 0 < row["quadratic"] < 1
        of = {(one["method"], one["keep"], one["quantity"]): one for one in fits}
        assert of["uniform", 4, "kv_bytes"]["exponent"] == pytest.approx(0)
        assert 0 < of["uniform", 0.25, "kv_bytes"]["exponent"] < of["dense", None, "kv_bytes"]["exponent"] < 1
        assert of["uniform", 4, "flops"]["exponent"] < of["dense", None, "flops"]["exponent"]
        return
    for title in ("## Exponents, 4 tokens kept", "## Exponents, 25% of the tokens kept", "## Measured"):
        assert out.count(title) == 1
    assert ("# How costs grow" in out) == (form == "--markdown")
    if form:
        assert "- command: `python -m benchmarks.scaling --sizes 36 16 64" in out and "- date: 2" in out

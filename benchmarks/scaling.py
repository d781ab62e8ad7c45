"""What a picture costs as it has more tokens: measured at several N, and exponents fitted.

Random weights in LLaVA's own classes (see benchmarks.common.build): one picture of N = 196 ... 1764 patches, and
N = 2880 as LLaVA-NeXT's thumbnail and four crops. At each N the dense model and every method run in turn (A B C A B C
...), the runs in which memory is measured are not timed, and medians are taken. Dense is the model in a session that
keeps all tokens, which is the same model bit for bit. An exponent is the slope of log(cost) over log(N) by least
squares, with its standard error, over the pictures in one piece. At N = 2880 the encoder reads five pictures of 576
patches and the prompt holds 48 newlines that no method drops: another law, which is held against the line instead.

python -m benchmarks.scaling [--sizes 196 576 1764] [--keep 64 0.25] [--methods a,b] [--repeats 3]
                             [--width 384] [--layers 6] [--device cuda] [--json | --markdown]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import build, inputs_of, machine_line, wait
from vistok.bench.measure import DENSE, applied, is_dense
from vistok.bench.report import commit
from vistok.bench.resources import peak_bytes
from vistok.core import flops
from vistok.host import Session

SIZES = (196, 400, 576, 1156, 1764, 2880)
METHODS = "random,uniform,fastervlm,visionzip,holov,divprune,cdpruner,mmtok,fastv"
KEEPS: tuple[float | int, ...] = (64, 0.25)
Setting = tuple[str, float | int | None]
"""A method, and how much it keeps; None: the dense model."""
DECODED = 8
"""Tokens after the first over which the time of one is taken."""


@dataclass(frozen=True)
class Quantity:
    """Something that is measured at each N."""

    key: str
    title: str
    unit: str
    scale: float = 1.0
    """Of the unit in what is stored."""


QUANTITIES = (
    Quantity("vision_ms", "vision", "ms"),
    Quantity("select_ms", "select", "ms"),
    Quantity("prefill_ms", "prefill", "ms"),
    Quantity("decode_ms", "decode a token", "ms"),
    Quantity("ttft_ms", "first token", "ms"),
    Quantity("flops", "FLOPs", "GFLOP", 1e9),
    Quantity("kv_bytes", "KV bytes", "MB", 1e6),
    Quantity("peak_bytes", "peak bytes", "MB", 1e6),
)
TIMES = ("vision_ms", "select_ms", "prefill_ms", "decode_ms", "ttft_ms")


@dataclass(frozen=True)
class Row:
    """One method at one N: medians."""

    method: str
    keep: float | int | None
    tokens: int
    kept: float
    """Mean over the decoder's layers."""
    vision_ms: float
    select_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    """From pixels to the first token."""
    ttft_over_dense: float
    """Median of the pairs."""
    flops: int
    """Encoder and language model, up to the first token."""
    quadratic: float
    """Share of them that is attention's products, which grow with the square of a sequence."""
    kv_bytes: int
    peak_bytes: int | None
    """None: the machine does not tell."""


@dataclass(frozen=True)
class Fit:
    """cost = scale * N^exponent."""

    exponent: float
    scale: float
    error: float
    """Standard error; NaN for two points, which any line fits."""
    points: int

    def cost(self, tokens: int) -> float:
        """Where the line is at ``tokens``."""
        return self.scale * tokens**self.exponent


def fit(sizes: Sequence[float], costs: Sequence[float | None]) -> Fit | None:
    """The slope of log(cost) over log(size), by least squares; None unless there are two sizes or more and all costs
    are known and positive.

    The error is of the points around the line: noise, and the bend of a law that is no power.
    """
    points = [(math.log(n), math.log(c)) for n, c in zip(sizes, costs, strict=True) if c is not None and c > 0]
    if len({x for x, _ in points}) < 2 or len(points) < len(sizes):
        return None
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    left = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    error = math.sqrt(left / (len(points) - 2) / spread) if len(points) > 2 else math.nan
    return Fit(slope, math.exp(mean_y - slope * mean_x), error, len(points))


class FirstToken:
    """A streamer of ``generate`` that notes when the first new token is there."""

    def __init__(self, device: str) -> None:
        self.device, self.calls, self.at = device, 0, math.nan

    def put(self, value: Tensor) -> None:
        """Called with the prompt, and then with each new token."""
        self.calls += 1
        if self.calls == 2:
            wait(self.device)
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing is left to show."""


def lengths(model: Any, session: Session, inputs: dict[str, Tensor]) -> list[int]:
    """How many tokens each decoder layer was given for the prompt."""
    (picture,) = session.pictures
    now, out = picture.tokens_kept, []
    for layer in range(model.config.get_text_config().num_hidden_layers):
        now = picture.layers.get(layer, now)
        out.append(inputs["input_ids"].shape[1] - picture.tokens_in + now)
    return out


def quadratic(model: Any, session: Session, inputs: dict[str, Tensor]) -> int:
    """Operations of the attention products of encoder and language model, up to the first token."""
    vision, text = model.config.vision_config, model.config.get_text_config()
    pixels = inputs["pixel_values"].shape
    pictures = math.prod(pixels[:-3])
    patches = (pixels[-1] // vision.patch_size) ** 2 + 1
    seen = pictures * vision.num_hidden_layers * _attention(vision, patches)
    return seen + sum(_attention(text, length) for length in lengths(model, session, inputs))


def _attention(config: Any, tokens: int) -> int:
    return flops.attention(tokens, tokens, config.num_attention_heads, config.hidden_size // config.num_attention_heads)


def _generate(model: Any, inputs: dict[str, Tensor], new: int, streamer: FirstToken | None = None) -> None:
    model.generate(**inputs, min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0, streamer=streamer)


def timed(
    model: Any, inputs: dict[str, Tensor], method: str, keep: float | int | None, device: str
) -> dict[str, float]:
    """Milliseconds by stage of one prompt and ``DECODED`` tokens after the first."""
    first = FirstToken(device)
    with applied(model, method, keep or 1.0) as session:
        wait(device)
        start = time.perf_counter()
        _generate(model, inputs, DECODED + 1, first)
        spent = session.milliseconds
    out = {f"{name}_ms": spent[name] for name in ("vision", "select", "prefill")}
    return out | {"decode_ms": spent["decode"] / DECODED, "ttft_ms": 1e3 * (first.at - start)}


def counted(model: Any, inputs: dict[str, Tensor], method: str, keep: float | int | None) -> dict[str, Any]:
    """What one prompt takes whatever the machine's speed: operations, bytes, tokens."""
    layers = model.config.get_text_config().num_hidden_layers
    with applied(model, method, keep or 1.0) as session:
        peak = peak_bytes(model.device, lambda: _generate(model, inputs, 1))
        return {
            "kept": session.pictures[0].mean_tokens(layers),
            "flops": session.flops,
            "quadratic": quadratic(model, session, inputs) / session.flops,
            "kv_bytes": session.kv_bytes,
            "peak_bytes": peak,
        }


def rows_at(
    tokens: int, settings: Sequence[Setting], repeats: int, width: int, layers: int, device: str
) -> Iterator[Row]:
    """One row a setting; the first is the dense model."""
    model = build(tokens, width, layers).to(device)
    inputs = {name: value.to(device) for name, value in inputs_of(model).items()}
    counts = [counted(model, inputs, *setting) for setting in settings]
    rounds = [[timed(model, inputs, *setting, device) for setting in settings] for _ in range(repeats)]
    for number, ((method, keep), count) in enumerate(zip(settings, counts, strict=True)):
        mine = [taken[number] for taken in rounds]
        over = statistics.median(taken[number]["ttft_ms"] / taken[0]["ttft_ms"] for taken in rounds)
        middle = {name: statistics.median(one[name] for one in mine) for name in TIMES}
        yield Row(method=method, keep=keep, tokens=tokens, ttft_over_dense=over, **middle, **count)


def is_cut(tokens: int) -> bool:
    """Whether the picture of so many tokens is one in crops."""
    return math.isqrt(tokens) ** 2 != tokens


def fits_of(rows: Sequence[Row]) -> dict[Setting, dict[str, Fit | None]]:
    """For each setting the fit of every quantity, by its key, over the pictures in one piece."""
    groups: dict[Setting, list[Row]] = {}
    for row in rows:
        mine = groups.setdefault((row.method, row.keep), [])
        if not is_cut(row.tokens):
            mine.append(row)
    return {
        setting: {q.key: _fitted(q.key, mine) for q in QUANTITIES if q.key != "select_ms" or not is_dense(setting[0])}
        for setting, mine in groups.items()
    }


def _fitted(key: str, rows: Sequence[Row]) -> Fit | None:
    return fit([row.tokens for row in rows], [getattr(row, key) for row in rows])


def _keep(text: str) -> float | int:
    return float(text) if "." in text else int(text)


def _kept(keep: float | int) -> str:
    return f"{keep:.0%} of the tokens kept" if isinstance(keep, float) else f"{keep} tokens kept"


def _exponent(found: Fit | None) -> str:
    if found is None:
        return "-"
    return f"{round(found.exponent, 2) + 0.0:.2f}" + ("" if math.isnan(found.error) else f" ± {found.error:.2f}")


def _table(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A table in Markdown, padded so that it can be read as it is; the first ``left`` columns to the left."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = ("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return [row(head), f"| {' | '.join(rule)} |", *(row(line) for line in body)]


def exponents(rows: Sequence[Row]) -> Iterator[str]:
    """Lines: a table of exponents for each keep, dense in every one."""
    found = fits_of(rows)
    for keep in dict.fromkeys(row.keep for row in rows if row.keep is not None):
        mine = {method: fits for (method, its), fits in found.items() if its in (None, keep)}
        yield from ("", f"## Exponents, {_kept(keep)}", "")
        body = [[method, *(_exponent(fits.get(q.key)) for q in QUANTITIES)] for method, fits in mine.items()]
        yield from _table(["method", *(q.title for q in QUANTITIES)], body)


def crops(rows: Sequence[Row]) -> Iterator[str]:
    """Lines: what a picture in crops costs, over what the line through the others says."""
    found = fits_of(rows)
    for tokens in dict.fromkeys(row.tokens for row in rows if is_cut(row.tokens)):
        yield from ("", f"## N = {tokens}, in crops: measured over the line through the others", "")
        body = []
        for row in (row for row in rows if row.tokens == tokens):
            fits, cells = found[row.method, row.keep], []
            for quantity in QUANTITIES:
                line, value = fits.get(quantity.key), getattr(row, quantity.key)
                cells.append("-" if line is None or value is None else f"{value / line.cost(tokens):.2f}")
            body.append([row.method, "" if row.keep is None else f"{row.keep:g}", *cells])
        yield from _table(["method", "keep", *(q.title for q in QUANTITIES)], body, left=2)


def shares(rows: Sequence[Row]) -> Iterator[str]:
    """Lines: what part of the operations is quadratic, by N."""
    sizes = list(dict.fromkeys(row.tokens for row in rows))
    settings = list(dict.fromkeys((row.method, row.keep) for row in rows))
    of = {(row.method, row.keep, row.tokens): f"{row.quadratic:.1%}" for row in rows}
    yield from ("", "## Share of the quadratic part", "")
    body = [[m, "" if k is None else f"{k:g}", *(of[m, k, n] for n in sizes)] for m, k in settings]
    yield from _table(["method", "keep", *map(str, sizes)], body, left=2)


def measured(rows: Sequence[Row]) -> Iterator[str]:
    """Lines: the medians that the exponents were fitted to."""
    yield from ("", "## Measured", "")
    head = ["N", "method", "keep", *(f"{q.title}, {q.unit}" for q in QUANTITIES), "first token over dense"]
    body = []
    for row in rows:
        values = (getattr(row, q.key) for q in QUANTITIES)
        cells = ["-" if v is None else f"{v / q.scale:.2f}" for v, q in zip(values, QUANTITIES, strict=True)]
        keep = "" if row.keep is None else f"{row.keep:g}"
        body.append([str(row.tokens), row.method, keep, *cells, f"{row.ttft_over_dense:.2f}"])
    yield from _table(head, body, left=3)


def crossing(width: int, mlp_width: int) -> float:
    """At how many tokens the attention products of a decoder layer cost as much as all the rest of it."""
    heads = width // 64
    rest = flops.transformer_layer(1, width, mlp_width, heads, gated=True, keys=0)
    return rest / flops.attention(1, 1, heads, 64)


def meaning(rows: Sequence[Row], width: int, mlp_width: int) -> list[str]:
    """What the exponents mean, with the figures of this run: paragraphs, and an empty one between two."""
    one = [row for row in rows if is_dense(row.method) and not is_cut(row.tokens)]
    share = ""
    if one:
        small, large = (pick(one, key=lambda row: row.tokens) for pick in (min, max))
        share = (
            f" Of dense's operations it is {small.quadratic:.1%} at N = {small.tokens} and {large.quadratic:.1%} at "
            f"N = {large.tokens}, so that their own slope goes from {1 + small.quadratic:.2f} or less to "
            f"{1 + large.quadratic:.2f} or less."
        )
    return [
        "An exponent here is a summary of this range of N and no law. The cost of a transformer is a mixture, "
        "a + b N + c N²: what does not depend on the picture (the question, the start of every call), what is done for "
        "each token (projections, MLPs), and the products of attention, one for each pair. On a log-log plot such a "
        "sum is no line: its slope at one N is 1 + (share of the quadratic part) - (share of the constant part). It "
        "creeps from 0 or 1 towards 2 as N grows, and depends on the width of the model." + share,
        "",
        f"In a decoder layer as wide as this model's ({width}, MLP {mlp_width}) the quadratic part costs as much as "
        f"the rest at {crossing(width, mlp_width):,.0f} tokens; in one of LLaVA-1.5-7B (4096, MLP 11008) at "
        f"{crossing(4096, 11008):,.0f}. A larger model is therefore nearer to an exponent of 1 in the same range, and "
        "the exponents of this one must not be carried over. Operations count a causal mask as if it saved nothing; "
        "those of the selection are not counted. Milliseconds add what operations do not show: memory traffic, caches "
        "and kernels that are more efficient on larger matrices, which pulls slopes below those of the operations.",
        "",
        "The standard error is that of the slope, from how far the points lie off the line: noise of the machine and "
        "the bend of the mixture together. With a fixed number of tokens kept, what comes after the selection does not "
        "grow with N, except where a method has stages inside the language model and the layers before them see more; "
        "what is left to grow is the encoder and the selection. Tokens kept are the mean over the decoder's layers.",
        "",
        "The lines go through the pictures in one piece. N = 2880 is a picture in crops: its encoder reads five of "
        "576 patches and so saves most of the quadratic part, most methods choose in each crop by itself, and 48 "
        "newline tokens stay whatever is kept. What it costs is given over what the line says of 2880.",
    ]


def markdown(rows: Sequence[Row], about: Mapping[str, str], width: int) -> Iterator[str]:
    """Lines of the page of results."""
    yield from ("# How costs grow with the number of visual tokens", "")
    yield from (f"- {name}: {value}" for name, value in about.items())
    yield ""
    for paragraph in meaning(rows, width, 4 * width):
        yield from textwrap.wrap(paragraph, 120) or [""]
    for part in (exponents, crops, shares, measured):
        yield from part(rows)


def json_lines(rows: Sequence[Row], about: Mapping[str, str]) -> Iterator[str]:
    """One object a row, then one a fit."""
    for row in rows:
        yield json.dumps({"kind": "row", **dataclasses.asdict(row), **about})
    for (method, keep), found in fits_of(rows).items():
        for key, one in found.items():
            if one is not None:
                error = None if math.isnan(one.error) else one.error
                values = {"exponent": one.exponent, "scale": one.scale, "error": error, "points": one.points}
                yield json.dumps({"kind": "fit", "method": method, "keep": keep, "quantity": key, **values})


def run(
    sizes: Sequence[int],
    methods: Sequence[str],
    keeps: Sequence[float | int],
    repeats: int,
    width: int,
    layers: int,
    device: str,
    say: Callable[[str], None],
) -> list[Row]:
    """All rows, N by N; ``say`` is told how far it is."""
    settings: list[Setting] = [(DENSE, None)]
    settings += [(method, keep) for keep in keeps for method in methods if not is_dense(method)]
    rows: list[Row] = []
    began = time.perf_counter()
    for number, tokens in enumerate(sizes, 1):
        rows += rows_at(tokens, settings, repeats, width, layers, device)
        spent = time.perf_counter() - began
        say(f"N = {tokens}: {len(settings)} settings ({number} of {len(sizes)} sizes, {spent:.0f} s)")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="square numbers, and 2880")
    parser.add_argument("--keep", type=_keep, nargs="+", default=list(KEEPS), help="counts (64) or shares (0.25)")
    parser.add_argument("--methods", default=METHODS, help="comma-separated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6, help="of the encoder, and of the language model")
    parser.add_argument("--device", default="cpu")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--markdown", action="store_true", help="the page docs/results/scaling.md")
    options = parser.parse_args()
    keeps, methods = list(dict.fromkeys(options.keep)), list(dict.fromkeys(options.methods.split(",")))
    rows = run(
        sorted(set(options.sizes)),
        methods,
        keeps,
        options.repeats,
        options.width,
        options.layers,
        options.device,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    about = {
        "model": f"random weights, width {options.width}, {options.layers} + {options.layers} layers, one prompt",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine_line(options.device),
        **commit(),
        "medians": f"of {options.repeats}, all settings in turn",
        "command": f"`python -m benchmarks.scaling {shlex.join(sys.argv[1:])}`",
    }
    if options.json:
        lines = json_lines(rows, about)
    elif options.markdown:
        lines = markdown(rows, about, options.width)
    else:
        lines = (line for part in (exponents, crops, shares, measured) for line in part(rows))
    print(*lines, sep="\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

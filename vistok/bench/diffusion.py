"""The study of dmllm-redundancy on the world: when, how many and which visual tokens a masked-diffusion model can lose.

Accuracy is measured with a cache of the prompt, which changes no answer; FLOPs and milliseconds without one, as a model
has to run whose prompt sees its answer. Every setting answers the same questions.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vistok import catalogue
from vistok.host import Reducer
from vistok.host.diffusion import KINDS, DiffusionDecoder, LayerSkip, Prune
from vistok.reduce.dmllm_redundancy import VTW, StepPrune
from vistok.zoo.asking import denoise, encode, same_answer

from .journal import Journal, print_of
from .markdown import line
from .measure import Case, synchronise
from .report import replace_file
from .statistics import paired_bootstrap, wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

WITHDRAWN = "vtw"
"""The name of ``VTW``, which is no system of its own: no visual token is left in the upper half of the layers."""
METHODS = ("tome-merge", "divprune", "cdpruner", "sparsevlm", "fastv", WITHDRAWN, "random")
KEEPS: tuple[float | int, ...] = (0.5, 0.25, 0.1)
STARTS = (0.0, 0.25, 0.5, 0.75)
BATCH = 32


@dataclass(frozen=True)
class Setting:
    """One cell of the study; with neither method nor layers the dense model."""

    method: str = ""
    keep: float | int = 1.0
    """0 for a method that withdraws all."""
    start: float = 0.0
    layers: tuple[int, ...] = ()
    """Which layers visual tokens bypass."""
    seed: int = 0

    @property
    def prune(self) -> StepPrune | None:
        if not self.method:
            return None
        return StepPrune(_reducer(self.method, self.seed), self.keep or 1.0, self.start)

    @property
    def skip(self) -> LayerSkip | None:
        return LayerSkip(self.layers) if self.layers else None


def _reducer(name: str, seed: int) -> Reducer:
    if name == WITHDRAWN:
        return VTW()
    seeded = any(hyper.name == "seed" for hyper in catalogue.hyper_of(name))
    return catalogue.create(name, **({"seed": seed} if seeded else {}))


def settings_of(
    depth: int,
    methods: Sequence[str] = METHODS,
    keeps: Sequence[float | int] = KEEPS,
    starts: Sequence[float] = STARTS,
    seed: int = 0,
) -> list[Setting]:
    """The dense model; which x how many x when; each layer bypassed alone; and all layers but one."""
    cells = [Setting()]
    for method in methods:
        counts: Sequence[float | int] = (0,) if method == WITHDRAWN else keeps
        cells += [Setting(method, keep, start, seed=seed) for keep in counts for start in starts]
    every = range(depth)
    cells += [Setting(layers=(layer,)) for layer in every]
    cells += [Setting(layers=tuple(other for other in every if other != layer)) for layer in every if depth > 2]
    return cells


@dataclass(frozen=True)
class Study:
    """What was measured; S steps, L layers."""

    rows: list[dict[str, Any]]
    """One a setting, dense first: method, keep, start, layers, n, accuracy with its Wilson interval, over_dense with
    that of the difference on the same questions, tokens (mean over steps and layers), flops_ratio and ms."""
    attention: list[list[dict[str, float]]]
    """[step][layer] -> share of the answer's attention that goes to each of ``KINDS``, mean over the questions."""
    confidence: list[float]
    """Probability that each step gives to the tokens that the answers end up with, mean up to the first end token."""
    depth: int


def study(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    cases: Sequence[Case],
    settings: Sequence[Setting],
    *,
    steps: int,
    seed: int = 0,
    repeats: int = 5,
    journal: Path | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Study:
    """Measure every one of ``settings``, the first of which is the dense model, on ``cases``, whose truth is known.

    ``journal``: a file of what each setting answered; a setting that stands there is not asked again. ``on_step`` is
    called once a setting. Raises ValueError for wrong settings, before it has measured any.
    """
    if not settings or settings[0] != Setting():
        raise ValueError("settings: the first must be the dense model, Setting()")
    for setting in settings:
        _ = setting.prune  # wrong hyper-parameters are told before anything runs
    noted = Journal(journal, print_of(model, cases, {"steps": steps}) if journal else "")
    truth = [case.truth.answer for case in cases if case.truth]
    images, questions = [case.picture for case in cases], [case.question for case in cases]
    for setting in settings:
        if repr(setting) not in noted.said:
            answers, runs = denoise(
                model, processor, images, questions, steps=steps, prune=setting.prune, skip=setting.skip,
                batch_size=BATCH, cache=True,
            )  # fmt: skip
            kept = sum(statistics.fmean(run.step_tokens) * len(run.ids) for run in runs) / len(cases)
            noted.add(repr(setting), {"answers": answers, "tokens": kept})
        on_step()
    costs = cost(model, processor, cases[0], settings, steps=steps, repeats=repeats)
    found = [noted.said[repr(setting)] for setting in settings]
    right = [[float(same_answer(t, a)) for t, a in zip(truth, one["answers"], strict=True)] for one in found]
    rows = []
    for setting, one, hits, (flops, ms) in zip(settings, found, right, costs, strict=True):
        low, high = wilson(int(sum(hits)), len(hits))
        over = paired_bootstrap(hits, right[0], seed=seed)
        rows.append(
            {
                "method": setting.method or ("layer-skip" if setting.layers else "dense"),
                "keep": setting.keep,
                "start": setting.start,
                "layers": list(setting.layers),
                "n": len(hits),
                "accuracy": sum(hits) / len(hits),
                "accuracy_low": low,
                "accuracy_high": high,
                "over_dense": (sum(hits) - sum(right[0])) / len(hits),
                "over_dense_low": over[0],
                "over_dense_high": over[1],
                "tokens": one["tokens"],
                "flops_ratio": flops / costs[0][0],
                "ms": ms,
            }
        )
    attention, confidence = traces(model, processor, cases[: 2 * BATCH], steps=steps)
    return Study(rows, attention, confidence, len(attention[0]))


def cost(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    case: Case,
    settings: Sequence[Setting],
    *,
    steps: int,
    repeats: int = 5,
) -> list[tuple[int, float]]:
    """(FLOPs, median milliseconds) of one question's whole answer for each setting, without a cache, all in turn."""
    inputs = encode(processor, [case.picture], [case.question]).to(model.device)
    decoder = DiffusionDecoder(model, steps)
    counts = [decoder.run(inputs, setting.prune, setting.skip).flops for setting in settings]
    how = [(setting.prune, setting.skip) for setting in settings]
    return list(zip(counts, _time(decoder, inputs, how, repeats), strict=True))


def denoising_ms(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    case: Case,
    prunes: Sequence[Prune | None],
    *,
    steps: int,
    repeats: int = 7,
) -> list[float]:
    """Median milliseconds of one question's whole answer for each of ``prunes``, without a cache, all in turn."""
    inputs = encode(processor, [case.picture], [case.question]).to(model.device)
    decoder = DiffusionDecoder(model, steps)
    decoder.run(inputs)
    return _time(decoder, inputs, [(prune, None) for prune in prunes], repeats)


def _time(
    decoder: DiffusionDecoder,
    inputs: Mapping[str, Any],
    how: Sequence[tuple[Prune | None, LayerSkip | None]],
    repeats: int,
) -> list[float]:
    times: list[list[float]] = [[] for _ in how]
    for _ in range(repeats):
        for taken, (prune, skip) in zip(times, how, strict=True):
            synchronise(decoder.host.model)
            start = time.perf_counter()
            decoder.run(inputs, prune, skip)
            synchronise(decoder.host.model)
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def traces(
    model: PreTrainedModel, processor: ProcessorMixin, cases: Sequence[Case], *, steps: int
) -> tuple[list[list[dict[str, float]]], list[float]]:
    """``Study.attention`` and ``Study.confidence`` of the dense model."""
    images, questions = [case.picture for case in cases], [case.question for case in cases]
    _, runs = denoise(
        model, processor, images, questions, steps=steps, batch_size=BATCH, cache=True, trace=True
    )  # fmt: skip
    traced = [run.trace for run in runs if run.trace is not None]
    shares = torch.cat([trace.attention for trace in traced], 2).mean(2).tolist()
    ids = torch.cat([run.ids for run in runs]).cpu()
    ended = (ids == processor.tokenizer.eos_token_id).int().cumsum(1)
    said = (ended - (ids == processor.tokenizer.eos_token_id).int()) == 0  # up to the first end token
    sure = torch.cat([trace.confidence for trace in traced], 1)
    confidence = [float(step[said].mean()) for step in sure]
    return [[dict(zip(KINDS, layer, strict=True)) for layer in step] for step in shares], confidence


# Files ----------------------------------------------------------------------------------------------------------------

NOTES = """\
*right*: share of the questions answered right, with the 95% Wilson interval; *over dense*: points above the dense model
with the 95% interval of the difference on the same questions (paired bootstrap). *start*: from which share of the
denoising steps on the tokens are gone. *tokens*: mean over steps and layers. FLOPs (against dense) and milliseconds
(median, all settings in turn): one question's whole answer, the prompt run again in every step. *vtw*: no visual token
in the upper half of the layers. *skip*: visual tokens bypass these layers.
"""
TABLE, DATA, PICTURE = "diffusion.md", "diffusion.json", "diffusion.png"


def write(folder: Path, found: Study, facts: Mapping[str, str]) -> list[Path]:
    """Write the study's table, data and picture into ``folder``; their paths. ``facts``: what is said of the run."""
    data = {"facts": dict(facts), "rows": found.rows, "attention": found.attention, "confidence": found.confidence}
    replace_file(folder / TABLE, markdown(found, facts).encode())
    replace_file(folder / DATA, json.dumps(data, indent=1).encode())
    replace_file(folder / PICTURE, draw(found, facts.get("model", "")))
    return [folder / name for name in (TABLE, DATA, PICTURE)]


def markdown(found: Study, facts: Mapping[str, str]) -> str:
    """The study as one Markdown page."""
    lines = [f"# Visual tokens of a masked-diffusion model: {found.rows[0]['n']} questions", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", NOTES.strip(), ""]
    heads = ("which", "keep", "start", "right", "95%", "over dense", "tokens", "FLOPs", "ms")
    lines += [line(heads), line(["---", *["---:"] * (len(heads) - 1)])]
    lines += [line(cells(row, found.depth)) for row in found.rows]
    lines += ["", "## Where the answer's attention goes", ""]
    layers = [f"layer {layer}" for layer in range(found.depth)]
    lines += ["Shares of image / prompt / answer, mean over heads, the answer's tokens and questions.", ""]
    lines += [line(["step", "confidence", *layers]), line(["---:"] * (2 + found.depth))]
    for number, (step, sure) in enumerate(zip(found.attention, found.confidence, strict=True)):
        shares = [" / ".join(f"{100 * layer[kind]:.0f}" for kind in KINDS) for layer in step]
        lines.append(line([str(number), f"{sure:.2f}", *shares]))
    return "\n".join(lines) + "\n"


def cells(row: Mapping[str, Any], depth: int) -> list[str]:
    """A row as the tables show it."""
    method = row["method"]
    if row["layers"]:
        left = [layer for layer in range(depth) if layer not in row["layers"]]
        names = f"all but {left[0]}" if len(left) == 1 < len(row["layers"]) else ", ".join(map(str, row["layers"]))
        method = f"skip {names}"
    pruned = method not in ("dense",) and not row["layers"]
    over = f"{100 * row['over_dense']:+.1f}"
    between = f"({100 * row['over_dense_low']:+.1f} to {100 * row['over_dense_high']:+.1f})"
    return [
        method,
        str(row["keep"]) if pruned else "",
        f"{row['start']:.0%}" if pruned else "",
        f"{row['accuracy']:.1%}",
        f"{100 * row['accuracy_low']:.0f} to {100 * row['accuracy_high']:.0f}",
        "" if method == "dense" else f"{over} {between}",
        f"{row['tokens']:.1f}",
        f"{row['flops_ratio']:.2f}",
        f"{row['ms']:.1f}",
    ]


def draw(found: Study, title: str = "") -> bytes:
    """A PNG: accuracy by start for each method and keep, layers bypassed, attention by step and layer, confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(title, fontsize=10)
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    keeps = list(dict.fromkeys(row["keep"] for row in found.rows if row["method"] not in ("dense", "layer-skip")))
    panels = upper.subplots(1, len(keeps) + 1, sharey=True, squeeze=False)[0]
    dense = found.rows[0]["accuracy"]
    for axes, keep in zip(panels, keeps, strict=False):
        here = [row for row in found.rows if row["keep"] == keep and row["method"] not in ("dense", "layer-skip")]
        for method in dict.fromkeys(row["method"] for row in here):
            mine = [row for row in here if row["method"] == method]
            axes.plot([row["start"] for row in mine], [row["accuracy"] for row in mine], "o-", markersize=4,
                      label=method)  # fmt: skip
        axes.set_title(f"keep = {keep}", fontsize=9)
        axes.set_xlabel("gone from this share on")
        axes.legend(frameon=False, fontsize=7)
    skips = [row for row in found.rows if row["layers"]]
    for name, single, offset in (("bypassed", True, -0.2), ("all others bypassed", False, 0.2)):
        mine = [row for row in skips if (len(row["layers"]) == 1) == single]
        places = [row["layers"][0] if single else min({*range(found.depth)} - {*row["layers"]}) for row in mine]
        panels[-1].bar([p + offset for p in places], [row["accuracy"] for row in mine], 0.4, label=name)
    panels[-1].set_xlabel("layer")
    panels[-1].legend(framealpha=0.9, fontsize=7, loc="center right")
    panels[0].set_ylabel("accuracy")
    for axes in panels:
        axes.axhline(dense, color="#888888", linestyle=":", linewidth=1)
    maps = lower.subplots(1, len(KINDS) + 1, squeeze=False)[0]
    for axes, kind in zip(maps, KINDS, strict=False):
        shares = [[layer[kind] for layer in step] for step in found.attention]
        drawn = axes.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_title(f"attention to {kind}", fontsize=9)
        axes.set_xlabel("layer")
        axes.set_ylabel("step")
    lower.colorbar(drawn, ax=list(maps[:-1]))
    maps[-1].plot(found.confidence, "o-", markersize=4)
    maps[-1].set_title("confidence in the final tokens", fontsize=9)
    maps[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()

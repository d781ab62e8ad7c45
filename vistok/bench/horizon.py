"""How far into a language model its visual tokens matter: what the answer loses without them, layer by layer.

A visual token's information at decoder layer i is what its absence from i on does to the probability of the right
answer (Wang et al., arXiv 2512.07580). Tokens are really gone from layer i on, keys and values with them, and those
that stay keep their positions. The *information horizon* is the first layer from which on removing all of them changes
nothing any more; where only a random few have to stay, the first layer from which on a random choice is free.

The probability is that of all of the answer's tokens after the prompt, teacher-forced: of a reply that begins with it.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vistok.core.select import random
from vistok.host import Evidence, Reducer, Reduction, Schedule, apply
from vistok.zoo.asking import encode

from .measure import Case
from .statistics import NORMAL_95

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

Choice = Callable[[int], Tensor]
"""N to the (B or 1, K) int64 positions that stay of a picture of N tokens; K may be 0."""
Mode = Literal["keep-one", "leave-one-out"]


@dataclass(frozen=True)
class From(Reducer):
    """From decoder layer ``layer`` on only the visual tokens ``choose(N)`` are left; past the last layer all are."""

    layer: int
    choose: Choice

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        left = self.choose(num_tokens).shape[1]
        return Schedule(num_tokens, {self.layer: left} if self.layer < num_layers else {})

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        x = evidence.features
        return Reduction.select(x, self.choose(evidence.num_tokens).to(x.device).expand(len(x), keep))


def none(num_tokens: int) -> Tensor:
    """The choice of no token at all."""
    return torch.empty(1, 0, dtype=torch.int64)


def only(tokens: Tensor) -> Choice:
    """The choice of ``tokens`` (B or 1, K)."""
    return lambda num_tokens: tokens


# Probabilities --------------------------------------------------------------------------------------------------------


def with_answers(processor: ProcessorMixin, cases: Sequence[Case]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Model inputs of one batch, each prompt followed by its right answer, padded on the left; the answers' token ids.

    Raises ValueError for a case without truth.
    """
    if any(case.truth is None for case in cases):
        raise ValueError("cases: got one without truth, must have the right answer")
    prompts = encode(processor, [case.picture for case in cases], [case.question for case in cases])
    texts = [case.truth.answer for case in cases if case.truth]
    ids = [torch.tensor(i) for i in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return append(dict(prompts), ids), ids


def append(inputs: dict[str, Tensor], target_ids: Sequence[Tensor]) -> dict[str, Tensor]:
    """``inputs`` of left-padded prompts with ``target_ids`` (one vector a row) behind them, left-padded again."""
    longest = max(len(target) for target in target_ids)
    shape = inputs["input_ids"].shape
    out = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name not in inputs or inputs[name].shape != shape:
            continue
        rows = inputs[name].new_zeros(shape[0], shape[1] + longest)
        for row, (before, target) in enumerate(zip(inputs[name], target_ids, strict=True)):
            after = {"input_ids": target.to(before), "attention_mask": torch.ones_like(target).to(before)}
            gap = longest - len(target)
            rows[row, gap : gap + shape[1]] = before
            rows[row, gap + shape[1] :] = after.get(name, torch.zeros_like(target).to(before))
        out[name] = rows
    return out


@torch.inference_mode()
def answer_probability(
    model: PreTrainedModel, inputs: dict[str, Tensor], target_ids: Sequence[Tensor], method: From | None = None
) -> Tensor:
    """(B,) float64 on the CPU: probability of each row's last tokens, ``target_ids``, with ``method`` in the model."""
    longest = max(len(target) for target in target_ids)
    placed = {name: value.to(model.device) for name, value in inputs.items()}
    with apply(model, Reducer() if method is None else method, keep=1.0):
        logits = model(**placed, logits_to_keep=longest + 1, use_cache=False).logits
    logs = logits.double().log_softmax(-1).cpu()
    said = [logs[row, -len(ids) - 1 : -1].gather(1, ids[:, None]).sum() for row, ids in enumerate(target_ids)]
    return torch.stack(said).exp()


def token_information(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    layer: int,
    target_ids: Tensor,
    mode: Mode = "keep-one",
    tokens: Tensor | None = None,
    *,
    batch_size: int = 32,
) -> Tensor:
    """(T,) float64: the information of visual tokens of one picture at decoder layer ``layer``, for its answer.

    "keep-one": p(only the token is left from ``layer`` on) - p(none is); "leave-one-out": p(all) - p(all others are).
    Behind the last layer there is nothing to remove, and every token's is 0. ``inputs``: one row with one picture,
    ending in the answer's ``target_ids`` (A,). ``tokens``: (T,) positions, or (T, g) groups that are kept or left out
    together; None: every token. Raises ValueError for another mode.
    """
    if mode not in ("keep-one", "leave-one-out"):
        raise ValueError(f"mode: got {mode!r}, must be 'keep-one' or 'leave-one-out'")
    every = 0

    def count(num_tokens: int) -> Tensor:
        nonlocal every
        every = num_tokens
        return none(num_tokens)

    nothing = answer_probability(model, inputs, [target_ids], From(layer, count))
    groups = torch.arange(every)[:, None] if tokens is None else tokens.reshape(len(tokens), -1)
    if layer >= model.config.get_text_config().num_hidden_layers:
        return nothing.new_zeros(len(groups))
    if mode == "leave-one-out":
        others = torch.ones(len(groups), every, dtype=torch.bool).scatter_(1, groups, False)
        stay = others.nonzero()[:, 1].view(len(groups), -1)
        base = answer_probability(model, inputs, [target_ids])
    else:
        stay, base = groups, nothing
    found = []
    for part in stay.split(batch_size):
        copies = {name: torch.cat([value] * len(part)) for name, value in inputs.items()}
        found.append(answer_probability(model, copies, [target_ids] * len(part), From(layer, only(part))))
    change = torch.cat(found) - base
    return change if mode == "keep-one" else -change


# The profile ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """How much of the answer's probability is lost: mean over the questions and its 95% interval, in [-1, 1]."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Change:
        """``values`` (Q,), one a question; nothing is known of the spread of a single one."""
        mean = float(values.mean())
        if len(values) < 2:
            return cls(mean, -1.0, 1.0)
        half = NORMAL_95 * statistics.stdev(values.tolist()) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    @property
    def bound(self) -> float:
        """The end of the interval that is farther from nothing."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class LayerProfile:
    """What visual tokens are worth from one decoder layer on."""

    layer: int
    removed: Change
    """All of them removed."""
    random: Change
    """All but a random share removed; mean over seeds."""
    windows: tuple[float, float] | None = None
    """Mean and standard deviation of the information of windows of the grid (each kept alone), mean over questions."""


@dataclass(frozen=True)
class Profile:
    """The layers of one model on one task; the last entry is behind the last block, where nothing can change."""

    questions: int
    probability: float
    """Of the right answer with all tokens, mean over the questions."""
    layers: tuple[LayerProfile, ...]

    def horizon(self, eps: float) -> int:
        """The information horizon: the first layer from which on no visual token is needed, interval included."""
        return horizon([layer.removed.bound for layer in self.layers], eps)

    def random_horizon(self, eps: float) -> int:
        """The first layer from which on the random share is enough, interval included."""
        return horizon([layer.random.bound for layer in self.layers], eps)

    def hyper(self, eps: float, share: float) -> dict[str, Any]:
        """What ``information-horizon`` takes of it: at least one layer is the base method's."""
        depth = len(self.layers) - 1
        end, start = max(1, self.horizon(eps)), max(1, self.random_horizon(eps))
        return {"stages": ((start / depth, share),) if start < end else (), "horizon": end / depth}


def horizon(changes: Sequence[float], eps: float) -> int:
    """The first place from which on no ``changes`` is above ``eps`` or below -``eps``.

    ``len(changes)`` where the last one is. Raises ValueError for a negative ``eps``.
    """
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, must be 0 or more")
    return max((i + 1 for i, change in enumerate(changes) if not abs(change) <= eps), default=0)


def layer_profile(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    cases: Sequence[Case],
    *,
    share: float = 0.25,
    seeds: int = 3,
    window: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    on_step: Callable[[], None] = lambda: None,
) -> Profile:
    """What the right answer's probability loses without visual tokens, from each decoder layer on.

    ``share``: of each picture's tokens that a random choice leaves; averaged over ``seeds`` choices. ``window``: also
    the information of each window of that many by that many tokens. ``on_step`` is called once a layer and batch,
    ``(num_layers + 1) * ceil(len(cases) / batch_size)`` times. The vision encoder runs anew in every forward.
    """
    depth = model.config.get_text_config().num_hidden_layers
    batches = [with_answers(processor, cases[i : i + batch_size]) for i in range(0, len(cases), batch_size)]
    whole = [answer_probability(model, *batch) for batch in batches]
    rows = []
    for layer in range(depth + 1):
        removed, few, spread = [], [], []
        for start, batch, p in zip(range(0, len(cases), batch_size), batches, whole, strict=True):
            on_step()
            if layer == depth:  # behind the last block there is nothing to remove
                removed.append(torch.zeros_like(p))
                few.append(torch.zeros_like(p))
                continue
            removed.append(p - answer_probability(model, *batch, From(layer, none)))
            turns = range(seeds * seed, seeds * (seed + 1))
            chosen = [answer_probability(model, *batch, From(layer, _few(share, turn, layer))) for turn in turns]
            few.append(p - torch.stack(chosen).mean(0))
            if window:
                part = cases[start : start + batch_size]
                spread += [window_information(model, processor, case, layer, window) for case in part]
        windows = (statistics.fmean(m for m, _ in spread), statistics.fmean(s for _, s in spread)) if spread else None
        rows.append(LayerProfile(layer, Change.of(torch.cat(removed)), Change.of(torch.cat(few)), windows))
    return Profile(len(cases), float(torch.cat(whole).mean()), tuple(rows))


def _few(share: float, seed: int, layer: int) -> Choice:
    return lambda n: random(1, n, max(1, round(share * n)), seed + 7919 * layer)


def window_information(
    model: PreTrainedModel, processor: ProcessorMixin, case: Case, layer: int, window: int
) -> tuple[float, float]:
    """Mean and standard deviation over the picture's windows of ``window`` x ``window`` tokens, each kept alone.

    What does not fill a window is left out. Raises ValueError where the tokens form no grid of a window at least.
    """
    inputs, (target,) = with_answers(processor, [case])
    with apply(model, Reducer(), keep=1.0) as session, torch.inference_mode():
        model(**{name: value.to(model.device) for name, value in inputs.items()}, logits_to_keep=1, use_cache=False)
    grid = session.pictures[0].grid
    if grid is None or min(grid) < window:
        raise ValueError(f"window: got {window}, must fit into the picture's grid of tokens ({grid or 'it has none'})")
    places = torch.arange(grid[0] * grid[1]).view(grid)
    tokens = places.unfold(0, window, window).unfold(1, window, window).reshape(-1, window * window)
    found = token_information(model, inputs, layer, target, tokens=tokens)
    return float(found.mean()), float(found.std(unbiased=False))


# The picture ----------------------------------------------------------------------------------------------------------


def draw(profile: Profile, eps: float, share: float, title: str = "") -> bytes:
    """The two curves with their intervals, and where they end in nothing, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = [layer.layer for layer in profile.layers]
    lines = (
        ("all removed", "#b3261e", [layer.removed for layer in profile.layers], profile.horizon(eps)),
        (f"{share:.0%} left at random", "#1a5fb4", [layer.random for layer in profile.layers],
         profile.random_horizon(eps)),
    )  # fmt: skip
    axes.axhspan(-eps, eps, color="#dddddd", linewidth=0, label=f"within {eps:g}")
    for name, colour, changes, end in lines:
        ends = f"free from layer {end}" if end < layers[-1] else "never free"
        axes.plot(layers, [c.mean for c in changes], "o-", color=colour, markersize=4, label=f"{name}: {ends}")
        axes.fill_between(
            layers, [c.low for c in changes], [c.high for c in changes], color=colour, alpha=0.15, linewidth=0
        )
        axes.axvline(end, color=colour, linestyle=":", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("visual tokens are removed from this decoder layer on")
    axes.set_ylabel("lost probability of the answer")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()

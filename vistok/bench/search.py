"""The hyper-parameters under which a method disturbs the model least: VFlowOpt's search, for any reducer.

What is maximised is the mean cosine, over prompts, between the last token's final hidden state with the method and
without it: no labels are needed, and the number is smooth where accuracy is not. What is held is the mean number of
visual tokens over the decoder's layers. Source: Yang et al., arXiv 2508.05211. The optimiser is Optuna's Gaussian
process with constrained expected improvement (the authors use scikit-optimize's, and solve one ratio from the others to
meet the constraint).
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok import catalogue
from vistok.host import apply
from vistok.host.hosts import host_of
from vistok.host.keep import Keep, check_keep, count
from vistok.host.setting import Setting
from vistok.zoo.asking import encode

from .journal import Journal, print_of
from .measure import Case

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

Range = tuple[float, float] | tuple[int, int]
Space = Mapping[str, Range | Sequence[Any]]
"""For each hyper-parameter a tuple (low, high), whole numbers if both are, or a list of choices. The name "keep" stands
for the method's ``keep``."""


@dataclass(frozen=True)
class Evaluation:
    """One setting and what it did."""

    hyper: Mapping[str, Any]
    """The values of the hyper-parameters that were searched ("keep" among them, if it was)."""
    cosine: float
    """Mean cosine between the last token's final hidden states with the method and without, in [-1, 1]."""
    tokens: float
    """Visual tokens of a picture that were left, mean over the decoder's layers and over the pictures."""
    limit: float
    """The tokens allowed."""
    seconds: float

    @property
    def allowed(self) -> bool:
        return self.tokens <= self.limit * (1 + 1e-9)


@dataclass(frozen=True)
class Found:
    """All that a search tried, in order."""

    method: str
    keep: Keep
    fixed: Mapping[str, Any]
    evaluations: list[Evaluation]

    @property
    def best(self) -> Evaluation:
        """The evaluation of largest cosine within the limit, of equals the first. ValueError if there is none."""
        allowed = [e for e in self.evaluations if e.allowed]
        if not allowed:
            least = min(self.evaluations, key=lambda e: e.tokens)
            raise ValueError(
                f"keep: got {self.keep}, but none of the {len(self.evaluations)} settings tried leaves so few tokens "
                f"({least.limit:.1f}); the least was {least.tokens:.1f}, with {dict(least.hyper)}"
            )
        return max(allowed, key=lambda e: e.cosine)

    def setting(self) -> Setting:
        """The best one, to be written as JSON for ``vistok.apply``."""
        best = self.best
        hyper = {**self.fixed, **best.hyper}
        keep = hyper.pop("keep", self.keep)
        measured = {
            "cosine": best.cosine,
            "tokens": best.tokens,
            "limit": best.limit,
            "calls": len(self.evaluations),
        }
        return Setting((self.method,), keep, (hyper,), measured)


def search(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    method: str,
    cases: Sequence[Case],
    *,
    keep: Keep = 0.25,
    space: Space | None = None,
    fixed: Mapping[str, Any] | None = None,
    calls: int = 300,
    starts: int = 27,
    seed: int = 42,
    batch_size: int = 8,
    journal: Path | None = None,
    on_call: Callable[[Evaluation], None] = lambda evaluation: None,
) -> Found:
    """Tune the hyper-parameters of the reducer ``method`` on ``cases``; the same arguments give the same result.

    ``keep``: visual tokens of a picture allowed (mean over the decoder's layers), as in ``vistok.apply``, and what the
    method is asked for unless "keep" is in the space. ``space``: what to tune, None for the method's own
    ``search_space``; ``fixed``: other hyper-parameters that differ from their defaults. Of ``calls`` evaluations the
    first is that of the method's defaults (where they lie in the space), the others of the first ``starts`` are random,
    the rest proposed by a Gaussian process. ``journal``: a file to which each evaluation is added, one JSON line each;
    those of an earlier run of the same search stand there and are not made again. ``on_call`` is told of every
    evaluation, those of the journal included.

    Raises ImportError without Optuna, ValueError for wrong arguments or a space that the method does not have.
    """
    if calls < 1 or starts < 1:
        raise ValueError(f"calls, starts: got {calls}, {starts}, must both be 1 or more")
    if not cases:
        raise ValueError("cases: got none, must be at least one picture with a question")
    method, keep, fixed = catalogue.card(method).slug, check_keep(keep), dict(fixed or {})
    space = check_space(method, space, fixed)
    known = {"method": method, "keep": keep, "fixed": fixed, "space": space, "starts": starts, "seed": seed}
    said = Journal(journal, print_of(model, cases, known) if journal else "")

    batches = [
        encode(processor, [case.picture for case in part], [case.question for case in part]).to(model.device)
        for part in (cases[i : i + batch_size] for i in range(0, len(cases), batch_size))
    ]
    plain: list[Tensor] | None = None
    done: list[Evaluation] = []
    for number in range(calls):
        evaluation = _noted(said.said.get(str(number)), space)
        if evaluation is None:
            hyper = propose(space, done, starts=starts, seed=seed, first=_defaults(method, space, keep))
            same = next((e for e in done if e.hyper == hyper), None)
            if same is None:
                plain = [final_states(model, batch) for batch in batches] if plain is None else plain
                evaluation = evaluate(model, method, batches, plain, keep, fixed, hyper)
            else:  # a small space is soon exhausted
                evaluation = Evaluation(hyper, same.cosine, same.tokens, same.limit, 0.0)
            said.add(str(number), vars(evaluation))
        done.append(evaluation)
        on_call(evaluation)
    return Found(method, keep, fixed, done)


def evaluate(
    model: PreTrainedModel,
    method: str,
    batches: Sequence[BatchFeature],
    plain: Sequence[Tensor],
    keep: Keep,
    fixed: Mapping[str, Any],
    hyper: Mapping[str, Any],
) -> Evaluation:
    """Run one setting; ``plain`` are the ``final_states`` of the batches without a method."""
    start = time.perf_counter()
    given = {**fixed, **hyper}
    asked = given.pop("keep", keep)
    depth = model.config.get_text_config().num_hidden_layers
    cosines, tokens, limits = [], [], []
    with apply(model, catalogue.create(method, **given), keep=asked) as session:
        for batch, before in zip(batches, plain, strict=True):
            after = final_states(model, batch)
            norm = (before.square().sum(1) * after.square().sum(1)).sqrt()  # of equal states exactly their square
            product = (before * after).sum(1)
            cosines += torch.where(norm > 0, product / norm, (before == after).all(1).double()).tolist()
            tokens += [picture.mean_tokens(depth) for picture in session.pictures]
            limits += [count(keep, picture.tokens_in) for picture in session.pictures]
    seconds = round(time.perf_counter() - start, 3)
    return Evaluation(hyper, _mean(cosines), _mean(tokens), _mean(limits), seconds)


@torch.inference_mode()
def final_states(model: PreTrainedModel, batch: BatchFeature) -> Tensor:
    """(B, D) float64: the last layer's hidden state of the last token of each row, rows padded on the left."""
    states: Tensor = host_of(model).base(**batch, use_cache=False).last_hidden_state[:, -1]
    return states.double()


# The space and the optimiser -----------------------------------------------------------------------------------------


def read_space(texts: Sequence[str]) -> dict[str, Any]:
    """A space as it is written on a command line: "cell=3:24" (whole), "ratio=0.5:1.0" (real), "parity=paper|authors".

    Raises ValueError for anything else.
    """
    space: dict[str, Any] = {}
    for text in texts:
        name, _, values = text.partition("=")
        try:
            if ":" in values:
                low, high = (_number(value) for value in values.split(":"))
                space[name] = (low, high)
            elif values:
                space[name] = [_value(value) for value in values.split("|")]
            else:
                raise ValueError
        except ValueError:
            raise ValueError(f"space: got {text!r}, must be NAME=LOW:HIGH or NAME=CHOICE|CHOICE") from None
    return space


def check_space(method: str, space: Space | None, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The space without what is ``fixed``, ranges as tuples and choices as lists. ValueError if there is none."""
    if space is None:
        space = getattr(type(catalogue.create(method)), "search_space", {})
        if not space:
            raise ValueError(f"space: {method} has no search_space of its own, say what is to be tuned")
    known = [*catalogue.card(method).hyper, "keep"]
    checked: dict[str, Any] = {}
    for name, values in space.items():
        if name not in known:
            raise ValueError(f"space: {name} is no hyper-parameter of {method}; it has {', '.join(known)}")
        if isinstance(values, tuple):
            numbers = len(values) == 2 and all(type(v) in (int, float) for v in values)
            if not numbers or not values[0] < values[1]:
                raise ValueError(f"space: {name} is {values}, must be two numbers (low, high) or a list of choices")
            checked[name] = values if all(type(v) is int for v in values) else tuple(map(float, values))
        else:
            checked[name] = list(values)
            if not checked[name] or isinstance(values, str):
                raise ValueError(f"space: {name} is {values!r}, must be two numbers (low, high) or a list of choices")
    checked = {name: values for name, values in checked.items() if name not in fixed}
    if not checked:
        raise ValueError("space: got nothing to tune, must name at least one hyper-parameter that is not fixed")
    return checked


def propose(
    space: Mapping[str, Any],
    done: Sequence[Evaluation],
    *,
    starts: int,
    seed: int,
    first: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The next setting to try, from those that are ``done`` alone: a search that was interrupted goes on as it would
    have gone. ``first`` begins, if given."""
    if not done and first is not None:
        return dict(first)
    optuna = _optuna()
    axes: dict[str, Any] = {}
    for name, values in space.items():
        if not isinstance(values, tuple):  # choices are known by their place: they may be of any type
            axes[name] = optuna.distributions.CategoricalDistribution(range(len(values)))
        elif isinstance(values[0], int):
            axes[name] = optuna.distributions.IntDistribution(*values)
        else:
            axes[name] = optuna.distributions.FloatDistribution(*values)
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that deterministic_objective may change
            sampler = optuna.samplers.GPSampler(
                seed=seed + len(done),
                n_startup_trials=starts,
                deterministic_objective=True,
                warn_independent_sampling=False,
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
            bound = not all(e.allowed for e in done)
            for e in done:
                at = {n: v if isinstance(space[n], tuple) else space[n].index(v) for n, v in e.hyper.items()}
                excess = min(e.tokens / e.limit - 1, 0.0) if e.allowed else e.tokens / e.limit - 1
                over = {"tokens": excess} if bound else None
                study.add_trial(
                    optuna.trial.create_trial(params=at, distributions=axes, value=e.cosine, constraints=over)
                )
            params = study.ask(axes).params
    finally:
        optuna.logging.set_verbosity(loud)
    return {n: params[n] if isinstance(space[n], tuple) else space[n][params[n]] for n in space}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError('searching needs Optuna: pip install "vistok[bench]"') from error
    return optuna


def _defaults(method: str, space: Mapping[str, Any], keep: Keep) -> dict[str, Any] | None:
    """The method's own setting, or None where it lies outside of the space."""
    values = {**catalogue.card(method).hyper, "keep": keep}
    found = {name: values[name] for name in space}
    for name, value in found.items():
        within = space[name]
        if isinstance(within, tuple):
            if type(value) not in (int, float) or not within[0] <= value <= within[1]:
                return None
            if isinstance(within[0], int) != isinstance(value, int):
                return None
        elif value not in within:
            return None
    return found


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _value(text: str) -> Any:
    known: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    try:
        return _number(text)
    except ValueError:
        return text


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _noted(entry: Mapping[str, Any] | None, space: Mapping[str, Any]) -> Evaluation | None:
    """An evaluation as the journal has it."""
    if entry is None:
        return None
    hyper = {name: _chosen(space[name], value) for name, value in entry["hyper"].items()}
    return Evaluation(**{**entry, "hyper": hyper})


def _chosen(values: Any, value: Any) -> Any:
    """``value`` as the space has it: JSON makes lists of tuples."""
    if isinstance(values, tuple):
        return value
    return next(choice for choice in values if json.dumps(choice) == json.dumps(value))

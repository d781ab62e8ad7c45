"""Recipes: reducers that are a chain of steps, one for each slot, and the same recipe with a step swapped.

    score -> allocate -> select -> merge -> order

A ``Recipe`` writes a method for each slot in which it makes a choice of its own; the chain itself is written here.
A slot that it leaves alone has the plain step: all alike, one group, top-k, the others are dropped, raster order. What
each step reads stands in ``slot_needs``.

Ablation. ``swap`` puts another step into a slot and holds the rest: one of the named steps of ``vistok.host.choices``,
or the own step of another recipe, by its slug. Evidence that no step reads any more is not asked for. ``steps_of`` says
which step each slot has, and what can take its place.

>>> import torch, vistok
>>> from vistok.host import Evidence
>>> from vistok.host.recipe import steps_of, swap
>>> holov = vistok.create("holov")
>>> steps_of(holov)["allocate"].step, steps_of(holov)["select"].step
('own', 'topk')
>>> plain = swap(holov, allocate="none")  # what is left is FasterVLM
>>> diverse = swap(holov, select="max_sum", merge="nearest")
>>> diverse.name, dict(diverse.needs)
('holov[select=max_sum, merge=nearest]', {'cls_attention': -2})
>>> seen = Evidence(features=torch.randn(2, 64, 8), cls_attention=torch.rand(2, 4, 64))
>>> torch.equal(plain.reduce(seen, 16).keep, vistok.create("fastervlm").reduce(seen, 16).keep)
True
>>> diverse.reduce(seen, 16).tokens.shape
torch.Size([2, 16, 8])
>>> swap(holov, select="dep")
Traceback (most recent call last):
ValueError: select: got 'dep', must be own, dpp, facility, max_min, max_sum, nms, random, topk, uniform...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vistok.core.select import topk, topk_per_group
from vistok.core.stages import raster_slots
from vistok.core.tensors import ranking
from vistok.host.choices import CHOICES, LAYERED, SLOTS, Shares, Slot, constant, merge_none
from vistok.host.reducer import Evidence, LayerSpec, Reducer, Reduction
from vistok.host.vision import layers_of
from vistok.host.wrapper import Wrapper

__all__ = ["SLOTS", "Recipe", "Shares", "Slot", "SlotNeeds", "Steps", "Swapped", "steps_of", "swap"]

SlotNeeds = Mapping[Slot, Mapping[str, LayerSpec]]


class Recipe(Reducer):
    """Base of methods whose stage before the language model is a chain of steps. A system writes those of its own;
    ``select`` and ``compress`` say how they follow one another."""

    greedy: ClassVar[bool] = False
    """True if ``pick`` takes one token after the other, each in view of those before it, and gives them in that
    order."""

    @property
    def slot_needs(self) -> SlotNeeds:
        """The evidence that each of its own steps reads, as in ``needs``, which is their union."""
        return {}

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        space: Mapping[str, LayerSpec] = {"encoder_features": None} if self.space == "encoder" else {}
        return _union([space, *self.slot_needs.values()])

    # The steps ----------------------------------------------------------------------------------------------------

    def scores(self, evidence: Evidence) -> Tensor:
        """score: (B, N) how much each token matters."""
        return constant(evidence)

    def allocate(self, evidence: Evidence, scores: Tensor, keep: int) -> Shares | None:
        """allocate: what each of several contiguous parts of the picture gets of ``keep``; None: one group."""
        return None

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        """select: (B, keep) positions, best first, of one part of the picture. 0 < keep < N, but for one group."""
        return topk(scores, keep)

    def merge(self, x: Tensor, evidence: Evidence, picks: Tensor) -> tuple[Tensor, Tensor]:
        """merge: (B, K, D) values of the slots that stand at ``picks`` (B, K), row for row, and the slot (B, N) of each
        of the tokens ``x`` (B, N, D; encoder features or projected tokens, see ``space``), -1 where it is dropped."""
        return merge_none(x, evidence, picks)

    @property
    def order(self) -> Literal["raster", "author"]:
        """order: whether values stand at their own places, or in the order of the picks on ascending places."""
        return "raster"

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor | None:
        """As of Reducer: those of its own score step."""
        return self.scores(evidence) if layer is None and _own(self, "score") else None

    # The chain ----------------------------------------------------------------------------------------------------

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        """(B, K) positions, best first: of each part its share is picked."""
        scores = self.scores(evidence)
        shares = self.allocate(evidence, scores, keep)
        if shares is None:
            return self.pick(evidence, scores, keep)
        if self._ranks:
            picks = topk_per_group(scores, shares.sizes, shares.budgets)
            return picks.gather(1, ranking(scores.gather(1, picks)))
        return self._pick_in_parts(evidence, scores, shares)

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        picks = self.select(evidence, keep)
        x = evidence.encoder_features if self.space == "encoder" else evidence.features
        tokens, source = self.merge(x, evidence, picks)
        if self.order == "author":
            return Reduction(picks.sort(1).values, tokens, source)
        return Reduction(*raster_slots(picks, tokens, source))

    @property
    def _ranks(self) -> bool:
        """Whether ``pick`` is top-k, which needs no loop over the parts."""
        return type(self).pick is Recipe.pick

    def _pick_in_parts(self, evidence: Evidence, scores: Tensor, shares: Shares) -> Tensor:
        """(B, K): each part is picked from by itself; the best of every part first.

        A part that is a crop, or all of the picture, has its grid, another has none. Pictures that have the same budget
        for a part are picked from together.
        """
        totals = shares.budgets.sum(1)
        if bool((totals != totals[0]).any()):
            raise ValueError(f"budgets: got sums {totals.tolist()}, must be the same for every picture of the batch")
        b, n = scores.shape
        place = torch.arange(n, device=scores.device)
        whole = [h * w for h, w in evidence.crops] == list(shares.sizes)
        parts = replace(
            evidence,
            index=place.expand(b, n) if evidence.index is None else evidence.index,
            crops=evidence.crops if whole else tuple((1, size) for size in shares.sizes),
        )
        turn = torch.full((b, n), 2.0, dtype=torch.float64, device=scores.device)  # in (0, 1] where a token is picked
        first = 0
        for part, size in enumerate(shares.sizes):
            seen = parts.crop(part)
            if not whole:
                seen = replace(seen, grid=evidence.grid if size == n else None)
            budgets = shares.budgets[:, part].to(scores.device)
            for budget in budgets[budgets > 0].unique().tolist():
                rows = (budgets == budget).nonzero()[:, 0]
                own = scores[rows, first : first + size]
                picks = self.pick(_pictures(seen, rows), own, budget) if budget < size else ranking(own)
                turn[rows[:, None], first + picks] = (place[:budget] + 1).double() / budget
            first += size
        return turn.sort(dim=1, stable=True).indices[:, : int(totals[0])]


def _pictures(evidence: Evidence, rows: Tensor) -> Evidence:
    """The pictures ``rows`` (b,) int64 of the batch."""

    def of(value: Any) -> Any:
        return tuple(of(v) for v in value) if isinstance(value, tuple) else value[rows]

    batched = {f.name for f in fields(evidence)} - {"grid", "project", "crops", "boxes", "frames"}
    given = {name: of(value) for name in batched if (value := getattr(evidence, name)) is not None}
    return replace(evidence, **given)


# The same recipe with a step swapped ------------------------------------------------------------------------------

_METHODS: dict[Slot, str] = dict(zip(SLOTS, ("scores", "allocate", "pick", "merge", "order"), strict=True))
_PLAIN: dict[Slot, str] = dict(zip(SLOTS, ("constant", "none", "topk", "none", "raster"), strict=True))
"""The named step of a slot that a recipe leaves alone."""


class Steps(NamedTuple):
    """A slot of a recipe."""

    step: str
    """The step that it has: "own", or the name of one that ``swap`` knows."""
    choices: tuple[str, ...]
    """What ``swap`` takes for it, this step included; () where nothing in this recipe reads it."""


@dataclass(frozen=True)
class Swapped(Recipe, Wrapper):
    """A recipe in which some steps are others; made by ``swap``. Where it acts and all else is the recipe's."""

    method: Recipe
    steps: tuple[tuple[Slot, str], ...]
    """The steps that are not its own, in the order of the slots."""
    seed: int = 0
    """Of random steps."""

    @property
    def name(self) -> str:
        """As "holov[select=max_sum, merge=none]"."""
        return f"{_slug(self.method)}[{', '.join(f'{slot}={name}' for slot, name in self.steps)}]"

    @cached_property
    def chain(self) -> Mapping[Slot, _Step]:
        """The step of each slot."""
        swapped = dict(self.steps)
        return {slot: _step(self.method, slot, swapped.get(slot), self.seed) for slot in SLOTS}

    @property
    def slot_needs(self) -> SlotNeeds:
        return {slot: step.needs for slot, step in self.chain.items() if slot != "score" or self._scored}

    @property
    def _scored(self) -> bool:
        """Whether any step reads the scores."""
        return any(step.reads_score != "no" for step in self.chain.values())

    @property
    def _ranks(self) -> bool:
        return self.chain["select"].name == "topk"

    def see(self, evidence: Evidence) -> Evidence:
        return self._as(self.method.needs, evidence)

    def _as(self, needs: Mapping[str, LayerSpec], evidence: Evidence) -> Evidence:
        """``evidence``, gathered for all steps, with the layers that ``needs`` asks for."""
        given = {
            name: _layers(getattr(evidence, name), self.needs[name], spec)
            for name, spec in needs.items()
            if name in self.needs and self.needs[name] != spec
        }
        return replace(evidence, **given) if given else evidence

    def _met(self, scores: Tensor, step: _Step) -> Tensor:
        """``scores`` as ``step`` is given them: one that a method wrote for its own may take them for weights, so that
        those of another are shifted to be 0 or more."""
        foreign = not step.known and not (step.name == self.chain["score"].name == "own")
        return scores - scores.amin(1, keepdim=True).clamp_max(0) if foreign else scores

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor | None:
        scored = self._scored and not self.chain["score"].plain
        return self.scores(evidence) if layer is None and scored else None

    def scores(self, evidence: Evidence) -> Tensor:
        step = self.chain["score"]
        scores: Tensor = step.run(self._as(step.needs, evidence)) if self._scored else constant(evidence)
        return scores

    def allocate(self, evidence: Evidence, scores: Tensor, keep: int) -> Shares | None:
        step = self.chain["allocate"]
        shares: Shares | None = step.run(self._as(step.needs, evidence), self._met(scores, step), keep)
        return shares

    def pick(self, evidence: Evidence, scores: Tensor, keep: int) -> Tensor:
        step = self.chain["select"]
        picks: Tensor = step.run(self._as(step.needs, evidence), self._met(scores, step), keep)
        return picks

    def merge(self, x: Tensor, evidence: Evidence, picks: Tensor) -> tuple[Tensor, Tensor]:
        step = self.chain["merge"]
        slots: tuple[Tensor, Tensor] = step.run(x, self._as(step.needs, evidence), picks)
        return slots

    @property
    def order(self) -> Literal["raster", "author"]:
        name = dict(self.steps).get("order")
        return self.method.order if name is None else "author" if name == "author" else "raster"


def swap(reducer: Reducer, *, seed: int | None = None, **steps: str) -> Reducer:
    """``reducer`` with other steps, e.g. ``swap(reducer, select="topk", merge="none")``; "own" leaves a slot as it is.

    A step is a name of ``vistok.host.choices``, or the slug of a recipe that has one of its own there, which is then
    used with the hyper-parameters of its paper. Named steps read the encoder layer ``reducer.layer`` where there is
    one, else the last but one. ``seed`` of random steps: by default that of the recipe, or 0.

    Returns a Swapped, frozen and picklable; ``reducer`` itself where nothing is swapped. Raises ValueError for a
    reducer that is not a chain, a slot or step that does not exist, a score that no step reads, and a step that needs a
    score where there is none.
    """
    recipe = _recipe(reducer)
    if unknown := [slot for slot in steps if slot not in SLOTS]:
        raise ValueError(f"slot: got {unknown[0]!r}, must be {', '.join(SLOTS)}")
    before = dict(reducer.steps) if isinstance(reducer, Swapped) else {}
    chosen = {slot: name for slot in SLOTS if (name := steps.get(slot, before.get(slot, "own"))) != "own"}
    if not chosen:
        return recipe
    if seed is None:
        seed = reducer.seed if isinstance(reducer, Swapped) else getattr(recipe, "seed", 0)
    swapped = Swapped(recipe, tuple(chosen.items()), seed)
    name, readers = _slug(recipe), [step for step in swapped.chain.values() if step.reads_score == "must"]
    if "score" in chosen and not swapped._scored:
        raise ValueError(f"score: got {chosen['score']!r}, but no step of {name} reads a score; swap select too")
    if readers and swapped.chain["score"].plain and "score" not in chosen:
        step = readers[0]
        raise ValueError(f"{step.slot}: got {step.name!r}, which needs a score; {name} has none, swap score too")
    return swapped


def steps_of(reducer: Reducer) -> dict[Slot, Steps]:
    """The step that each slot of ``reducer`` has, and what can take its place by itself.

    Raises ValueError for a reducer that is not a chain.
    """
    recipe = _recipe(reducer)
    swapped = dict(reducer.steps) if isinstance(reducer, Swapped) else {}

    def fits(slot: Slot, name: str) -> bool:
        try:
            swap(reducer, seed=None, **{str(slot): name})
        except ValueError:
            return False
        return True

    out: dict[Slot, Steps] = {}
    for slot in SLOTS:
        now = swapped.get(slot, "own" if _own(recipe, slot) else _PLAIN[slot])
        names = tuple(name for name in _names(recipe, slot) if fits(slot, name))
        out[slot] = Steps(now, names if set(names) - {"own"} else ())
    return out


@dataclass(frozen=True)
class _Step:
    """What runs in a slot of a swapped recipe."""

    slot: Slot
    name: str
    run: Callable[..., Any]
    needs: Mapping[str, LayerSpec]
    reads_score: Literal["no", "may", "must"]
    known: bool
    """Whether it is one of ``vistok.host.choices``."""

    @property
    def plain(self) -> bool:
        """Whether it is what a slot has that a recipe leaves alone."""
        return self.known and self.name == _PLAIN[self.slot]


def _step(recipe: Recipe, slot: Slot, name: str | None, seed: int) -> _Step:
    """The step ``name`` in the ``slot`` of ``recipe``; None: the one that it has."""
    if name is None and _own(recipe, slot):
        return _written(recipe, slot, "own")
    name = _PLAIN[slot] if name is None else name
    if name in CHOICES[slot]:
        choice, layer = CHOICES[slot][name], getattr(recipe, "layer", -2)
        run = partial(choice.run, seed=seed) if choice.seeded else choice.run
        needs = {field: layer if field in LAYERED else None for field in choice.needs}
        return _Step(slot, name, run, needs, choice.reads_score, known=True)
    lenders = _lenders(slot)
    if name not in lenders:
        raise ValueError(f"{slot}: got {name!r}, must be own, {', '.join([*sorted(CHOICES[slot]), *lenders])}")
    return _written(lenders[name], slot, name)


def _written(owner: Recipe, slot: Slot, name: str) -> _Step:
    """The step that ``owner`` wrote for the ``slot``. Where it has a score, its other steps are taken to read it."""
    reads = slot in ("allocate", "select") and _own(owner, "score")
    needs = owner.slot_needs.get(slot, {})
    return _Step(slot, name, getattr(owner, _METHODS[slot]), needs, "must" if reads else "no", known=False)


def _own(recipe: Recipe, slot: Slot) -> bool:
    """Whether its class writes the step."""
    return getattr(type(recipe), _METHODS[slot]) is not getattr(Recipe, _METHODS[slot])


@cache
def _lenders(slot: Slot) -> dict[str, Recipe]:
    """The recipes that wrote a step for the ``slot``, by slug."""
    from vistok import catalogue

    systems = {card.slug: catalogue.create(card.slug) for card in catalogue.methods("reduce") if slot != "order"}
    known = CHOICES[slot]
    return {k: s for k, s in systems.items() if k not in known and isinstance(s, Recipe) and _own(s, slot)}


def _names(recipe: Recipe, slot: Slot) -> list[str]:
    return [*(["own"] if _own(recipe, slot) else []), *sorted(CHOICES[slot]), *_lenders(slot)]


def _recipe(reducer: Reducer) -> Recipe:
    """The recipe itself, no step swapped. ValueError for what is not a chain."""
    if isinstance(reducer, Swapped):
        return reducer.method
    if not isinstance(reducer, Reducer):
        raise ValueError(f"reducer: got {reducer!r}, must be a Reducer, e.g. of vistok.create")
    name, kind = _slug(reducer), type(reducer)
    if isinstance(reducer, Recipe):
        parity = getattr(reducer, "parity", None)
        if (kind.select, kind.compress) != (Recipe.select, Recipe.compress) and parity != "paper":
            how = (
                f"with parity={parity!r}; swap steps of parity='paper'"
                if parity
                else "with its own select() or compress()"
            )
            raise ValueError(f"reducer: {name} is one piece {how}")
        return reducer
    if isinstance(reducer, Wrapper):
        why = "it works through another method, whose steps can be swapped"
    elif kind.at_layer is not Reducer.at_layer:
        why = "it acts inside the language model"
    elif kind.compress is not Reducer.compress:
        why = "it chooses and merges in one step"
    else:
        why = "it chooses in one step"
    raise ValueError(f"reducer: {name} is not a chain of {', '.join(SLOTS)}: {why}")


def _slug(reducer: Reducer) -> str:
    return type(reducer).__module__.rpartition(".")[2].replace("_", "-")


# One field at several layers --------------------------------------------------------------------------------------


def _union(parts: Iterable[Mapping[str, LayerSpec]]) -> dict[str, LayerSpec]:
    """All that the ``parts`` need; a field that they want from different layers is wanted from all of these."""
    out: dict[str, LayerSpec] = {}
    for needs in parts:
        for name, spec in needs.items():
            out[name] = spec if out.get(name, spec) == spec else _both(out[name], spec)
    return out


def _both(a: LayerSpec, b: LayerSpec) -> LayerSpec:
    """The layers of both; all layers where one is a slice, which does not say how many it names."""
    if isinstance(a, slice) or isinstance(b, slice):
        return slice(None)
    layers = [layer for spec in (a, b) for layer in (spec if isinstance(spec, tuple) else (spec,)) if layer is not None]
    return tuple(dict.fromkeys(layers))


def _layers(values: tuple[Any, ...], have: LayerSpec, want: LayerSpec) -> Any:
    """Of a field's ``values`` at the layers ``have`` those at ``want``: a tuple if that names several."""
    if isinstance(have, tuple):
        found = tuple(values[have.index(layer)] for layer in (want if isinstance(want, tuple) else (want,)))
    else:  # all layers
        found = tuple(values[layer] for layer in layers_of(want, len(values)))
    return found if isinstance(want, (slice, tuple)) else found[0]

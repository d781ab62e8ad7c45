"""A patch in words: what became of it under a method, and what the method scored it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from vistok import catalogue
from vistok.bench.measure import DENSE
from vistok.studio.looking import Sight


def fates(sight: Sight, width: int) -> list[str]:
    """What became of each patch; ``width``: patches of a row. Rows, columns and layers count from 1."""
    return [_fate(sight.places, patch, width) for patch in range(sight.places.shape[1])]


def _fate(places: np.ndarray, patch: int, width: int) -> str:
    here = places[:, patch] >= 0
    if not here.any():
        return "dropped before the language model"
    last = np.flatnonzero(here)[-1]
    place, row = int(places[last, patch]), places[last]
    others = int((row == place).sum()) - 1
    if not others:
        said = "kept"
    elif place == patch:
        said = f"kept, {others} merged into it"
    else:
        said = f"merged into row {place // width + 1}, column {place % width + 1}"
    if here.all():
        return said
    first_gone = int(np.flatnonzero(~here)[0])
    if not here[first_gone:].any():
        return f"{said}, gone from layer {first_gone + 1} on"
    return f"{said}, only in layers {_ranges(np.flatnonzero(here) + 1)}"


def _ranges(numbers: np.ndarray) -> str:
    """Numbers in a row as one: "1 to 3, 5" of [1, 2, 3, 5]."""
    starts = [int(numbers[0]), *(int(b) for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(int(a) for a, b in pairwise(numbers) if b != a + 1), int(numbers[-1])]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def scores(sight: Sight) -> list[str]:
    """Score and rank of each patch at each stage of the method, in words; never a score that the method has not."""
    if sight.method == DENSE:
        return ["all tokens stay, none is scored"] * sight.places.shape[1]
    scored = [stage for stage in sight.stages if stage.ranks is not None]
    ordered = [stage for stage in sight.stages if stage.order is not None]
    unscored = f"no score{_mechanism(sight.method)}"
    staged = len(scored) > 1 or any(stage.layer is not None for stage in scored)
    said = []
    for patch in range(sight.places.shape[1]):
        parts = []
        for stage in scored:
            assert stage.ranks is not None and stage.scores is not None
            where = ("before the language model" if stage.layer is None else f"layer {stage.layer + 1}") + ": "
            if stage.ranks[patch]:
                rank = f"{stage.scores[patch]:.3g}, rank {stage.ranks[patch]} of {stage.of[patch]}"
                parts.append((where if staged else "") + rank)
        if not scored:
            parts.append(unscored)
        for stage in ordered:
            assert stage.order is not None
            parts.append(f"chosen as number {stage.order[patch]}" if stage.order[patch] else "not chosen")
        said.append("; ".join(parts) or "not there any more")
    return said


def _mechanism(method: str) -> str:
    """What a method without scores goes by: ", chosen by similarity"; "" for a control, which goes by nothing."""
    mechanism = catalogue.card(method).mechanism
    return f", chosen by {' and '.join(mechanism)}" if mechanism else ""

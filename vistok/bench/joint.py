"""Fewer tokens, fewer bits of the weights and fewer bits of the cache together: what it costs, what it saves, and
whether the losses add up.

The loss of a combination is *additive* where it is the sum of what each part loses by itself. ``interaction`` is the
accuracy above that sum: negative where the parts make each other worse.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .pareto import front
from .statistics import paired_bootstrap
from .summary import PLAIN, SETTING, Rows, by_setting

if TYPE_CHECKING:
    import polars

WHERE = ("model", "precision", "task", "protocol")
NONE = "none"


def combinations(frame: polars.DataFrame, seed: int = 0) -> list[dict[str, Any]]:
    """One row a method, keep, weights and cache, where weights or caches were varied; [] elsewhere.

    ``bytes``: of weights and of one question's cache. ``change``: accuracy above the model as it is, with its 95%
    interval on the same questions; ``interaction`` likewise, for two parts or more, None where a part was not measured
    by itself. ``front``: no other row of the place is as accurate with fewer bytes, or more accurate with as many.
    """
    measured: dict[tuple[Any, ...], dict[tuple[Any, ...], Rows]] = {}
    for key, rows in by_setting(frame).items():
        model, precision, weights, cache, task, protocol, *setting = key
        measured.setdefault((model, precision, task, protocol), {})[weights, cache, *setting] = rows
    found = []
    for place, here in measured.items():
        if len({(weights, cache) for weights, cache, *_ in here}) == 1:
            continue
        plain = here.get((NONE, NONE, *PLAIN), {})
        mine = [_row(here, key, plain, seed) for key in here]
        best = front(mine, "bytes")
        found += [
            {**dict(zip(WHERE, place, strict=True)), **row, "front": any(row is one for one in best)} for row in mine
        ]
    return found


def _row(here: Mapping[tuple[Any, ...], Rows], key: tuple[Any, ...], plain: Rows, seed: int) -> dict[str, Any]:
    weights, cache, *setting = key
    rows = here[key]
    parts = [
        part
        for part in ((weights, NONE, *PLAIN), (NONE, cache, *PLAIN), (NONE, NONE, *setting))
        if part != (NONE, NONE, *PLAIN)
    ]
    alone = [here.get(part, {}) for part in parts]
    right = [bool(row["correct"]) for row in rows.values()]
    return {
        "weights": weights,
        "cache": cache,
        **dict(zip(SETTING, setting, strict=True)),
        "n": len(right),
        "accuracy": sum(right) / len(right),
        "tokens": statistics.fmean(row["tokens_mean"] for row in rows.values()),
        "bytes": statistics.median(row["weight_bytes"] + row["kv_bytes"] for row in rows.values()),
        "ttft_ms": statistics.median(row["ttft_ms"] for row in rows.values()),
        **_estimate("change", [(1, rows), (-1, plain)] if parts else [], seed),
        **_estimate(
            "interaction",
            [(1, rows), *((-1, part) for part in alone), (len(parts) - 1, plain)] if len(parts) > 1 else [],
            seed,
        ),
    }


def _estimate(name: str, terms: list[tuple[int, Rows]], seed: int) -> dict[str, Any]:
    """The mean over the questions that all terms have of the weighted sum of what is right, with its 95% interval."""
    shared = set.intersection(*(set(rows) for _, rows in terms)) if terms else set()
    if not shared:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    sums = [float(sum(sign * bool(rows[key]["correct"]) for sign, rows in terms)) for key in sorted(shared)]
    low, high = paired_bootstrap(sums, [0.0] * len(sums), seed=seed)
    return {name: statistics.fmean(sums), f"{name}_low": low, f"{name}_high": high}

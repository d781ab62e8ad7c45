"""A look as HTML: the kept tokens over the picture, scores and attention as heat."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vistok import catalogue
from vistok.bench.figures import data_url, evidence_path
from vistok.bench.measure import DENSE, Cost, resized
from vistok.host.overlay import palette
from vistok.studio import words
from vistok.studio.html import render
from vistok.studio.looking import SIDE, Failed, Run, Sight, last_places, sizes

DARK = 0.86
"""Opacity of the veil over a patch that no layer was given."""
TINT = 0.5
"""Opacity of a merged group's colour."""
INFERNO = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""The colour map "inferno" of matplotlib at 0, 1/4, ... 1: even in lightness, also for the colour-blind."""


def look_page(run: Run, message: str = "", problem: bool = False) -> str:
    """The right-hand side of the tab Look. ``message``: what stands in its status line instead of the progress."""
    total = len(run.sights) + len(run.waiting) + 1  # the costs are a step too
    return render(
        "look.html",
        run=run,
        cards=[_card(run, number) for number in range(len(run.sights))],
        cells=_cells(run) if run.grid else "",
        region=region(run),
        step=len(run.sights) + run.timed,
        total=total,
        message=message or _progress(run),
        problem=problem,
        **evidence_path(run.case),
    )


def layers_page(run: Run | None) -> str:
    """The tab Layers: where the attention of the run's answers goes, and which tokens were still there."""
    if run is None or not run.seen:
        return render("layers.html", run=None)
    cards: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    for sight in run.seen:
        left = [len(np.unique(row[row >= 0])) for row in sight.places]
        mass = None if sight.attention is None else np.nansum(sight.attention, 1).round(4).tolist()
        cells = None if sight.attention is None else _rounded(sight.attention)
        sprite = frames(sight, run.grid) if run.grid else ""
        cards.append({"sight": sight, "left": left, "mass": mass, "sprite": sprite, "alt": _layers_alt(sight, left)})
        told.append({"name": sight.method, "left": left, "mass": mass, "cells": cells, "places": sight.places.tolist()})
    depth = len(run.seen[0].places)
    return render(
        "layers.html",
        run=run,
        cards=cards,
        depth=depth,
        picture=data_url(resized(run.case.picture, SIDE)),
        region=region(run),
        told=json.dumps({"grid": run.grid, "depth": depth, "methods": told}),
        **evidence_path(run.case),
    )


# One card -------------------------------------------------------------------------------------------------------------


def _card(run: Run, number: int) -> dict[str, Any]:
    sight = run.sights[number]
    if isinstance(sight, Failed):
        return {"method": sight.method, "failed": sight.reason}
    dense = run.seen[0]
    shown = resized(run.case.picture, SIDE) if run.grid else run.overlays[number]
    return {
        "method": sight.method,
        "failed": "",
        "by": chosen_by(sight.method),
        "sight": sight,
        "picture": data_url(shown),
        "veil": png(veil(sight, run.grid)) if run.grid else "",
        "heat": png(heat) if run.grid and (heat := score_heat(sight, run.grid)) is not None else "",
        "alt": _alt(sight, run),
        "costs": _costs(sight, dense, run.tokens),
    }


def _costs(sight: Sight, dense: Sight, tokens: int) -> list[dict[str, Any]]:
    """Rows of a card's figures: name, value, and its share of the dense model's (None: no bar)."""
    kept = f"{sight.tokens_kept:.4g} of {tokens}"
    rows: list[dict[str, Any]] = [{"name": "Tokens", "value": kept, "share": sight.tokens_kept / max(tokens, 1)}]
    names = {"ttft_ms": ("First token", "{:.0f} ms", 1), "flops": ("FLOPs", "{:.2f} G", 1e9)}
    names |= {"kv_bytes": ("KV cache", "{:.0f} kB", 1e3)}
    for field, (name, form, unit) in names.items():
        value, whole = (_of(cost, field) for cost in (sight.cost, dense.cost))
        said = "measuring" if value is None else form.format(value / unit)
        share = None if value is None or not whole else value / whole
        rows.append({"name": name, "value": said, "share": share})
    if sight.recall is not None:
        rows.append({"name": "Evidence kept", "value": f"{sight.recall:.0%}", "share": sight.recall})
    return rows


def _of(cost: Cost | None, field: str) -> float | None:
    return None if cost is None else float(getattr(cost, field))


def chosen_by(method: str) -> str:
    """What decides in a method, in the words of its card."""
    if method == DENSE:
        return "all tokens stay"
    card = catalogue.card(method)
    return card.score or card.select or card.merge or card.title


def _alt(sight: Sight, run: Run) -> str:
    if run.grid is None:
        return f"The picture under {sight.method}: dropped parts are dark."
    return f"The picture under {sight.method}: " + ", ".join(
        f"{count} of {run.tokens} patches {said}" for said, count in _count(sight).items() if count
    )


def _count(sight: Sight) -> dict[str, int]:
    here = sight.places >= 0
    size = sizes(sight.places[0])
    return {
        "kept": int((here.all(0) & (size == 1)).sum()),
        "merged": int((here.all(0) & (size > 1)).sum()),
        "kept in some layers": int((here.any(0) & ~here.all(0)).sum()),
        "dropped": int((~here.any(0)).sum()),
    }


def _layers_alt(sight: Sight, left: Sequence[int]) -> str:
    return f"{sight.method}: tokens left by layer {', '.join(map(str, left))}"


def _progress(run: Run) -> str:
    if run.waiting:
        return f"Asking with {run.waiting[0]} …"
    return "Done." if run.timed else "Measuring time, in turn …"


def region(run: Run) -> tuple[float, float, float, float]:
    """Left, top, width and height of what the model saw of the picture, in per cent."""
    width, height = run.case.picture.size
    if run.fit != "crop":
        return 0, 0, 100, 100
    side = min(width, height)
    across, down = 100 * side / width, 100 * side / height
    return (100 - across) / 2, (100 - down) / 2, across, down


# Colours of the patches -----------------------------------------------------------------------------------------------


def veil(sight: Sight, grid: tuple[int, int]) -> np.ndarray:
    """(h, w, 4) uint8: darker the fewer layers were given a patch; one tint for all patches of a merged group."""
    gone = 1 - (sight.places >= 0).mean(0)
    pixels = np.zeros((len(gone), 4))
    pixels[:, :3], pixels[:, 3] = (8, 9, 14), 255 * DARK * gone
    last = last_places(sight.places)
    merged = (sizes(last) > 1) & (gone < 1)
    order = {place: number for number, place in enumerate(np.unique(last[merged]).tolist())}
    if order:
        colours = palette(len(order))[[order[place] for place in last[merged].tolist()]]
        pixels[merged, :3] = colours * (1 - gone[merged, None])
        pixels[merged, 3] = 255 * np.maximum(TINT, DARK * gone[merged])
    return pixels.reshape(*grid, 4).round().astype(np.uint8)


def score_heat(sight: Sight, grid: tuple[int, int]) -> np.ndarray | None:
    """(h, w, 4) uint8: the rank of each patch where the method first scores, bright is best; None without a score."""
    stage = next((stage for stage in sight.stages if stage.ranks is not None), None)
    if stage is None or stage.ranks is None:
        return None
    share = np.where(stage.ranks > 0, 1 - (stage.ranks - 1) / np.maximum(stage.of - 1, 1), 0)
    return coloured(share, np.where(stage.ranks > 0, 0.8, DARK)).reshape(*grid, 4)


def frames(sight: Sight, grid: tuple[int, int]) -> str:
    """Attention of every layer, one picture below the other: bright is the most of that layer, black is gone."""
    rows = []
    for layer, places in enumerate(sight.places):
        if sight.attention is None:
            share, alpha = np.zeros(len(places)), np.where(places >= 0, 0.0, DARK)
        else:
            weight = np.nan_to_num(sight.attention[layer])
            weight = np.where(places >= 0, weight[np.maximum(places, 0)], 0)  # merged: that of its slot
            share = weight / max(float(weight.max()), 1e-12)
            alpha = np.where(places >= 0, 0.25 + 0.6 * share, DARK + 0.08)
        colours = coloured(share, alpha)
        colours[places < 0, :3] = (8, 9, 14)
        rows.append(colours.reshape(*grid, 4))
    return png(np.concatenate(rows))


def coloured(share: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(N, 4) uint8: ``share`` in [0, 1] on the colour map, with ``alpha`` in [0, 1]."""
    at = np.linspace(0, 1, len(INFERNO))
    rgb = np.stack([np.interp(share, at, [colour[channel] for colour in INFERNO]) for channel in range(3)], 1)
    return np.concatenate([rgb, 255 * alpha[:, None]], 1).round().clip(0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> str:
    """A data URL of (h, w, 4) uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# What the page's script shows ---------------------------------------------------------------------------------------


def _cells(run: Run) -> str:
    """What the page's script shows of each patch, as JSON."""
    assert run.grid is not None
    methods = [
        {
            "name": sight.method,
            "fate": words.fates(sight, run.grid[1]),
            "score": words.scores(sight),
            "place": last_places(sight.places).tolist(),
        }
        for sight in run.seen
    ]
    return json.dumps({"grid": run.grid, "methods": methods})


def _rounded(attention: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(x) else round(float(x), 5) for x in row] for row in attention]

"""The tab Compare: curves of a sweep's folder, filters, and the pictures of the point that is clicked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from vistok.studio import results
from vistok.studio.html import asset, render
from vistok.studio.results import Results, Where
from vistok.studio.state import Studio

COST = {"tokens": "tokens", "time": "ttft_ms"}
ALL = "all kinds"
NO_CELL = "No cell of this model, task and way of asking has been measured."
NOT_TIMED = "Times were not measured here."
CHOOSE = (
    "Choose a point of the curves: here come its figures, and some of its questions with what was kept of the picture."
)


class Folder:
    """The results of a sweep's folder, read again where its files have changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._read: tuple[tuple[Any, ...], Results] | None = None

    def results(self) -> Results:
        """Raises ValueError where the folder holds none."""
        with self._lock:
            # Files come by renaming, which the folder's own time tells; a driver may be at work in it.
            places = [self.path / kind for kind in ("rows", "packs")]
            stamp = tuple(place.stat().st_mtime_ns for place in places if place.is_dir())
            if self._read is None or self._read[0] != stamp:
                self._read = (stamp, Results.read(self.path))
            return self._read[1]

    def held(self) -> Results:
        """As they were last read, so that a choice of the page is looked up in what the page shows."""
        return self._read[1] if self._read else self.results()


def plot(found: Results, where: Where, mechanisms: Sequence[str], cost: str) -> str:
    """The HTML of the curves and tables."""
    rows = results.with_mechanisms(found.rows(where), mechanisms)
    drawn = results.curves(rows, COST[cost])
    if drawn is None:
        return render("hint.html", text=NOT_TIMED if rows else NO_CELL)
    return render("curves.html", c=drawn, title=_title(where))


def point(found: Results, where: Where, key: str) -> str:
    """The HTML of one point with its pictures. A key that is none of the place's gives the hint."""
    row = next((row for row in found.rows(where) if row["key"] == key), None)
    if row is None:
        return render("hint.html", text=CHOOSE)
    return render("point.html", p=results.point(row), pictures=found.pictures(where, key), title=_title(where))


def how(problem: str = "") -> str:
    """The HTML that says how to make results."""
    return render("how.html", problem=problem)


def _title(where: Where) -> str:
    asked = "" if where.protocol == "single" else where.protocol
    return ", ".join(filter(None, (where.model, where.task, asked, where.family)))


def _where(model: str, task: str, protocol: str, family: str) -> Where:
    """What the lists of the page say."""
    return Where(model, task, protocol, "" if family == ALL else family)


def build(studio: Studio) -> None:
    """The tab, within a ``gr.Tab``."""
    plain: dict[str, Any] = {"css_template": asset("tabs.css", "compare.css"), "apply_default_css": False}
    absent = gr.HTML(how(), visible=studio.results is None, **plain)
    if studio.results is None:
        return
    folder = Folder(studio.results)
    with gr.Column(visible=False) as present:
        with gr.Row():
            model = gr.Dropdown([], label="Model", visible=False, min_width=150)
            task = gr.Dropdown([], label="Task", min_width=150)
            protocol = gr.Dropdown([], label="Asked", visible=False, min_width=150)
            family = gr.Dropdown([], label="Kind of question", min_width=150)
            cost = gr.Radio(list(COST), value="tokens", label="Against", min_width=150)
            mechanisms = gr.CheckboxGroup([], label="Methods that go by", min_width=300)
        with gr.Row():
            with gr.Column(scale=6, min_width=320):
                curves = gr.HTML(js_on_load=asset("compare.js"), elem_id="compare-curves", **plain)
            with gr.Column(scale=5, min_width=320):
                hint = render("hint.html", text=CHOOSE)
                detail = gr.HTML(hint, js_on_load=asset("detail.js"), elem_id="compare-point", **plain)
    filters: list[Any] = [model, task, protocol, family]

    def read() -> list[Any]:
        try:
            found = folder.results()
        except (OSError, ValueError) as error:
            return [gr.update(value=how(str(error)), visible=True), gr.update(visible=False), *[gr.skip()] * 6]
        models, tasks, protocols = found.models(), found.values("task"), found.values("protocol")
        ways = found.mechanisms()
        return [
            gr.update(visible=False),
            gr.update(visible=True),
            _dropdown(models, visible=len(models) > 1),
            _dropdown(tasks),
            _dropdown(protocols, visible=len(protocols) > 1),
            _dropdown([ALL, *found.values("family")]),
            gr.update(choices=ways, value=ways),
            plot(found, Where(_first(models), _first(tasks), _first(protocols)), ways, "tokens"),
        ]

    def redraw(model: str, task: str, protocol: str, family: str, mechanisms: list[str], cost: str) -> tuple[str, str]:
        return plot(folder.held(), _where(model, task, protocol, family), mechanisms, cost), hint

    def show(model: str, task: str, protocol: str, family: str, event: gr.EventData) -> str:
        return point(folder.held(), _where(model, task, protocol, family), str(event.key))

    last: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "minimal", "api_visibility": "private"}
    loaded = [absent, present, *filters, mechanisms, curves]
    gr.on(None, read, None, loaded, show_progress="hidden", api_visibility="private")
    chosen = [*filters, mechanisms, cost]
    gr.on([one.input for one in chosen], redraw, chosen, [curves, detail], **last)
    curves.select(show, filters, detail, **last)


def _dropdown(values: list[str], visible: bool = True) -> Any:
    """A list to choose from."""
    return gr.update(choices=values, value=_first(values), visible=visible)


def _first(values: list[str]) -> str:
    """What is chosen at first."""
    return "single" if "single" in values else values[0]

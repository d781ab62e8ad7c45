"""The tab Catalogue: the systems by family, site and mechanism, each with its card and a trial of its claim."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from vistok import catalogue
from vistok.studio import cards, trial
from vistok.studio.html import asset
from vistok.studio.state import Studio

ALL = "all"
IDLE = "Measures the claim on this machine, with and without the system: seconds to minutes."
FILTERS = ("family", "site", "mechanism")


def build(studio: Studio) -> None:
    """The tab, within a ``gr.Tab``."""
    css, first = asset("tabs.css", "catalogue.css"), catalogue.names()[0]
    given = cards.choices()
    chosen, running = gr.State(first), gr.State("")
    plain: dict[str, Any] = {"css_template": css, "apply_default_css": False}
    with gr.Row():
        words = gr.Textbox(label="Search", placeholder="name, paper, place, claim", min_width=200, scale=2)
        filters = [gr.Dropdown([ALL, *given[tag]], value=ALL, label=tag.capitalize(), min_width=130) for tag in FILTERS]
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            every = cards.listing(catalogue.systems(), first)
            listed = gr.HTML(every, js_on_load=asset("catalogue.js"), elem_id="catalogue-list", **plain)
        with gr.Column(scale=7, min_width=300):
            head = gr.HTML(cards.head(first), js_on_load=asset("detail.js"), elem_id="catalogue-head", **plain)
            with gr.Row():
                begin = gr.Button(_label(first), variant="primary", elem_id="catalogue-try", min_width=140)
                cancel = gr.Button("Cancel", interactive=False, elem_id="catalogue-cancel", min_width=100)
            log = gr.HTML(trial.panel("", IDLE), elem_id="catalogue-trial", **plain)
            details = gr.HTML(cards.details(first), elem_id="catalogue-card", **plain)

    def search(words: str, family: str, site: str, mechanism: str, chosen: str) -> str:
        asked = ("" if value == ALL else value for value in (family, site, mechanism))
        return cards.listing(cards.find(words, *asked), chosen)

    def choose(event: gr.EventData) -> tuple[str, str, str, str]:
        slug = catalogue.card(str(event.slug)).slug  # of the page, so it may be anything
        return slug, cards.head(slug), cards.details(slug), _label(slug)

    def wait(slug: str) -> list[Any]:
        return [trial.panel("runs", f"{slug} waits for its turn: one trial at a time"), slug, *_buttons(busy=True)]

    async def measure(slug: str) -> AsyncIterator[list[Any]]:
        async for how in trial.follow(trial.command(slug, studio.seed)):
            busy = how.code is None
            yield [trial.told(slug, studio.seed, how), slug if busy else "", *_buttons(busy)]

    def stopped(slug: str) -> list[Any]:
        return [trial.panel("", f"{slug}: cancelled"), "", *_buttons(busy=False)]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on(
        [words.change, *(one.input for one in filters)], search, [words, *filters, chosen], listed,
        trigger_mode="always_last", **quiet,
    )  # fmt: skip
    listed.select(choose, None, [chosen, head, details, begin], **quiet)
    shown = [log, running, begin, cancel]
    # One at a time on this machine, whoever asks: times are measured too.
    run = begin.click(wait, chosen, shown, queue=False, **quiet).then(
        measure, running, shown, concurrency_limit=1, concurrency_id="vistok-try", **quiet
    )
    cancel.click(stopped, running, shown, cancels=[run], queue=False, **quiet)


def _label(slug: str) -> str:
    return f"Try {slug}"


def _buttons(busy: bool) -> list[Any]:
    """Of the two, the one to begin and the one to cancel, what can be pressed."""
    return [gr.update(interactive=not busy), gr.update(interactive=busy)]

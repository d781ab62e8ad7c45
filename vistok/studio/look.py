"""The tab Look: a picture, a question, methods and a budget; side by side what each method made of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vistok import catalogue
from vistok.bench.pictures import Unusable, open_picture
from vistok.studio import link, looking, samples
from vistok.studio.drawing import look_page
from vistok.studio.html import asset, render
from vistok.studio.sessions import Stopped
from vistok.studio.state import Studio
from vistok.world import TASKS
from vistok.zoo import ModelNotFound, shipped

if TYPE_CHECKING:
    from PIL import Image

LARGEST_PIXELS = 25_000_000
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
LINK_LABEL = "Link to this look"
OWN_LABEL = "Link to this look, without your own picture: a link cannot hold it"
PICTURE = "<p class='studio-label'>Picture <span>a sample, a drawn one, or drop your own below</span></p>"


def build(studio: Studio) -> None:
    """Fill the tab."""
    start = link.first(studio.models)
    names = gr.State(start.picture)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            gr.HTML(PICTURE, apply_default_css=False)
            gallery = gr.Gallery(
                [(case.picture, _caption(name)) for name, case in samples.samples().items()],
                label="Samples", show_label=False, columns=3, allow_preview=False, object_fit="cover", container=False,
                interactive=False, buttons=[], elem_id="look-gallery", format="png",
            )  # fmt: skip
            with gr.Row(elem_id="look-world"):
                task = gr.Dropdown(
                    [(f"World: {name}", name) for name in TASKS], value=TASKS[0], label="World", show_label=False,
                    container=False, min_width=150, scale=2,
                )  # fmt: skip
                draw = gr.Button("Draw one", min_width=100, scale=1, size="md")
            image = gr.Image(
                label="Picture", show_label=False, type="filepath", sources=["upload", "clipboard"], height=230,
                buttons=[], elem_id="look-picture", format="png", alt_text="The picture that is asked about",
            )  # fmt: skip
            known = gr.Dropdown(
                [], label="Questions whose answer is known", value=None, elem_id="look-known", interactive=True
            )
            question = gr.Textbox(
                start.question, label="Question", lines=1, max_lines=4, max_length=link.LONGEST, elem_id="look-question"
            )
            methods = gr.Dropdown(
                [card.slug for card in catalogue.methods("reduce")], value=list(start.methods), multiselect=True,
                max_choices=link.MOST_METHODS, label=f"Methods, up to {link.MOST_METHODS}", elem_id="look-methods",
            )  # fmt: skip
            keep = gr.Slider(
                1, 100, value=100 * start.keep, step=1, label="Keep, % of the visual tokens", elem_id="look-keep"
            )
            model = gr.Dropdown(list(studio.models), value=start.model, label="Model", visible=len(studio.models) > 1)
            with gr.Row():
                ask = gr.Button("Look", variant="primary", min_width=120, elem_id="look-ask")
                halt = gr.Button("Stop", variant="stop", interactive=False, min_width=90, elem_id="look-stop")
        with gr.Column(scale=3, min_width=320, elem_id="look-out"):
            view = gr.Radio(
                [("Kept tokens", "kept"), ("Score", "score"), ("Picture", "picture")],
                value="kept", label="Show over the picture", elem_id="look-view",
            )  # fmt: skip
            shown = gr.HTML(css_template=asset("tabs.css", "look.css"), apply_default_css=False, elem_id="look-shown")
            address = gr.Textbox(
                label=LINK_LABEL, interactive=False, buttons=["copy"], elem_id="look-link", max_lines=1
            )
    settings = [names, question, model, methods, keep]
    picture_parts = [names, image, question, known]

    def look(
        name: str, asked: str, model: str, methods: list[str], percent: float, file: str | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Cards one after the other, the query of the link (the page makes an address of it), and which buttons can be
        pressed."""
        page = studio.sessions.page(request.session_hash)
        stop = page.begin()
        page.run = None
        wanted = link.Look(model, name, asked, tuple(methods[: link.MOST_METHODS]), percent / 100)
        address = gr.Textbox(link.write(wanted), label=LINK_LABEL if name != samples.OWN else OWN_LABEL)
        busy = (gr.Button(interactive=False), gr.Button(interactive=True))
        idle = (gr.Button(interactive=True), gr.Button(interactive=False))
        try:
            case = samples.case(name, _opened(file) if name == samples.OWN else None, asked)
            yield (_message(f"Getting {model} …", busy=True), gr.skip(), *busy)
            loaded = studio.models[model]
            for run in looking.look(loaded, model, case, wanted.methods, wanted.keep, studio.seed, stop):
                stop.check()
                page.run = run
                yield (look_page(run), address if run.done else gr.skip(), *(idle if run.done else busy))
        except Stopped:
            if page.stop is stop:  # else the page shows newer work already
                yield (_stopped(page.run), gr.skip(), *idle)
        except (Unusable, ModelNotFound, ValueError) as error:
            yield (_message(_sentence(error), problem=True), gr.skip(), *idle)

    def halted(request: gr.Request) -> tuple[Any, ...]:
        page = studio.sessions.page(request.session_hash)
        page.stop.set()
        return _stopped(page.run), gr.Button(interactive=True), gr.Button(interactive=False)

    def restore(request: gr.Request) -> tuple[Any, ...]:
        """The look of the address; what could not be had is said."""
        look, wrong = link.read(dict(request.query_params), studio.models)
        for sentence in wrong:
            gr.Warning(sentence, duration=12)
        return (*_chosen(look.picture, look.question), look.model, list(look.methods), 100 * look.keep)

    def greet(
        name: str, asked: str, model: str, methods: list[str], percent: float, file: str | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """What the address asks for, at once; a page that asks for nothing begins by itself where that is quick."""
        if request.query_params.get("question") or model in shipped():
            yield from look(name, asked, model, methods, percent, file, request)
        else:
            yield (_message("Choose a picture, ask something, then press Look."), *[gr.skip()] * 3)

    outputs = [shown, address, ask, halt]
    compute: dict[str, Any] = {"concurrency_id": "look", "concurrency_limit": 8, **HIDDEN}
    restored = gr.on(None, restore, None, [*picture_parts, model, methods, keep], **HIDDEN)
    greeted = restored.then(greet, [*settings, image], outputs, **compute)
    # "multiple": while the page still takes leave of what was stopped, the next question must not be lost.
    asked = gr.on([ask.click, question.submit], look, [*settings, image], outputs, trigger_mode="multiple", **compute)
    for ended in (greeted, asked):
        ended.then(None, address, address, js=LINK, **HIDDEN)
    gr.on([ask.click, question.submit], None, js=SCROLL, **HIDDEN)
    halt.click(halted, None, [shown, ask, halt], cancels=[greeted, asked], queue=False, **HIDDEN)

    gallery.select(_picked, None, picture_parts, **HIDDEN)
    draw.click(_drawn, task, picture_parts, **HIDDEN)
    changed = [image.upload, image.input, image.clear]
    gr.on(changed, lambda: (samples.OWN, gr.Dropdown(choices=[], value=None)), None, [names, known], **HIDDEN)
    known.input(lambda chosen: chosen or gr.skip(), known, question, **HIDDEN)
    view.change(None, view, None, js=VIEW, **HIDDEN)


LINK = """(query) => {
  if (!query || query.includes("://")) return query;
  history.replaceState(null, "", `?${query}`);
  return `${location.origin}${location.pathname}?${query}`;
}"""
SCROLL = "() => { if (innerWidth < 700) document.getElementById('look-out').scrollIntoView({ block: 'start' }); }"
VIEW = "(view) => { document.getElementById('look-out').dataset.view = view; }"


def _caption(name: str) -> str:
    """What stands under a sample: "scenes 28" of "world:scenes:28"."""
    return " ".join(name.split(":")[1:])


def _picked(event: gr.SelectData) -> tuple[Any, ...]:
    name, case = list(samples.samples().items())[event.index]
    return _chosen(name, case.question)


def _drawn(task: str) -> tuple[Any, ...]:
    name = f"world:{task}:{random.randrange(100_000)}"
    return _chosen(name, samples.picture(name)[1][0].text)


def _chosen(name: str, question: str) -> tuple[Any, ...]:
    """The name, the picture, the question, and what else can be asked."""
    picture, known = samples.picture(name)
    texts = [one.text for one in known]
    chosen = question if question in texts else None
    return name, _enlarged(picture), question, gr.Dropdown(choices=texts, value=chosen, visible=bool(texts))


def _enlarged(picture: Image.Image) -> Image.Image:
    from vistok.bench.measure import resized

    return resized(picture, looking.SIDE)


def _opened(file: str | None) -> Image.Image | None:
    """Somebody's own picture. Raises Unusable, calling it "picture": the page knows it by no other name."""
    if file is None:
        return None
    try:
        return open_picture(Path(file), LARGEST_PIXELS)
    except Unusable as error:
        raise Unusable("picture", error.right) from error


def _stopped(run: looking.Run | None) -> str:
    if run is None:
        return _message("Stopped.")
    return look_page(run, "Stopped." if not run.done else "", problem=not run.done)


def _message(message: str, *, problem: bool = False, busy: bool = False) -> str:
    return render("message.html", message=message, problem=problem, busy=busy)


def _sentence(error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."

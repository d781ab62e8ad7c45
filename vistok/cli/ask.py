"""``vistok ask``: one question about one picture, with a method and without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli.console import Json, Seed, UserError, console, show_rows
from vistok.cli.options import Model, create, load_model, parse_keep, parse_methods
from vistok.cli.pictures import open_picture, world_picture

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vistok.bench.measure import Case

COLUMNS = {
    "method": "method",
    "answer": "answer",
    "right": "",
    "tokens": "tokens",
    "ttft_ms": "first token, ms",
    "gflops": "GFLOPs",
    "kv_kb": "KV cache, kB",
}
ANSWER_TOKENS = 64

Picture = Annotated[
    str,
    typer.Argument(metavar="PICTURE", help="A picture file, or world:TASK:NUMBER for a drawn one (world:scenes:3)."),
]


def ask(
    picture: Picture,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="What to ask.")] = None,
    model: Model = "vistok-tiny",
    method: Annotated[str, typer.Option("--method", help="A reducer, a+b for several, or dense.")] = "holov",
    keep: Annotated[str, typer.Option("--keep", help="Tokens to keep: a count (64) or a share (0.25, 25%).")] = "0.25",
    overlay: Annotated[Path | None, typer.Option("--overlay", help="Write the kept tokens over the picture.")] = None,
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Ask a picture a question: the answer, tokens, time and FLOPs with a method and without it."""
    share = parse_keep(keep)
    name = one_method(method)
    if overlay is not None:
        check_image_path(overlay)
    case = read_case(picture, question)
    loaded, processor = load_model(model)
    check_question(loaded, processor, case)
    from vistok.bench.compare import OVERLAY_SIDE, compare_cases, settings_of

    settings = settings_of([create(name, seed)], [share])
    side = max(OVERLAY_SIDE, *case.picture.size)
    found = compare_cases(loaded, processor, settings, [case], max_new_tokens=ANSWER_TOKENS, overlay_side=side)
    rows = found.rows if as_json else [in_words(row) for row in found.rows]
    print_question(case)
    show_rows(rows, COLUMNS, as_json=as_json)
    if overlay is not None:
        drawn = found.looks[0][-1].answered.overlay
        if drawn is not None:
            write_image(drawn, overlay)
            console().print(f"{overlay}", markup=False)


def one_method(text: str, argument: str = "--method") -> str:
    """The one method that ``text`` names. Raises UserError."""
    names = [text] if text.strip() == "all" else parse_methods(text, argument)
    if len(names) > 1 or names == ["all"]:
        raise UserError(argument, text, "must be one method; `vistok compare` takes several")
    return names[0]


def read_case(picture: str, question: str | None) -> Case:
    """What is asked; with its truth where the picture is the world's and the question one of its own."""
    drawn = world_picture(picture)
    if drawn is None:
        image = open_picture(picture)
        if not question or not question.strip():
            raise UserError("QUESTION", "nothing", "must be a question about the picture")
        from vistok.bench.measure import Case

        return Case(image, question, name=Path(picture).name)
    from vistok.bench.measure import Case

    known = {q.text.casefold(): q for q in drawn.questions}
    truth = drawn.questions[0] if question is None else known.get(question.strip().casefold())
    asked = question if truth is None else truth.text
    if not asked or not asked.strip():
        raise UserError("QUESTION", "nothing", "must be a question about the picture")
    return Case(drawn.pil(), asked, truth, picture)


def check_question(model: PreTrainedModel, processor: ProcessorMixin, case: Case) -> None:
    """Raises UserError for a question that would itself be read as a picture."""
    from vistok.zoo.asking import picture_token

    token = picture_token(model, processor)
    if token is not None and token in processor.tokenizer.tokenize(case.question):
        raise UserError("QUESTION", case.question, f"must not contain {token}, which stands for a picture")


def print_question(case: Case, number: int | None = None) -> None:
    """What is asked, and the right answer where it is known."""
    truth = f" ({case.truth.answer})" if case.truth else ""
    start = "" if number is None else f"{number} "
    console().print(f"{start}{case.name}: {case.question}{truth}", markup=False)


def in_words(row: dict[str, Any]) -> dict[str, Any]:
    """A JSON row as the table prints it."""
    kept = f"{row['tokens_kept']:.4g} of {row['tokens_in']:.4g}"
    right = {None: "", True: "right", False: "wrong"}[row.get("correct")]
    costs = {
        "gflops": short(row["flops"] / 1e9),
        "kv_kb": short(row["kv_bytes"] / 1e3),
        "ttft_ms": round(row["ttft_ms"], 1),
    }
    return {**row, **costs, "tokens": kept, "right": right, "keep": "" if row["method"] == "dense" else row["keep"]}


def short(value: float) -> float:
    """Three digits are enough to compare."""
    return float(f"{value:.3g}")


def check_image_path(path: Path, argument: str = "--overlay") -> None:
    """Raises UserError where a picture cannot be written to ``path``."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(argument, path, "must end in .png, .jpg or .webp")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(argument, path, "must be a file in a folder that exists")


def write_image(image: Any, path: Path) -> None:
    """Write ``image`` in the format of the path's ending, whole or not at all."""
    import io

    from vistok.bench.report import replace_file

    buffer = io.BytesIO()
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
    image.save(buffer, kind)
    replace_file(path, buffer.getvalue())

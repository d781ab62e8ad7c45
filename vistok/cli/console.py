"""What every command keeps to: where output goes, how rows are printed, and how errors look.

With ``--json`` standard output carries one JSON object a line and nothing else; whatever else a command or a library
prints goes to standard error. A mistake of the user gives one line on standard error and exit code 2; ``--debug``
shows the traceback. Anything else is a defect: it gives a traceback and exit code 1.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class UserError(Exception):
    """Something the user can put right: ``argument``, what it ``got``, and what would be ``right``.

    >>> str(UserError("--keep", -3, "must be at least 1"))
    '--keep: got -3, must be at least 1'
    """

    def __init__(self, argument: str, got: object, right: str) -> None:
        super().__init__(f"{argument}: got {got if isinstance(got, str | Path) else repr(got)}, {right}")
        self.argument = argument


# Output ---------------------------------------------------------------------------------------------------------------


class _Aside(io.TextIOBase):
    """Stands in for ``sys.stdout`` under ``--json``: prints go to standard error, ``emit`` writes to ``rows``."""

    def __init__(self, rows: TextIO) -> None:
        self.rows = rows

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


def _give_rows_the_stream(context: typer.Context, value: bool) -> bool:
    if value and not context.resilient_parsing:
        context.with_resource(redirect_stdout(_Aside(sys.stdout)))
    return value


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_give_rows_the_stream,
        help="Print one JSON object a line on standard output, everything else on standard error.",
    ),
]
"""Type of a command's ``as_json`` parameter: ``def command(..., as_json: Json = False)``."""

Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything that is random.")]
"""Type of a command's ``seed`` parameter: ``def command(..., seed: Seed = 0)``."""


def emit(row: Mapping[str, Any]) -> None:
    """Print ``row`` as one line of JSON on standard output. Numbers that JSON does not have (nan, inf) become null."""
    stream = sys.stdout.rows if isinstance(sys.stdout, _Aside) else sys.stdout
    stream.write(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def _plain(value: Any) -> Any:
    """``value`` in terms of JSON: tensors and arrays become lists, paths strings, dataclasses objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def console(stderr: bool = False) -> Console:
    """A rich console on standard output (standard error under ``--json``), or on standard error."""
    from rich.console import Console

    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False)


def progress() -> Progress:
    """A progress bar on standard error that leaves no trace: ``with progress() as bar: bar.track(rows, ...)``."""
    from rich.progress import Progress

    return Progress(console=console(stderr=True), transient=True)


def show_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str] | Mapping[str, str],
    *,
    as_json: bool = False,
    title: str | None = None,
) -> None:
    """Print ``rows`` as a table of ``columns`` (keys, or key -> heading), or whole as JSON lines.

    Numbers stand to the right; floats have four digits; None and "" are left blank.
    """
    if as_json:
        for row in rows:
            emit(row)
        return
    from rich import box
    from rich.table import Table

    headings = columns if isinstance(columns, Mapping) else {key: key for key in columns}
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    listed = list(rows)
    for key, heading in headings.items():
        numeric = any(isinstance(row.get(key), int | float) for row in listed)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in listed:
        table.add_row(*(_cell(row.get(key)) for key in headings))
    console().print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


# Errors ---------------------------------------------------------------------------------------------------------------


def report(error: BaseException, *, debug: bool = False) -> int:
    """Say what went wrong on standard error; the exit code: 2 for a mistake of the user, 1 for a defect of ours."""
    message = _explanation(error)
    if debug or message is None:
        traceback.print_exception(error)
    if message is None:
        return 1
    print(f"error: {message}", file=sys.stderr)
    return 2


def _explanation(error: BaseException) -> str | None:
    """One line for a mistake of the user, None for what is a defect."""
    if hasattr(error, "format_message"):  # the command line does not parse: wrong option, missing argument
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        return _one_line(error.format_message()) + hint
    if isinstance(error, typer.Abort):  # what typer makes of an EOFError
        return "unexpected end of input"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if type(error) in (KeyError, IndexError):
        return None
    if isinstance(error, UserError | ValueError | LookupError | OSError) or _is_picture_error(error):
        return _one_line(str(error)) or type(error).__name__
    return None


def _is_picture_error(error: BaseException) -> bool:
    """Whether Pillow refused a file; asked by name, since a command without a picture does not import Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(error, pillow.DecompressionBombError | pillow.UnidentifiedImageError)


def _one_line(text: str) -> str:
    return " ".join(text.split())

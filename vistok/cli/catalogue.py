"""``vistok systems`` and ``vistok show``: the catalogue in the terminal, without importing torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from vistok import catalogue
from vistok.cli.console import Json, console, emit, show_rows


def systems(
    family: Annotated[str | None, typer.Option("--family", help="Only this family, e.g. reduce.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only this kind, e.g. training-free.")] = None,
    mechanism: Annotated[str | None, typer.Option("--mechanism", help="Only with this one, e.g. attention.")] = None,
    modality: Annotated[str | None, typer.Option("--modality", help="Only those made for it, e.g. video.")] = None,
    by: Annotated[str | None, typer.Option("--by", help="As a map by family, kind, mechanism or modality.")] = None,
    as_json: Json = False,
) -> None:
    """List the systems that are implemented, or map them by what decides which tokens stay."""
    cards = catalogue.query(family=family, kind=kind, mechanism=mechanism, modality=modality)
    if by is not None:
        _show_map(cards, by, as_json)
        return
    rows = [asdict(card) for card in cards]
    columns = ["slug", "title", "family", "kind", "site", "claim"]
    if as_json:
        show_rows(rows, columns, as_json=True)
        return
    show_rows(_fitted(rows, columns, cut=("title", "site", "claim"), width=console().width), columns)
    counted = "1 system" if len(rows) == 1 else f"{len(rows)} systems"
    console().print(f"{counted}; `vistok show SLUG` tells more, `vistok try SLUG` measures the claim.")


def _show_map(cards: list[catalogue.Card], by: str, as_json: bool) -> None:
    """One row a value of ``by``, one column a modality (a kind where it is by modality); "-" marks a gap."""
    if by not in catalogue.TAGS:
        raise ValueError(f"by: got {by!r}, must be one of {', '.join(catalogue.TAGS)}")
    columns = "kind" if by == "modality" else "modality"
    cells = catalogue.grid(cards, by, columns)
    rows: list[dict[str, Any]] = [{by: row, **found} for row, found in cells.items()]
    if as_json:
        show_rows(rows, [by, *catalogue.TAGS[columns]], as_json=True)
        return
    shown = [column for column in catalogue.TAGS[columns] if any(found[column] for found in cells.values())]
    show_rows(
        [{by: row, **{c: ", ".join(found[c]) or "-" for c in shown}} for row, found in cells.items()], [by, *shown]
    )


def _fitted(rows: list[dict[str, Any]], columns: Sequence[str], cut: Sequence[str], width: int) -> list[dict[str, str]]:
    """``rows`` with the columns ``cut`` shortened so that each row fits a line (to no less than 16 characters)."""
    whole = sum(max([len(c), *(len(row[c]) for row in rows)]) for c in columns if c not in cut)
    room = max(16, (width - whole - 3 * len(columns)) // len(cut))  # 3: a column's padding and separator
    return [{c: _shorten(row[c], room) if c in cut else row[c] for c in columns} for row in rows]


def show(
    slug: Annotated[str, typer.Argument(help="A system's name, as `vistok systems` lists it.")],
    as_json: Json = False,
) -> None:
    """Show a system's card: where it comes from, what it does, its hyper-parameters and its claim."""
    card = catalogue.card(slug)
    hyper = catalogue.hyper_of(slug)
    if as_json:
        parameters = [asdict(parameter) for parameter in hyper]
        emit({**asdict(card), "module": catalogue.module_of(slug), "parameters": parameters})
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    recipe = [(slot, getattr(card, slot)) for slot in ("score", "allocate", "select", "merge")]
    lines: list[tuple[str, str]] = [
        ("kind", f"{card.kind}, family {card.family}"),
        ("site", card.site),
        ("paper", card.paper),
        ("authors' code", card.repository),
        ("module", catalogue.module_of(slug)),
        ("modality", card.modality),
        ("mechanism", ", ".join(card.mechanism)),
        ("needs", ", ".join(card.needs)),
        *recipe,
        ("claim", card.claim),
        *((f"departure {i}" if len(card.departures) > 1 else "departure", d) for i, d in enumerate(card.departures, 1)),
    ]
    for name, value in lines:
        if value:
            grid.add_row(Text(name, style="bold"), Text(value))
    out = console()
    out.print(Text(f"{card.slug}: {card.title}", style="bold"))
    out.print(grid)
    if hyper:
        rows: list[dict[str, Any]] = [{**asdict(h), "default": repr(h.default)} for h in hyper]
        columns = {"name": "hyper-parameter", "type": "type", "default": "default", "description": ""}
        show_rows(rows, columns)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rsplit(" ", 1)[0] + "…"

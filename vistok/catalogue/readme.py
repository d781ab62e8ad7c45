"""Writes the table of systems into README.md: ``python -m vistok.catalogue.readme`` (``--check``: only compare)."""

from __future__ import annotations

import sys
from pathlib import Path

from vistok.catalogue.card import Card
from vistok.catalogue.registry import FAMILIES, systems

_HEAD = ("| system | what | where it acts | source |", "|---|---|---|---|")
BEGIN, END = "<!-- systems:begin -->", "<!-- systems:end -->"


def table(cards: list[Card]) -> str:
    """Markdown: a heading and a table for each family that has systems."""
    parts = []
    for family in FAMILIES:
        rows = [card for card in cards if card.family == family]
        if rows:
            parts.append("\n".join([f"**{family}** ({len(rows)})", "", *_HEAD, *map(_row, rows)]))
    return "\n\n".join(parts)


def _row(card: Card) -> str:
    path = f"vistok/{card.family}/{card.slug.replace('-', '_')}.py"
    code = f"[{card.repository}](https://github.com/{card.repository})" if card.repository else ""
    source = ", ".join(part for part in (card.paper, code) if part) or card.kind
    cells = (f"[`{card.slug}`]({path})", card.title, card.site, source)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def renewed(text: str, cards: list[Card]) -> str:
    """``text`` with the table between the markers made anew. Raises ValueError if a marker is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: must hold the lines {BEGIN} and {END}, between which the table stands")
    return f"{before}{BEGIN}\n{table(cards)}\n{END}{after}"


def main(arguments: list[str], path: Path = Path("README.md")) -> int:
    """Renew the table in the README of the working directory; with ``--check``, 1 if it is out of date."""
    text = path.read_text(encoding="utf-8")
    new = renewed(text, systems())
    if "--check" in arguments:
        if new != text:
            print(f"{path}: the table of systems is out of date, run `make readme`", file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

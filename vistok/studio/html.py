"""Templates, styles and scripts of the studio: the files of ``templates/``. All that a template shows is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vistok.bench.report import template

FOLDER = Path(__file__).parent / "templates"


def render(name: str, **shown: Any) -> str:
    """The HTML of a template (it may import those of ``vistok.bench``) with the names of ``shown``."""
    return template(name, FOLDER).render(**shown)


def asset(*names: str) -> str:
    """The text of style sheets or scripts, one after the other."""
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)

"""The link to a look: picture, question, model, methods and budget in the query of the address."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from vistok import catalogue
from vistok.bench.pictures import Unusable
from vistok.studio.samples import OWN, picture, samples

METHODS = ("fastervlm", "divprune", "visionzip", "pyramiddrop")
"""Shown at first: by attention, by diversity, one that merges, one that drops inside the language model."""
MOST_METHODS = 6
LONGEST = 300
"""Characters of a question."""


@dataclass(frozen=True)
class Look:
    """What the tab Look is set to."""

    model: str
    picture: str
    """See ``vistok.studio.samples``; "" is somebody's own."""
    question: str
    methods: tuple[str, ...] = METHODS
    keep: float = 0.25
    """Share of the visual tokens, in (0, 1]."""


def first(models: Collection[str]) -> Look:
    """What a page shows that no link says otherwise."""
    name, case = next(iter(samples().items()))
    return Look(next(iter(models)), name, case.question)


def write(look: Look) -> str:
    """The query of the link, without its question mark; a picture of somebody's own is left out."""
    said = {"picture": look.picture, "question": look.question, "model": look.model}
    said |= {"methods": ",".join(look.methods), "keep": f"{look.keep:g}"}
    return urlencode({name: value for name, value in said.items() if name != "picture" or value != OWN}, safe=":,")


def read(query: Mapping[str, str], models: Collection[str]) -> tuple[Look, list[str]]:
    """The look that ``query`` tells of, and a sentence for each part that cannot be had; the first look stands in."""
    look, wrong = first(models), []
    if name := query.get("picture"):
        try:
            known = picture(name)[1]
        except Unusable as error:
            wrong.append(f"The picture {error}.")
        else:
            asked = samples()[name].question if name in samples() else known[0].text if known else ""
            look = replace(look, picture=name, question=asked)
    if question := " ".join(query.get("question", "").split()):
        look = replace(look, question=question[:LONGEST])
        if len(question) > LONGEST:
            wrong.append(f"The question was cut to {LONGEST} characters.")
    if (model := query.get("model")) and model not in models:
        wrong.append(f"The model {model} is not here; there is {', '.join(models)}.")
    elif model:
        look = replace(look, model=model)
    if "methods" in query:
        look = replace(look, methods=_methods(query["methods"], wrong))
    if "keep" in query:
        keep = _number(query["keep"])
        if 0 < keep <= 1:
            look = replace(look, keep=keep)
        else:
            wrong.append(f"keep is {query['keep']}, it must be a share of the tokens above 0 and up to 1.")
    return look, wrong


def _methods(text: str, wrong: list[str]) -> tuple[str, ...]:
    known = {card.slug for card in catalogue.methods("reduce")}
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in known]:
        wrong.append(f"There is no method {', '.join(unknown)}.")
    found = [name for name in names if name in known]
    if len(found) > MOST_METHODS:
        wrong.append(f"Only the first {MOST_METHODS} methods are shown.")
    return tuple(found[:MOST_METHODS])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

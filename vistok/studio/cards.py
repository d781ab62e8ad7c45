"""The systems as the tab Catalogue shows them: a filtered list, and one card. Nothing here knows of Gradio."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vistok import catalogue
from vistok.catalogue import FAMILIES, Card
from vistok.studio.html import render

SITES = {
    "pixels to tokens": r"\bpixels to\b",
    "attention layer": r"in place of .*attention",
    "vision encoder": r"encoder block|\bblocks?\b|vision transformer|patch embedding|backbone|segmenter|state space",
    "encoder output": r"encoder output",
    "projector": r"projector output|^projector\b",
    "language model": r"decoder layer|language models?$|denoising",
}
"""Where a system acts, in few words: a card's ``site`` matches the pattern. A system may act at several."""
ELSEWHERE = "elsewhere"
ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def sites_of(card: Card) -> tuple[str, ...]:
    """Keys of ``SITES``, or ``ELSEWHERE``."""
    parts = [re.sub(r",? before the (language model|projector)$", "", part.strip()) for part in card.site.split(";")]
    found = tuple(name for name, pattern in SITES.items() if any(re.search(pattern, part) for part in parts))
    return found or (ELSEWHERE,)


def choices() -> dict[str, list[str]]:
    """What can be chosen of "family", "site" and "mechanism": what some system has, in the catalogue's order."""
    cards = catalogue.systems()
    present: dict[str, set[str]] = {
        "family": {card.family for card in cards},
        "site": {site for card in cards for site in sites_of(card)},
        "mechanism": {one for card in cards for one in card.mechanism},
    }
    order: dict[str, Sequence[str]] = {**catalogue.TAGS, "site": (*SITES, ELSEWHERE)}
    return {name: [value for value in order[name] if value in have] for name, have in present.items()}


def find(words: str = "", family: str = "", site: str = "", mechanism: str = "") -> list[Card]:
    """The systems that have all that is asked for ("" asks for nothing); ``words`` stand in slug, title, paper, site or
    claim, in whatever order and case."""
    wanted = words.lower().split()

    def fits(card: Card) -> bool:
        text = " ".join([card.slug, card.title, card.paper, card.repository, card.site, card.claim]).lower()
        return (
            family in ("", card.family)
            and (not site or site in sites_of(card))
            and (not mechanism or mechanism in card.mechanism)
            and all(word in text for word in wanted)
        )

    return [card for card in catalogue.systems() if fits(card)]


def listing(cards: Sequence[Card], chosen: str = "") -> str:
    """The HTML of the list, by family."""
    families = [(family, mine) for family in FAMILIES if (mine := [card for card in cards if card.family == family])]
    return render("systems.html", families=families, n=len(cards), chosen=chosen)


def head(slug: str) -> str:
    """The HTML of what a system is and what is claimed of it. Raises UnknownSystem."""
    card = catalogue.card(slug)
    modality = [] if card.modality == "image" else [card.modality]
    return render("system.html", card=card, tags=[card.kind, card.family, *card.mechanism, *modality])


def details(slug: str) -> str:
    """The HTML of the rest of its card: sources, recipe, hyper-parameters, departures. Raises UnknownSystem."""
    card = catalogue.card(slug)
    recipe = [(slot, getattr(card, slot)) for slot in ("score", "allocate", "select", "merge")]
    facts = [("acts at", card.site), ("needs", "; ".join(card.needs)), *recipe, ("paper", card.paper)]
    return render(
        "card.html",
        card=card,
        links=links(card),
        module=catalogue.module_of(slug),
        facts=[(label, text) for label, text in facts if text],
        hyper=[{**vars(one), "default": repr(one.default)} for one in catalogue.hyper_of(slug)],
    )


def links(card: Card) -> list[tuple[str, str]]:
    """(text, address) of the paper and of the authors' code, where the card names them in a form that is known."""
    found = []
    if paper := ARXIV.search(card.paper):
        found.append(("paper", f"https://arxiv.org/abs/{paper[1]}"))
    if REPOSITORY.fullmatch(card.repository):
        found.append(("authors' code", f"https://github.com/{card.repository}"))
    return found

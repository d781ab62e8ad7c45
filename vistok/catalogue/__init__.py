"""What systems there are, and how to get one. Reads cards from source text: importing this imports no torch."""

from vistok.catalogue.card import AttendTrial, Card, Claim, Outcome, TokenizeTrial, Trial, ViTTrial
from vistok.catalogue.registry import (
    FAMILIES,
    Registry,
    UnknownSystem,
    card,
    claim_of,
    create,
    create_seeded,
    hyper_of,
    methods,
    module_of,
    names,
    systems,
)
from vistok.catalogue.source import CardError, Hyper
from vistok.catalogue.tags import TAGS, grid, query

__all__ = [
    "FAMILIES",
    "TAGS",
    "AttendTrial",
    "Card",
    "CardError",
    "Claim",
    "Hyper",
    "Outcome",
    "Registry",
    "TokenizeTrial",
    "Trial",
    "UnknownSystem",
    "ViTTrial",
    "card",
    "claim_of",
    "create",
    "create_seeded",
    "grid",
    "hyper_of",
    "methods",
    "module_of",
    "names",
    "query",
    "systems",
]

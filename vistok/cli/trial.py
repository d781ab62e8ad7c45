"""``vistok try``: measure what a paper claims, here and now."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vistok import catalogue
from vistok.cli.console import Json, Seed, UserError, console, emit, progress, show_rows
from vistok.cli.options import Model, load_model
from vistok.zoo import DEFAULT

COLUMNS = {
    "system": "system",
    "metric": "metric",
    "baseline": "baseline",
    "value": "with it",
    "result": "the claim",
    "seconds": "seconds",
}


def trial(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="A system that `vistok systems` lists, or all.")],
    model: Model = DEFAULT,
    pictures: Annotated[
        int, typer.Option("--pictures", min=1, max=100_000, help="Held-out pictures, eight questions each.")
    ] = 32,
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Measure a system's claim on this machine, with and without the system."""
    cards = catalogue.systems() if slug.strip() == "all" else [catalogue.card(slug)]
    from vistok.bench.trial import try_system

    trials = {family: _trial(family, model, pictures, seed) for family in {card.family for card in cards}}
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with progress() as bar:
        for card in bar.track(cards, description="measuring"):
            try:
                row = try_system(card.slug, trials[card.family])
            except (ValueError, LookupError) as error:  # LookupError: the model that it is measured on is not there
                if len(cards) == 1:
                    raise
                failed.append(card.slug)
                console(stderr=True).print(f"{card.slug} cannot be measured: {error}", markup=False)
                continue
            rows.append(row)
            if as_json:
                emit(row)
    if not as_json:
        _print(rows)
    if failed:
        raise UserError("--model", model, f"cannot serve {', '.join(failed)}")


def _trial(family: str, model: str, pictures: int, seed: int) -> Any:
    """What claims are measured with: ``model`` and the world; of vision transformers the zoo's classifier, or another
    one that is named, and 256 pictures of objects; of attention operators tensors, and small
    networks trained on the spot on digits; of tokenizers small ones trained on the spot."""
    if family == "attend":
        from vistok.bench.attend_trial import AttendTrial

        return AttendTrial(seed)
    if family == "tokenize":
        from vistok.bench.tokenize_trial import TokenizeTrial

        return TokenizeTrial(seed=seed)
    if family == "vit":
        from vistok.bench.vit_trial import ViTTrial

        return ViTTrial(seed=seed) if model == DEFAULT else ViTTrial(seed=seed, classifier_name=model)
    from vistok.bench.trial import WorldTrial

    measure = WorldTrial(model, pictures, seed)
    measure.model, measure.processor = load_model(model)
    return measure


def _print(rows: list[dict[str, Any]]) -> None:
    if len(rows) == 1:
        console().print(f"claim: {rows[0]['claim']}", markup=False)
    result = {True: "held", False: "did not hold at this scale"}
    show_rows([{**row, "result": result[row["holds"]]} for row in rows], COLUMNS)
    for row in rows:
        if row["note"]:
            console().print(f"{row['system']}: {row['note']}", markup=False)

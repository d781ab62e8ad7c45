"""``vistok diffusion``: when a masked-diffusion model can lose how many of which visual tokens, and in which layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli.console import Json, Seed, UserError, console, emit, progress, show_rows
from vistok.cli.options import check_folder, load_model, parse_keeps, parse_methods
from vistok.world import TASKS

JOURNAL = "diffusion.jsonl"


def diffusion(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A masked-diffusion model: a shipped one, or a folder.")
    ] = "vistok-tiny-diffusion",
    world: Annotated[str, typer.Option("--world", help=f"What to ask about: {', '.join(TASKS)} or all.")] = "all",
    n: Annotated[int, typer.Option("--n", min=2, max=20_000, help="Pictures, one question each.")] = 100,
    methods: Annotated[
        str, typer.Option("--methods", help="Which tokens: systems, and vtw (none left in the upper half), or none.")
    ] = "tome-merge,divprune,cdpruner,sparsevlm,fastv,vtw,random",
    keep: Annotated[str, typer.Option("--keep", help="How many are left, counts or shares.")] = "0.5,0.25,0.1",
    start: Annotated[
        str, typer.Option("--start", help="When: from which shares of the steps on they are gone.")
    ] = "0,0.25,0.5,0.75",
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Denoising steps (default: one a token of the answer).")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for table, data and picture; a run that was stopped goes on there.")
    ] = Path("out/diffusion"),
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Reproduce the study of dmllm-redundancy on the world: accuracy, cost, attention by step and layer."""
    if world not in (*TASKS, "all"):
        raise UserError("--world", world, f"must be one of {', '.join(TASKS)}, all")
    names, keeps, starts = _methods(methods), parse_keeps(keep), _starts(start)
    folder = check_folder(out)
    loaded, processor = load_model(model, "MODEL")
    from vistok.bench.compare import case_of
    from vistok.bench.diffusion import cells, settings_of, study, write
    from vistok.bench.report import surroundings
    from vistok.world import sample
    from vistok.zoo.asking import is_diffusion

    if not is_diffusion(loaded):
        raise UserError("MODEL", model, "must be a masked-diffusion model (mask_token_id in its configuration)")
    length = loaded.config.answer_length
    if steps is not None and steps > length:
        raise UserError("--steps", steps, f"must be at most the {length} tokens of an answer")
    steps = length if steps is None else steps
    cases = [case_of(p, p.questions[0]) for p in sample(world, n, seed=seed, split="test", questions=1)]
    settings = settings_of(loaded.config.get_text_config().num_hidden_layers, names, keeps, starts, seed)
    with progress() as bar:
        task = bar.add_task("denoising", total=len(settings))
        found = study(
            loaded, processor, cases, settings, steps=steps, seed=seed, journal=folder / JOURNAL,
            on_step=lambda: bar.advance(task),
        )  # fmt: skip
    facts = {"model": model, "world": world, "questions": str(n), "steps": str(steps), "seed": str(seed)}
    paths = write(folder, found, facts | surroundings())
    heads = ("which", "keep", "start", "right", "95%", "over dense", "tokens", "FLOPs", "ms")
    if as_json:
        for row in found.rows:
            emit(row)
        emit({"attention": found.attention, "confidence": found.confidence, **facts})
    else:
        shown = [dict(zip(heads, cells(row, found.depth), strict=True)) for row in found.rows]
        narrow = [head for head in heads if head not in ("95%", "tokens")]
        show_rows(shown, narrow, title=f"{n} questions, {steps} steps")
        layers = [{"layer": layer, **_mean(found.attention, layer)} for layer in range(found.depth)]
        show_rows(layers, ("layer", "image", "prompt", "answer"), title="attention of the answer, mean over steps")
        said = ", ".join(f"{sure:.2f}" for sure in found.confidence)
        console().print(f"confidence in the final tokens, step by step: {said}", soft_wrap=True)
    for path in paths:
        console().print(str(path), markup=False, soft_wrap=True)


def _mean(attention: list[list[dict[str, float]]], layer: int) -> dict[str, str]:
    """What one layer's attention goes to, mean over the steps, as it is shown."""
    steps = [step[layer] for step in attention]
    return {kind: f"{sum(step[kind] for step in steps) / len(steps):.1%}" for kind in steps[0]}


def _methods(text: str) -> list[str]:
    """Names of ``--methods``, of which "vtw" is no system; [] for "none". Raises UserError."""
    names = [] if text.strip() == "none" else [name.strip() for name in text.split(",")]
    found = [name if name == "vtw" else parse_methods(name)[0] for name in names]
    if wrong := [name for name in found if "+" in name or name in ("dense", "all")]:
        raise UserError("--methods", wrong[0], "must be one system at a time, such as divprune")
    return list(dict.fromkeys(found))


def _starts(text: str) -> list[float]:
    """Shares of the steps. Raises UserError.

    >>> _starts("0, 0.5,75%")
    [0.0, 0.5, 0.75]
    """
    found = []
    for part in text.split(","):
        try:
            share = float(part.strip().removesuffix("%")) / (100 if part.strip().endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise UserError("--start", part, "must be shares in [0, 1), such as 0,0.25,0.5,0.75")
        found.append(share)
    return list(dict.fromkeys(found))

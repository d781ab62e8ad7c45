"""``vistok horizon``: how deep in a model its visual tokens matter, and from which layer on a random few are enough."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from vistok.cli.console import Json, Seed, UserError, console, emit, progress, show_rows
from vistok.cli.options import check_folder, load_model
from vistok.world import TASKS

PICTURE = "horizon.png"
BATCH = 32


def horizon(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A shipped model, a folder, or a name on the Hugging Face hub.")
    ] = "vistok-tiny",
    world: Annotated[str, typer.Option("--world", help=f"What to ask about: {', '.join(TASKS)} or all.")] = "all",
    n: Annotated[int, typer.Option("--n", min=2, max=20_000, help="Pictures, one question each.")] = 100,
    share: Annotated[
        float, typer.Option("--share", help="Share of the visual tokens that the random choice leaves.")
    ] = 0.25,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Random choices to average over.")] = 3,
    eps: Annotated[
        float, typer.Option("--eps", help="Largest change of the probability that counts as none, interval included.")
    ] = 0.01,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", min=1, help="Also measure each window of so many by so many tokens, kept alone. Takes long."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help=f"Folder for {PICTURE}.")] = Path("out"),
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Measure, layer by layer, what the right answer's probability loses without the visual tokens."""
    if world not in (*TASKS, "all"):
        raise UserError("--world", world, f"must be one of {', '.join(TASKS)}, all")
    if not 0 < share < 1:
        raise UserError("--share", share, "must be between 0 and 1, such as 0.25")
    if not 0 <= eps < 1:
        raise UserError("--eps", eps, "must be a change of a probability in [0, 1), such as 0.01")
    folder = check_folder(out)
    loaded, processor = load_model(model, "MODEL")
    from vistok.bench.compare import case_of
    from vistok.bench.horizon import draw, layer_profile
    from vistok.bench.report import replace_file
    from vistok.world import sample

    cases = [case_of(p, p.questions[0]) for p in sample(world, n, seed=seed, split="test", questions=1)]
    layers = loaded.config.get_text_config().num_hidden_layers
    with progress() as bar:
        task = bar.add_task("removing tokens", total=(layers + 1) * math.ceil(n / BATCH))
        found = layer_profile(
            loaded, processor, cases, share=share, seeds=seeds, window=window, seed=seed, batch_size=BATCH,
            on_step=lambda: bar.advance(task),
        )  # fmt: skip
    rows = [_row(layer) for layer in found.layers]
    end, start = found.horizon(eps), found.random_horizon(eps)
    hyper = found.hyper(eps, share)
    path = folder / PICTURE
    replace_file(path, draw(found, eps, share, f"{model}, {world}, {n} questions"))
    if as_json:
        for row in rows:
            emit(row)
        said = {"model": model, "world": world, "n": n, "share": share, "seeds": seeds, "eps": eps, "seed": seed}
        emit({"horizon": end, "random_horizon": start, "probability": found.probability, "hyper": hyper, **said})
    else:
        _print(rows, share)
        print_ = console().print
        print_(f"probability of the right answer with all visual tokens: {found.probability:.3f}, {n} questions")
        for what, layer in (("all visual tokens", end), (f"all but a random {share:.0%}", start)):
            since = "no layer" if layer == layers else f"layer {layer} of {layers}"
            print_(f"{what} can go from {since} on, within {eps:g} (95% interval included)", soft_wrap=True)
        stages = "".join(f"({round(depth * layers)}/{layers}, {left}), " for depth, left in hyper["stages"])
        given = f"stages=({stages.rstrip()}), horizon={round(hyper['horizon'] * layers)}/{layers}"
        print_(f'vistok.apply(model, "information-horizon", {given})', markup=False, soft_wrap=True)
    console().print(str(path), markup=False, soft_wrap=True)


def _row(layer: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer.layer}
    for name, change in (("removed", layer.removed), ("random", layer.random)):
        row |= {name: change.mean, f"{name}_low": change.low, f"{name}_high": change.high}
    if layer.windows is not None:
        row |= {"window_mean": layer.windows[0], "window_deviation": layer.windows[1]}
    return row


def _print(rows: list[dict[str, Any]], share: float) -> None:
    columns = {"layer": "from layer", "removed": "all removed", "removed_95": "95%"}
    columns |= {"random": f"{share:.0%} at random", "random_95": "95%"}
    if "window_mean" in rows[0]:
        columns |= {"window_mean": "a window alone", "window_deviation": "spread"}
    shown = []
    for row in rows:
        cells = {name: f"{value:+.3f}" for name, value in row.items() if name != "layer"}
        for name in ("removed", "random"):
            cells[f"{name}_95"] = f"{cells[f'{name}_low']} to {cells[f'{name}_high']}"
        shown.append({"layer": row["layer"], **cells})
    show_rows(shown, columns, title="lost probability of the right answer")

"""``vistok gna-sim``: what neighbourhood attention can gain on tiles, by stride; counted, not timed."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vistok.cli.console import Json, UserError, console, emit, show_rows
from vistok.cli.options import check_folder

PICTURE = "gna-sim.png"
DEFAULT_TILES = {1: "128", 2: "8x16", 3: "4x4x8"}
"""By number of axes: 128 tokens, as NATTEN's kernels have them."""
LARGEST_MAP = 512
"""Tiles along a side of the picture's maps, at most."""


def gna_sim(
    shape: Annotated[str, typer.Option("--shape", help="The grid of tokens, such as 30x48x80.")] = "64x64",
    kernel: Annotated[
        str | None, typer.Option("--kernel", help="Keys along each axis, such as 12x24x24, or one number for all.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="Instead of a kernel: find the best of at most this share of keys."),
    ] = None,
    stride: Annotated[
        str | None, typer.Option("--stride", help="Queries that share a window (default: the best is looked for).")
    ] = None,
    dilation: Annotated[str, typer.Option("--dilation", help="Step between the keys.")] = "1",
    causal: Annotated[str, typer.Option("--causal", help="0 or 1 for each axis, such as 1x0x0.")] = "0",
    tile: Annotated[
        str | None, typer.Option("--tile", help="Queries of a tile along each axis (default: 128 tokens).")
    ] = None,
    kv_tile: Annotated[str | None, typer.Option("--kv-tile", help="Keys of a tile (default: as --tile).")] = None,
    out: Annotated[Path, typer.Option("--out", help=f"Folder for {PICTURE}.")] = Path("out"),
    as_json: Json = False,
) -> None:
    """Bound on the speed-up over dense attention by stride: the share of tiles that a kernel has to visit."""
    lengths = _numbers(shape, "--shape")
    if not 1 <= len(lengths) <= 3:
        raise UserError("--shape", shape, "must have one to three axes, such as 64x64")
    if (kernel is None) == (density is None):
        got = "none" if kernel is None else f"--kernel {kernel} and --density {density:g}"
        raise UserError("--kernel", got, "must be given, or --density instead, but not both")
    if density is not None and (stride is not None or dilation != "1" or causal != "0"):
        raise UserError("--density", density, "goes without --stride, --dilation and --causal: it finds the window")
    n = len(lengths)
    query_tile = _along(DEFAULT_TILES[n] if tile is None else tile, "--tile", n)
    key_tile = query_tile if kv_tile is None else _along(kv_tile, "--kv-tile", n)
    folder = check_folder(out)
    from vistok.bench.report import replace_file
    from vistok.core.attention import GridWindow, best_stride, best_window, simulate

    if density is not None:
        best = best_window(lengths, density, query_tile, key_tile)
    else:
        kernels, dilations = _along(str(kernel), "--kernel", n), _along(dilation, "--dilation", n)
        on = tuple(map(bool, _along(causal, "--causal", n, least=0)))
        plain = GridWindow(lengths, kernels, 1, dilations, on)  # says what does not fit before the search
        found = best_stride(lengths, kernels, query_tile, key_tile, dilations, on)
        best = GridWindow(lengths, kernels, found, plain.dilation, on)
    windows = {s: GridWindow(lengths, best.kernel, s, best.dilation, best.causal) for s in _strides(best)}
    asked = None
    if stride is not None:
        asked = _along(stride, "--stride", n)
        windows[asked] = GridWindow(lengths, best.kernel, asked, best.dilation, best.causal)
    rows = [_row(window, simulate(window, query_tile, key_tile), s, best, asked) for s, window in windows.items()]
    rows.sort(key=lambda row: (_volume(row["stride"]), row["stride"]))
    shown = windows[asked] if asked is not None else best
    replace_file(folder / PICTURE, draw(rows, shown, query_tile, key_tile))
    facts = {"shape": lengths, "kernel": best.kernel, "dilation": best.dilation, "causal": best.causal}
    facts |= {"tile": query_tile, "kv_tile": key_tile}
    if as_json:
        for row in rows:
            emit(row | facts)
    else:
        told = ", ".join(f"{name} {_text(value)}" for name, value in facts.items() if name != "causal")
        table = [
            row | {"stride": _text(row["stride"]), "share": f"{row['bound'] / row['flop_bound']:.1%}"} for row in rows
        ]
        columns = {"stride": "stride", "visited": "tiles visited", "partial": "with a mask", "bound": "bound"}
        show_rows(table, columns | {"share": "of the FLOP bound", "note": ""}, title=told)
        first = rows[0]
        console().print(f"density {first['density']:.2%}, FLOP bound {first['flop_bound']:.2f}, {first['tiles']} tiles")
        console().print(f"best stride: {_text(best.stride)}", markup=False)
    console().print(str(folder / PICTURE), markup=False, soft_wrap=True)


def draw(rows: Sequence[dict[str, Any]], window: Any, query_tile: Sequence[int], key_tile: Sequence[int]) -> bytes:
    """The bound by stride, and for ``window`` which tiles meet along each axis, as a PNG."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    from vistok.core.attention.simulate import tile_map

    figure = Figure(figsize=(4.5 + 3 * len(window.axes), 3.6), layout="constrained")
    axes = figure.subplots(1, 1 + len(window.axes), width_ratios=[1.5, *(1 for _ in window.axes)])
    places = range(len(rows))
    axes[0].plot(places, [row["bound"] for row in rows], "o-", color="#1a5fb4", markersize=4, label="bound")
    axes[0].axhline(rows[0]["flop_bound"], color="#777777", linestyle=":", label="FLOP bound")
    axes[0].set_xticks(places, [_text(row["stride"]) for row in rows], rotation=60, fontsize=7)
    axes[0].set_xlabel("stride")
    axes[0].set_ylabel("gain over dense attention")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    colours = ListedColormap(["#ffffff", "#99c1f1", "#1a5fb4"])
    for number, (plot, axis, tq, tk) in enumerate(zip(axes[1:], window.axes, query_tile, key_tile, strict=True)):
        some, whole = (blocks[:LARGEST_MAP, :LARGEST_MAP] for blocks in tile_map(axis, tq, tk))
        plot.imshow(
            (some.int() + whole.int()).numpy(), cmap=colours, vmin=0, vmax=2, interpolation="nearest", aspect="auto"
        )
        plot.set_title(f"axis {number}, stride {window.stride[number]}: light needs a mask", fontsize=8)
        plot.set_xlabel(f"tiles of {tk} keys")
        plot.set_ylabel(f"tiles of {tq} queries")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def _strides(best: Any) -> list[tuple[int, ...]]:
    """What the table compares: powers of two up to the kernel, the kernel, and the best."""
    powers = [tuple(min(2**e, k) for k in best.kernel) for e in range(max(best.kernel).bit_length())]
    return list(dict.fromkeys([*powers, best.kernel, best.stride]))


def _row(window: Any, found: Any, stride: tuple[int, ...], best: Any, asked: tuple[int, ...] | None) -> dict[str, Any]:
    notes = ["best"] * (stride == best.stride) + ["asked for"] * (stride == asked) + ["no masks"] * found.perfect
    return {
        "stride": stride,
        "tiles": found.query_tiles * found.key_tiles,
        "visited": found.visited,
        "partial": found.partial,
        "bound": found.bound,
        "flop_bound": found.flop_bound,
        "density": found.density,
        "note": ", ".join(notes),
    }


def _volume(numbers: Sequence[int]) -> int:
    product = 1
    for number in numbers:
        product *= number
    return product


def _text(value: Any) -> str:
    return "x".join(str(int(v)) for v in value)


def _numbers(text: str, argument: str, least: int = 1) -> tuple[int, ...]:
    """``text`` such as "30x48x80" or "30,48,80". Raises UserError.

    >>> _numbers("30x48x80", "--shape")
    (30, 48, 80)
    """
    parts = re.split(r"[x,]", text.strip().lower())
    if not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise UserError(argument, text, f"must be whole numbers from {least} on, such as 8x16")
    return tuple(map(int, parts))


def _along(text: str, argument: str, axes: int, least: int = 1) -> tuple[int, ...]:
    """``_numbers`` for each of ``axes`` axes. Raises UserError."""
    numbers = _numbers(text, argument, least)
    if len(numbers) not in (1, axes):
        raise UserError(argument, text, f"must be one number for all axes, or {axes}, one for each")
    return numbers * axes if len(numbers) == 1 else numbers

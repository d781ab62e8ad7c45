"""Methods for vision transformers off the shelf: accuracy and what they keep of the object, against kept tokens.

The zoo's classifier (vistok-vit) on held-out pictures, not trained with any method. Every method is given the same mean
number of tokens over the blocks: methods with stages keep a share at blocks 3, 6 and 9, those that merge in every block
take equal steps to the count whose mean comes nearest. "random" and "uniform" are the controls. Precision: share of the
kept patches (a merged token counts once, at its place) that the object's mask covers by a quarter or more.

python -m benchmarks.vit_methods [--pictures 1000] [--keep 0.9 0.8 0.7 0.6 0.5] [--methods a,b]
                                 [--out docs/results] [--photographs]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import vistok
from benchmarks.common import machine_line
from vistok.bench.vit_trial import ViTTrial
from vistok.core.cells import grid_cells
from vistok.host.keep import Keep
from vistok.host.vit import KeepRate, TokenState, ViTEvidence, ViTReducer
from vistok.world import photos
from vistok.zoo.vit import to_pixels

METHODS = ("topk", "evit", "ats", "zero-tprune", "tome", "pitome")
CONTROLS = ("random-drop", "uniform")
LEVELS = (0.9, 0.8, 0.7, 0.6, 0.5)
SHOWN = ("astronaut", "cat", "coffee", "rocket", "motorcycle", "flower")
SIDE = 192
"""Pixels of a photograph in the sheet of overlays."""


@dataclass(frozen=True)
class Uniform(KeepRate):
    """Patches as evenly as they can lie on the grid; at later stages every so many of those that are left."""

    keep: Keep = 0.7
    layers: tuple[int, ...] | None = None

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        if state.untouched:
            index = grid_cells(state.grid, count)[1]
        else:
            index = ((torch.arange(count) + 0.5) * state.num_slots / count).long()
        return state.keep(index.to(state.x.device).expand(len(state.x), -1))


def made(name: str, level: float, patches: int, depth: int) -> ViTReducer:
    """The method at the mean number of tokens that the share ``level`` at blocks 3, 6 and 9 comes to.

    Raises ValueError where it has no such plan: equal steps in every block never come below half of the tokens.
    """
    if name == "uniform":
        return Uniform(keep=level)
    if len(list(vistok.create(name).stages(depth))) == 3:
        return _reducer(name, level)
    wanted = statistics.mean(_reducer("topk", level).plan(patches, depth))
    options = [_reducer(name, left) for left in range(1, patches + 1)]
    nearest: ViTReducer = min(options, key=lambda method: abs(statistics.mean(method.plan(patches, depth)) - wanted))
    if abs(found := statistics.mean(nearest.plan(patches, depth)) - wanted) > 2:
        raise ValueError(
            f"keep: got {level}, a mean of {wanted:.1f} tokens over the blocks; {name} comes no nearer than "
            f"{found:+.1f}, must be larger"
        )
    return nearest


@cache
def _reducer(name: str, keep: Keep) -> ViTReducer:
    return vistok.create(name, keep=keep)


def rows_of(trial: ViTTrial, names: Sequence[str], levels: Iterable[float]) -> Iterator[dict[str, Any]]:
    """One row a method and level, after one of the model as it is."""
    model = trial.classifier
    patches, depth = model.patch_embed.num_patches, len(model.blocks)
    dense = trial.accuracy()
    yield {"method": "dense", "keep": 1.0, "tokens": patches, "left": patches, "accuracy": dense}
    for level in levels:
        for name in names:
            method = made(name, level, patches, depth)
            plan = method.plan(patches, depth)
            score = trial.mask_score(method)
            yield {
                "method": name,
                "keep": level,
                "tokens": round(statistics.mean(plan), 1),
                "left": plan[-1],
                "accuracy": score.accuracy,
                "precision": score.precision,
                "recall": score.recall,
                "chance": score.chance,
            }


def curve(rows: Sequence[dict[str, Any]]) -> bytes:
    """An SVG: accuracy, and precision in the mask, against the mean number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vistok"  # the same rows give the same bytes
    from matplotlib import pyplot

    dense, others = rows[0], rows[1:]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axis, key, title in zip(
        axes, ("accuracy", "precision"), ("accuracy", "kept patches on the object"), strict=True
    ):
        for number, name in enumerate(dict.fromkeys(row["method"] for row in others)):
            mine = sorted((row for row in others if row["method"] == name), key=lambda row: row["tokens"])
            control = name in CONTROLS
            axis.plot(
                [row["tokens"] for row in mine], [row[key] for row in mine], label=name, marker="os^Dv"[number % 5],
                color="0.5" if control else f"C{number}", markersize=4, linewidth=1.2,
                linestyle="--" if control else "-",
            )  # fmt: skip
        level, said = (dense["accuracy"], "all patches") if key == "accuracy" else (others[0]["chance"], "chance")
        axis.axhline(level, color="0.2", linewidth=0.8, linestyle=":")
        axis.annotate(
            said, (0.01, level), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
            fontsize=7, color="0.2",
        )  # fmt: skip
        axis.set(xlabel=f"tokens, mean over blocks (of {dense['tokens']})", title=title)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    vector = io.BytesIO()
    figure.savefig(vector, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return vector.getvalue()


def overlays(trial: ViTTrial, names: Sequence[str], level: float) -> Image.Image:
    """Photographs, and what each method keeps of them: a row a picture, a column a method."""
    model = trial.classifier
    patches, depth = model.patch_embed.num_patches, len(model.blocks)
    shown = {photo.name: photo for photo in photos(trial.size)}
    large = {photo.name: photo for photo in photos(SIDE)}
    pixels = to_pixels(torch.stack([torch.from_numpy(shown[name].image.copy()) for name in SHOWN]), model)
    columns: list[tuple[str, list[Image.Image]]] = [("picture", [Image.fromarray(large[n].image) for n in SHOWN])]
    for name in names:
        with torch.inference_mode(), vistok.apply(model, made(name, level, patches, depth)) as session:
            model(pixels)
            images = [session.overlay(Image.fromarray(large[n].image), i) for i, n in enumerate(SHOWN)]
        columns.append((name, images))
    head, gap = 22, 6
    sheet = Image.new("RGB", (len(columns) * (SIDE + gap), head + len(SHOWN) * (SIDE + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (title, images) in enumerate(columns):
        draw.text((x * (SIDE + gap) + 4, 4), title, fill="black", font_size=14)
        for y, image in enumerate(images):
            sheet.paste(image, (x * (SIDE + gap), head + y * (SIDE + gap)))
    return sheet


def page(rows: Sequence[dict[str, Any]], pictures: int) -> str:
    """The results in Markdown."""
    dense, others = rows[0], rows[1:]
    levels = sorted({row["keep"] for row in others}, reverse=True)
    names = list(dict.fromkeys(row["method"] for row in others))
    found = {(row["method"], row["keep"]): row for row in others}
    lines = [
        "# Vision transformers off the shelf",
        "",
        f"`python -m benchmarks.vit_methods --pictures {pictures} --keep {' '.join(f'{level:g}' for level in levels)}` "
        f"makes this page: `vistok-vit` as it is, {pictures} held-out pictures (two "
        f"standard errors of an accuracy of one half: {100 / pictures**0.5:.1f} points). All patches: "
        f"{dense['accuracy']:.1%}. In a column every method has the same mean number of tokens over the twelve blocks, "
        "to within two: the fused token of evit comes on top.",
        "",
        "![accuracy and precision against tokens](vit.svg)",
        "",
        "## Accuracy",
        "",
        *_table(names, levels, found, "accuracy"),
        "",
        f"## Kept patches that are on the object (chance: {others[0]['chance']:.1%})",
        "",
        *_table(names, levels, found, "precision"),
        "",
        "## Patches of the object that are kept",
        "",
        *_table(names, levels, found, "recall"),
        "",
        "## Photographs",
        "",
        "What each method keeps at 0.7 of pictures unlike any that the model was trained on (dark: dropped; tinted: "
        "merged, one tint a token).",
        "",
        "![overlays on photographs](vit-photographs.jpg)",
        "",
        machine_line() + ".",
        "",
    ]
    return "\n".join(lines)


def _table(names: Sequence[str], levels: Sequence[float], found: dict[Any, dict[str, Any]], key: str) -> list[str]:
    tokens = [found[names[0], level]["tokens"] for level in levels]
    lines = [
        "| method | "
        + " | ".join(f"{level:g} ({count:.0f})" for level, count in zip(levels, tokens, strict=True))
        + " |",
        "|---|" + "---:|" * len(levels),
    ]
    best = {level: max(round(found[name, level][key], 3) for name in names) for level in levels}
    for name in names:
        values = [round(found[name, level][key], 3) for level in levels]
        cells = [f"**{v:.1%}**" if v == best[level] else f"{v:.1%}" for v, level in zip(values, levels, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--keep", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--methods", default=",".join((*METHODS, *CONTROLS)))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--photographs", action="store_true", help="the sheet of overlays only")
    given = parser.parse_args()
    names = given.methods.split(",")
    trial = ViTTrial(pictures=given.pictures)
    given.out.mkdir(parents=True, exist_ok=True)
    sheet = io.BytesIO()
    overlays(trial, [name for name in names if name not in CONTROLS], 0.7).save(sheet, format="JPEG", quality=85)
    _write(given.out / "vit-photographs.jpg", sheet.getvalue())
    if given.photographs:
        return
    rows = []
    for row in rows_of(trial, names, given.keep):
        rows.append(row)
        print(
            "  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{value}" for key, value in row.items()),
            flush=True,
        )
    _write(given.out / "vit.svg", curve(rows))
    _write(given.out / "vit.md", page(rows, given.pictures).encode())


if __name__ == "__main__":
    main()

"""Pictures for reports: the evidence outlined, a sheet of overlays, images inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .compare import OVERLAY_SIDE, Comparison, Look
from .measure import Case, resized

INK, MUTED, PAPER = (28, 28, 30), (110, 110, 118), (255, 255, 255)
RIGHT, WRONG = (20, 122, 62), (190, 40, 40)
OUTLINE = (255, 0, 200)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
PANEL, GAP, LINE = 168, 14, 17
MOST_COLUMNS = 15
"""Panels beside each other before a sheet goes on in the next line."""


def outlined(case: Case) -> Image.Image:
    """The case's picture at the size of an overlay, its evidence outlined where that is not all of it."""
    shown = resized(case.picture, OVERLAY_SIDE)
    if case.truth is None or case.truth.evidence.all():
        return shown
    # At some distance, so that what is small (letters) is not covered by its own outline.
    evidence = Image.fromarray(case.truth.evidence).convert("L").resize(shown.size, Image.Resampling.NEAREST)
    near, far = (np.asarray(evidence.filter(ImageFilter.MaxFilter(size))) > 0 for size in (9, 13))
    pixels = np.array(shown)
    pixels[far & ~near] = OUTLINE
    return Image.fromarray(pixels)


def data_url(image: Image.Image) -> str:
    """The image inside a page, as JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def dropped(kept: Sequence[int], grid: tuple[int, int]) -> str:
    """What a method dropped of a grid (h, w), as an SVG path in units of its cells; ``kept``: raster positions."""
    h, w = grid
    gone = np.ones(h * w, dtype=bool)
    gone[list(kept)] = False
    path = []
    for row, line in enumerate(gone.reshape(h, w)):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]]).astype(int)))
        path += [f"M{start} {row}h{end - start}v1h-{end - start}z" for start, end in edges.reshape(-1, 2).tolist()]
    return "".join(path)


def evidence_path(case: Case) -> dict[str, str]:
    """{"evidence": the border of the pixels that answer the question, as an SVG path, "evidence_scale": from its units
    to pixels}; both empty where that is the whole picture, or not known."""
    evidence = case.truth.evidence if case.truth is not None else None
    if evidence is None or evidence.all() or not evidence.any():
        return {"evidence": "", "evidence_scale": ""}
    width, height = case.picture.size
    scale = f"{width / evidence.shape[1]:g} {height / evidence.shape[0]:g}"
    return {"evidence": outline(evidence), "evidence_scale": scale}


def outline(evidence: np.ndarray) -> str:
    """The border of what lies near the ``evidence`` (H, W bool), as an SVG path in units of its pixels."""
    # At some distance, so that what is small (letters) is not covered by its own outline.
    near = np.asarray(Image.fromarray(evidence).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
    return _borders(near, "M{at} {line}h{run}") + _borders(near.T, "M{line} {at}v{run}")


def _borders(mask: np.ndarray, stroke: str) -> str:
    """Strokes between the rows of a mask wherever one is in and the other is not."""
    padded = np.pad(mask, 1).astype(int)
    changes = np.diff(padded, axis=0) != 0
    path = []
    for line, row in enumerate(changes):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]]).astype(int))).reshape(-1, 2).tolist()
        path += [stroke.format(line=line, at=start - 1, run=end - start) for start, end in edges]
    return "".join(path)


def sheet(comparison: Comparison) -> Image.Image:
    """Every case as a row: the picture with its question, then what each method keeps, with its answer.

    A single case is folded in lines of five, so that the sheet is not one long strip.
    """
    across = min(len(comparison.looks[0]), 5 if len(comparison.cases) == 1 else MOST_COLUMNS)
    lines = -(-len(comparison.looks[0]) // across)
    caption = 3 * LINE + 6
    width = (across + 1) * (PANEL + GAP) + GAP
    height = len(comparison.cases) * lines * (PANEL + caption + GAP) + GAP
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for case, looks in zip(comparison.cases, comparison.looks, strict=True):
        _panel(canvas, outlined(case), GAP, top)
        asked = _wrapped(case.question, _font(13), 2)
        truth = [f"right: {case.truth.answer}"] if case.truth else []
        for number, text in enumerate(asked + truth):
            colour = MUTED if number == len(asked) else INK
            draw.text((GAP, top + PANEL + 4 + number * LINE), _fitted(text, _font(13)), colour, _font(13))
        for number, look in enumerate(looks):
            line, column = divmod(number, across)
            left, at = GAP + (column + 1) * (PANEL + GAP), top + line * (PANEL + caption + GAP)
            if look.answered.overlay is not None:
                _panel(canvas, look.answered.overlay, left, at)
            for place, (text, mark, colour) in enumerate(_lines(look)):
                draw.text((left, at + PANEL + 4 + place * LINE), _fitted(text, _font(13), mark), colour, _font(13))
        top += lines * (PANEL + caption + GAP)
    return canvas


def _lines(look: Look) -> list[tuple[str, str, tuple[int, int, int]]]:
    """(text, what stands after it even if it is cut, colour) of each line under a panel."""
    found = look.answered
    colour = {None: INK, True: RIGHT, False: WRONG}[found.correct]
    mark = {None: "", True: " (right)", False: " (wrong)"}[found.correct]
    kept = f"{found.tokens_kept:.4g} of {found.tokens_in} tokens"
    return [(look.method, "", INK), (kept, "", MUTED), (found.answer or "no answer", mark, colour)]


def _fitted(text: str, font: Font, mark: str = "") -> str:
    """The text in one line of a panel's width, cut where it is too long."""
    text = " ".join(text.split())
    if font.getlength(text + mark) <= PANEL:
        return text + mark
    while text and font.getlength(text + "…" + mark) > PANEL:
        text = text[:-1]
    return text.rstrip() + "…" + mark


def _wrapped(text: str, font: Font, most: int) -> list[str]:
    """The text in at most ``most`` lines of a panel's width."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= PANEL or not lines[-1] or len(lines) == most:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _panel(canvas: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """The image, whole, in the middle of a square panel."""
    fitted = image.copy()
    fitted.thumbnail((PANEL, PANEL), Image.Resampling.BOX)
    canvas.paste(fitted, (left + (PANEL - fitted.width) // 2, top + (PANEL - fitted.height) // 2))


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def frames(comparison: Comparison) -> Sequence[tuple[str, list[str]]]:
    """(picture, overlays) of every case, as data URLs."""
    return [
        (data_url(outlined(case)), [data_url(a) if (a := look.answered.overlay) else "" for look in looks])
        for case, looks in zip(comparison.cases, comparison.looks, strict=True)
    ]

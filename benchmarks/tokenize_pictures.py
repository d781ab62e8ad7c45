"""Reconstructions of photograph crops and objects by the shipped tokenizers, those that are ordered by some beginnings.

python -m benchmarks.tokenize_pictures [--out docs/results/tokenize.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from vistok.core.fidelity import to_uint8
from vistok.zoo import load, shipped
from vistok.zoo.visual_tokenizers import held_out

SHOWN, SCALE, LABEL, BEGINNINGS = 10, 96, 150, (1, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/tokenize.png"))
    given = parser.parse_args()
    real = next(iter(held_out(SHOWN, 64)))
    rows: list[tuple[str, Tensor]] = [("original", real)]
    with torch.no_grad():
        for name in shipped("tokenizer"):
            model: Any = load(name, device="cpu")
            pictures = next(iter(held_out(SHOWN, model.image)))
            codes = model.encode(pictures)
            counts = [k for k in BEGINNINGS if k < model.tokens] if model.flexible else []
            rows += [(f"{name}, first {k}", model.decode(codes.prefix(k))) for k in counts]
            rows.append((f"{name}, {model.tokens}", model.decode(codes)))
    sheet = Image.new("RGB", (LABEL + SHOWN * SCALE, len(rows) * SCALE), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, pictures) in enumerate(rows):
        draw.text((4, i * SCALE + SCALE // 2 - 6), label, fill="black")
        large = to_uint8(interpolate(pictures, (SCALE - 2, SCALE - 2), mode="nearest")).permute(0, 2, 3, 1).numpy()
        for j, picture in enumerate(large):
            sheet.paste(Image.fromarray(picture), (LABEL + j * SCALE, i * SCALE))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(given.out)


if __name__ == "__main__":
    main()

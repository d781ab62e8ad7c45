"""The shipped tokenizers beside JPEG and WebP of Pillow on the same pictures of the same side, half objects over
clutter, half crops of photographs that training never saw. Bytes: ids in whole bits, without any header; the files of
the others whole, with theirs (of some 600 bytes for JPEG, which at this size is most of the file)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.zoo import load, shipped
from vistok.zoo.visual_tokenizers import Fidelity, evaluate_file, evaluate_tokenizer

TITLE = "Bytes and error: shipped tokenizers, whole and by their first tokens"
QUALITIES = (1, 5, 10, 20, 50, 80)
KINDS: tuple[Literal["JPEG", "WebP"], ...] = ("JPEG", "WebP")


def study(trial: TokenizeTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each tokenizer and number of tokens, and for each quality of the others; side by side."""
    pictures = 8 if quick else trial.pictures
    models: dict[str, Any] = {name: load(name, device="cpu") for name in shipped("tokenizer")}
    for side in sorted({model.image for model in models.values()}):
        for name, model in models.items():
            if model.image != side:
                continue
            counts = [max(1, model.tokens >> i) for i in range(6, 0, -1)] if model.flexible else []
            for k in [*dict.fromkeys(counts), model.tokens]:
                found = evaluate_tokenizer(model, pictures, None if k == model.tokens else k)
                yield {"side_px": side, "codec": name, "setting": f"{k} tokens"} | _row(found)
        for kind in KINDS:
            for quality in QUALITIES:
                found = evaluate_file(pictures, side, kind, quality)
                yield {"side_px": side, "codec": kind, "setting": f"quality {quality}"} | _row(found)


def _row(found: Fidelity) -> dict[str, Any]:
    return {"bytes": round(found.bytes), "PSNR_dB": found.psnr, "SSIM": found.ssim}

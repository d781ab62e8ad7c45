"""The shipped tokenizers of 64 px pictures beside JPEG and WebP of Pillow on the same pictures, half objects over
clutter, half crops of photographs that training never saw. Bytes: ids in whole bits, without any header; the files of
the others whole, with theirs (of some 600 bytes for JPEG, which at this size is most of the file)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.zoo import load, shipped
from vistok.zoo.visual_tokenizers import evaluate_file, evaluate_tokenizer

TITLE = "Bytes and error: shipped tokenizers, whole and by their first tokens"
QUALITIES = (1, 5, 10, 20, 50, 80)


def study(trial: TokenizeTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each tokenizer and number of tokens, and for each quality of the others."""
    pictures = 8 if quick else trial.pictures
    for name in shipped("tokenizer"):
        model = load(name, device="cpu")
        counts = [max(1, model.tokens >> i) for i in range(6, 0, -1)] if model.flexible else []  # type: ignore[attr-defined]
        for k in [*dict.fromkeys(counts), None]:
            found = evaluate_tokenizer(model, pictures, k)
            tokens = model.tokens if k is None else k  # type: ignore[attr-defined]
            yield {"codec": name, "tokens": tokens, "quality": None} | _row(found)
    for kind in ("JPEG", "WebP"):
        for quality in QUALITIES:
            yield {"codec": kind, "tokens": None, "quality": quality} | _row(evaluate_file(pictures, 64, kind, quality))


def _row(found: Any) -> dict[str, Any]:
    return {"bytes": round(found.bytes), "PSNR_dB": found.psnr, "SSIM": found.ssim}

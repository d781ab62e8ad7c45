"""VTBench: a tokenizer by itself, without a generator: pictures, fine detail, and text that must stay readable.

What: picture to codes to picture, scored by task: PSNR, SSIM, LPIPS and Frechet distance on pictures, the same by how
much detail there is, character and word error of text that a strong reader finds in the reconstruction. Source: Lin et
al., arXiv 2505.13439; huawei-lin/VTBench.

Networks (LPIPS, features, reader) are given as callables. SSIM has the range of the data, 1; scripts that print it
with 2 on pictures in [0, 1] are too high (``vistok.core.fidelity.ssim``). Frechet distances of fewer than some
thousand pictures say little.

Defect of the released code: reconstructions are truncated to whole levels, not rounded (``parity="authors"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.buckets import error_by_detail
from vistok.core.fidelity import psnr, rfid, ssim
from vistok.core.reading import character_error, word_error
from vistok.parts.framing import Frame, framed, to_tensor
from vistok.parts.quantize import Identity
from vistok.parts.reading import Reader
from vistok.parts.reconstruction import Rebuilds, Rebuilt, rebuilt
from vistok.tokenize.vq_grid import VQGrid

if TYPE_CHECKING:
    from PIL import Image

CARD = Card(
    title="VTBench: Evaluating Visual Tokenizers for Autoregressive Image Generation",
    kind="measurement",
    site="picture to tokens to picture",
    paper="Lin et al., 2025, arXiv 2505.13439",
    repository="huawei-lin/VTBench",
    claim="Continuous tokens keep more of a picture than discrete ones of as many channels.",
    departures=("the released code truncates reconstructions to whole levels, which costs half a level",),
)


@dataclass(frozen=True)
class Scores:
    """Of the pictures of one task; NaN for what no network was given for, or what there is no text for."""

    pictures: int
    psnr: float
    """dB, at most 100 a picture."""
    ssim: float
    lpips: float
    fid: float
    detail: tuple[float, ...]
    """PSNR in dB of the flattest cells to the richest."""
    cer: float
    """Mean of the pictures' character error rates; may exceed 1."""
    wer: float
    bits: float
    """Mean of a picture."""
    bits_per_pixel: float


@dataclass(frozen=True)
class VTBench:
    """The benchmark: how pictures come in and out."""

    size: int = 512
    """Side that pictures are brought to."""
    frame: Frame = "crop"
    """ "crop": the centre; "pad": all of it, black around."""
    groups: int = 3
    """Of cells by detail."""
    cell: int = 16
    """Side of such a cell in pixels."""
    batch: int = 16
    """Pictures at once."""
    parity: Literal["paper", "authors"] = "paper"
    """ "authors": levels are truncated."""

    def batches(self, images: Iterable[Image.Image]) -> Iterator[Tensor]:
        """Batches uint8 (B, 3, size, size) of RGB pictures of any size."""
        held: list[Tensor] = []
        for image in images:
            held.append((to_tensor(framed(image, (self.size, self.size), self.frame)) * 255).round().to(torch.uint8))
            if len(held) == self.batch:
                yield torch.stack(held)
                held = []
        if held:
            yield torch.stack(held)

    def run(
        self,
        tokenizer: Rebuilds,
        batches: Iterable[Tensor],
        *,
        texts: Sequence[str] = (),
        reader: Reader | None = None,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        feature_network: Callable[[Tensor], Tensor] | None = None,
    ) -> Scores:
        """Scores of ``tokenizer`` on ``batches``, uint8 (B, 3, H, W), which may differ in size.

        ``texts``: what is written in each picture, for ``reader``, who gets whole pictures. ``lpips``: (made, real),
        (B, 3, H, W) in [0, 1] each, to a distance a picture, or of all (``vistok.core.losses.perceptual`` with a
        network). ``feature_network``: pictures to (B, D). Raises ValueError for another number of texts, or without
        pictures.
        """
        parts = list(rebuilt(tokenizer, batches, truncate=self.parity == "authors"))
        if not parts:
            raise ValueError("batches: got none, must be at least one")
        pictures = sum(len(p.real) for p in parts)
        if reader is not None and len(texts) != pictures:
            raise ValueError(f"texts: got {len(texts)}, must be one a picture, {pictures}")
        read = [] if reader is None else [t for p in parts for t in reader(p.unit[0])]
        pairs = list(zip(read, texts, strict=False))
        return Scores(
            pictures,
            _mean(parts, lambda p: psnr(*p.unit)),
            _mean(parts, lambda p: ssim(*p.unit)),
            math.nan if lpips is None else _mean(parts, lambda p: lpips(*p.unit).reshape(-1).expand(len(p.real))),
            math.nan if feature_network is None or pictures < 2 else rfid((p.unit for p in parts), feature_network),
            self._by_detail(parts),
            sum(character_error(*pair) for pair in pairs) / len(pairs) if pairs else math.nan,
            sum(word_error(*pair) for pair in pairs) / len(pairs) if pairs else math.nan,
            _mean(parts, lambda p: p.bits.double()),
            sum(float(p.bits.double().sum()) for p in parts) / sum(p.real[:, 0].numel() for p in parts),
        )

    def _by_detail(self, parts: Sequence[Rebuilt]) -> tuple[float, ...]:
        """Mean over batches of the groups' PSNR; NaN where pictures are smaller than a cell."""
        found = [
            error_by_detail(*p.unit, self.groups, self.cell).means for p in parts if min(p.real.shape[2:]) >= self.cell
        ]
        if not found:
            return (math.nan,) * self.groups
        return tuple(sum(each) / len(each) for each in zip(*found, strict=True))


def _mean(parts: Sequence[Rebuilt], figure: Callable[[Rebuilt], Tensor]) -> float:
    """Mean over pictures of a figure that gives (B,) for a batch."""
    return float(torch.cat([figure(p).double() for p in parts]).mean())


def claim(trial: TokenizeTrial, steps: int = 120, dim: int = 8) -> Outcome:
    """PSNR on held-out pictures of networks of one size, with a codebook of 512 and with ``dim`` channels a token.

    Both are trained for ``steps`` steps. Holds if the continuous tokens are better by 0.5 dB.
    """
    bench, found = VTBench(trial.size, cell=4), []
    real = [(x * 255).round().to(torch.uint8) for x, _ in trial.held_out()]
    for bottleneck in (None, Identity(dim)):
        torch.manual_seed(trial.seed)
        model = VQGrid("T", trial.size, trial.size // 8, 512, dim, 20).build(bottleneck)
        trial.fit(model, steps)
        found.append(bench.run(model.eval(), real))
    one, two = found
    flat, rich = one.detail[0] - two.detail[0], one.detail[-1] - two.detail[-1]
    note = (
        f"SSIM {one.ssim:.3f} and {two.ssim:.3f}; richest third of cells {-rich:.1f} dB better, flattest {-flat:.1f}; "
        f"{one.bits:.0f} and {two.bits:.0f} bits a picture"
    )
    return Outcome("PSNR, dB", one.psnr, two.psnr, two.psnr >= one.psnr + 0.5, note)

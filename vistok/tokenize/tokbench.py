"""TokBench: how much of small text and small faces survives a tokenizer, by relative size.

What: words are cropped from the reconstruction by the boxes of the original and read by a frozen recogniser (T-ACC:
exact, upper and lower case differ; T-NED: 1 - normalised edit distance); faces are aligned by the five key points of
the original and compared in a frozen embedding (F-Sim: cosine). Each is averaged in three bins of relative size, and
the headline is the mean of the bins. Source: Wu et al., arXiv 2505.18142; wjf5203/TokBench.

Recogniser and embedder are given as callables (the paper's: docTR, ArcFace); ``vistok.parts.reading`` has readers.
Instances below the smallest edge are dropped, and so is, as in the released code, a ratio of 1 or more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, grid_sample

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.buckets import Bins, bin_by_ratio
from vistok.core.fidelity import psnr, to_uint8
from vistok.core.reading import similarity
from vistok.parts.reading import Reader, numbers, trained_reader, word_crops
from vistok.parts.reconstruction import Rebuilds, joined, rebuilt
from vistok.tokenize.vq_grid import VQGrid

CARD = Card(
    title="TokBench: Evaluating Your Visual Tokenizer before Visual Generation",
    kind="measurement",
    site="original and reconstructed pictures: words and faces, by relative size",
    paper="Wu et al., 2025, arXiv 2505.18142",
    repository="wjf5203/TokBench",
    claim="The smaller text is, the less of it survives a tokenizer.",
)

TEXT_EDGES = {256: (0.02, 0.03, 0.04, 1.0), 512: (0.01, 0.02, 0.03, 1.0), 1024: (0.005, 0.01, 0.02, 1.0)}
FACE_EDGES = {256: (0.0, 0.1, 0.2, 1.0), 512: (0.0, 0.05, 0.2, 1.0), 1024: (0.0, 0.05, 0.1, 1.0)}
_FACE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Eyes, nose and corners of the mouth, x and y, in a face of 112 x 112 as ArcFace takes it."""


@dataclass(frozen=True)
class TextScores:
    """Of words, by their size."""

    accuracy: Bins
    similarity: Bins
    ceiling: Bins
    """Accuracy of the recogniser on the originals."""


def evaluate_text(
    pairs: tuple[Tensor, Tensor],
    boxes: Tensor,
    words: Sequence[str],
    ratios: Tensor,
    recogniser: Reader,
    edges: Sequence[float],
    crop: tuple[int, int] = (32, 128),
) -> TextScores:
    """Scores of ``words`` in (made, real), (B, 3, H, W) in [0, 1] each; ``boxes`` (N, 5) as ``word_crops`` takes them.

    ``ratios`` (N,) in [0, 1]: height of a character over that of the picture.
    """
    if not len(words) == len(boxes) == len(ratios):
        raise ValueError(f"words: got {len(words)}, must be as many as boxes, {len(boxes)}, and ratios, {len(ratios)}")
    made, real = ([str(w) for w in recogniser(word_crops(side, boxes, crop))] for side in pairs)
    right, ceiling = (torch.tensor([float(a == b) for a, b in zip(s, words, strict=True)]) for s in (made, real))
    close = torch.tensor([similarity(a, b) for a, b in zip(made, words, strict=True)])
    return TextScores(*(bin_by_ratio(v, ratios, edges) for v in (right, close, ceiling)))


def aligned_faces(images: Tensor, points: Tensor, side: int = 112) -> Tensor:
    """(N, 3, side, side): faces turned, scaled and moved so that their key points lie best where ArcFace wants them.

    ``images`` (N, 3, H, W), a face each; ``points`` (N, 5, 2), x and y in px. Least squares without reflection
    (Umeyama, 1991). What lies outside of the picture is black.
    """
    target = _FACE.to(points) * (side / 112)
    a, b = target - target.mean(0), points - points.mean(1, keepdim=True)
    u, s, v = torch.linalg.svd(b.transpose(1, 2) @ a)  # rotates places of the template into the picture
    sign = torch.ones_like(s)
    sign[:, 1] = torch.linalg.det(u @ v).sign()
    turn = u @ torch.diag_embed(sign) @ v
    scale = (s * sign).sum(1) / a.square().sum()
    line = torch.arange(side, dtype=points.dtype)
    places = torch.stack([line.expand(side, side), line[:, None].expand(side, side)], -1) - target.mean(0)
    at = scale[:, None, None, None] * torch.einsum("nij,hwj->nhwi", turn, places) + points.mean(1)[:, None, None]
    size = torch.tensor([images.shape[3], images.shape[2]], dtype=points.dtype)
    return grid_sample(images, ((2 * at + 1) / size - 1).to(images.dtype), align_corners=False)


def evaluate_faces(
    pairs: tuple[Tensor, Tensor],
    points: Tensor,
    ratios: Tensor,
    embedder: Callable[[Tensor], Tensor],
    edges: Sequence[float],
) -> Bins:
    """Cosine of faces in (made, real), (N, 3, H, W) in [0, 1] each, a face each.

    ``points`` (N, 5, 2): of the originals. ``embedder``: (N, 3, 112, 112) in [0, 1] to (N, D).
    """
    made, real = (embedder(aligned_faces(side, points)) for side in pairs)
    return bin_by_ratio(cosine_similarity(made, real, dim=1), ratios, edges)


@dataclass(frozen=True)
class TokBench:
    """The benchmark at one size of pictures."""

    size: Literal[256, 512, 1024] = 256
    """Side of pictures, which says what counts as small."""
    crop_height: int = 32
    """Height of the crop that a word is read from."""
    crop_width: int = 128
    """Width of that crop."""

    def text(
        self,
        tokenizer: Rebuilds,
        images: Iterable[Tensor],
        boxes: Tensor,
        words: Sequence[str],
        ratios: Tensor,
        recogniser: Reader,
    ) -> TextScores:
        """Scores of ``tokenizer`` on ``images``, batches uint8 (B, 3, size, size); ``boxes`` count through them."""
        pairs = joined(list(rebuilt(tokenizer, images))).unit
        crop = (self.crop_height, self.crop_width)
        return evaluate_text(pairs, boxes, words, ratios, recogniser, self._edges(TEXT_EDGES), crop)

    def faces(
        self,
        tokenizer: Rebuilds,
        images: Iterable[Tensor],
        points: Tensor,
        ratios: Tensor,
        embedder: Callable[[Tensor], Tensor],
    ) -> Bins:
        """Similarity of the faces of ``images``, batches uint8 (B, 3, size, size) of one face a picture."""
        pairs = joined(list(rebuilt(tokenizer, images))).unit
        return evaluate_faces(pairs, points, ratios, embedder, self._edges(FACE_EDGES))

    def _edges(self, edges: Mapping[int, tuple[float, ...]]) -> tuple[float, ...]:
        if self.size not in edges:
            raise ValueError(f"size: got {self.size}, must be one of {', '.join(map(str, edges))}")
        return edges[self.size]


def claim(trial: TokenizeTrial, steps: int = 350, reader_steps: int = 120) -> Outcome:
    """Share of the numbers that were readable before and still are, of the largest and of the smallest third of sizes.

    Numbers of two digits of 5 to 13 px in pictures of ``trial.size`` px, through a VQ on a grid that was trained on
    such pictures, read by a small reader that was too. Holds if less than 0.9 times as much of the smallest is left.
    """
    heights, edges = (5, 13), tuple(h / trial.size for h in (5, 8, 11, 14))
    reader = trained_reader(trial.size, heights, reader_steps, 16, trial.seed, digits=2)
    torch.manual_seed(trial.seed)
    model = VQGrid("T", trial.size, trial.size // 8, 512, 8, 20).build()
    drawn = iter(range(10**6, 2 * 10**6))

    def loss(model: Any, *_: Tensor) -> Tensor:
        return model.objective(numbers(16, trial.size, heights, next(drawn), 2).images)

    trial.fit(model, steps, batch_size=1, loss=loss)  # its own pictures are not looked at
    model.eval()
    test = numbers(2 * trial.pictures, trial.size, heights, 7, 2)
    both = joined(list(rebuilt(model, to_uint8(test.images).split(64))))
    scores = evaluate_text(both.unit, test.boxes, test.words, test.ratios, reader.read, edges)
    left = [a / c if c else 0.0 for a, c in zip(scores.accuracy.means, scores.ceiling.means, strict=True)]
    note = (
        f"middle third {left[1]:.2f}; of the originals are read {', '.join(f'{c:.2f}' for c in scores.ceiling.means)}; "
        f"PSNR {float(psnr(*both.unit).mean()):.1f} dB"
    )
    return Outcome("share of readable numbers that stay so", left[2], left[0], left[0] < 0.9 * left[2], note)

"""AiT: masks and depth maps as tokens of a small VQ-VAE, and soft tokens that take the rounding out of them.

What: a convolutional VQ-VAE makes tokens of the labels. A solver reads a picture's features and writes the tokens one
after another, or all at once (``parallel``, AiT-P). A token that stands for a part of a map stays soft: the decoder is
given the expected code, and the solver's next input is the expected embedding. Coordinates and classes stay hard, drawn
from the likeliest of them (nucleus). Training forces the true codes on the solver (cross-entropy) and decodes its soft
codes to the map (``lesson``). Source: Ning et al., arXiv 2301.02229; SwinTransformer/AiT.

A depth map is (B, 1, H, W) in metres, 0 where it is not known: such pixels count in no loss. In training half of the
patches that the VQ-VAE is given are 0 too, and it must give all back. A mask is in [0, 1].

Departures: means in place of sums, so that the released factors (positive targets of all processes) fall away; what the
two extra ids are for is unknown, here they begin a depth map and objects; no cache while writing. Released defect: the
averages begin with counts of 0 and sums of their own, so that the first step throws all codes far away
(``parity="authors"``); here they begin with the table, and unused codes are put back into use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import pixel
from vistok.parts.quantize import EMAQuantizer
from vistok.parts.visual_vocabulary import learn
from vistok.tokenize._labels import LabelVQ
from vistok.tokenize._solver import Solver, Stretch
from vistok.world.sampling import derive_seed
from vistok.world.solids import make_solid

CARD = Card(
    title="All in Tokens: Unifying Output Space of Visual Tasks via Soft Token",
    kind="trained",
    site="masks and depth maps to discrete tokens; soft tokens at a solver's inputs and the VQ decoder's",
    paper="Ning et al., 2023, arXiv 2301.02229",
    repository="SwinTransformer/AiT",
    mechanism=("transformation",),
    claim="Soft tokens give depth maps with less error than the hard tokens of the same solver.",
    departures=("the released averages begin with counts of 0 and sums that are not the table's",),
)


def si_log(made: Tensor, depth: Tensor, weight: float = 0.5) -> Tensor:
    """Eigen's scale-invariant error: root of mean d^2 - ``weight`` (mean d)^2 of log ratios d where ``depth`` > 0."""
    known = depth > 0
    d = (depth.where(known, 1).log() - made.float().clamp_min(1e-3).log()) * known
    n = known.sum().clamp_min(1)
    # The root has no slope at 0, where nothing is known or all is right.
    return (d.square().sum() / n - weight * (d.sum() / n).square()).clamp_min(1e-12).sqrt()


def whole(estimate: Callable[[Tensor], Tensor], images: Tensor, step: int) -> Tensor:
    """(B, 1, H, W): maps of pictures (B, 3, H, W) wider than high, by squares of side H every ``step`` pixels.

    Each square is estimated as it is and mirrored; what several squares tell of a pixel is averaged.
    """
    side, width = images.shape[2:]
    if width < side or step < 1:
        raise ValueError(f"images, step: got {side} x {width} and {step}, must be no higher than wide, and 1 or more")
    total, cover = images.new_zeros(len(images), 1, side, width), images.new_zeros(width)
    for left in sorted({*range(0, width - side, step), width - side}):
        square = images[..., left : left + side]
        total[..., left : left + side] += (estimate(square) + estimate(square.flip(3)).flip(3)) / 2
        cover[left : left + side] += 1
    return total / cover


@dataclass(frozen=True)
class AiT:
    """The VQ-VAE of depth maps by its sizes, and the solver. Masks: label "mask", image 64, ratio 16."""

    label: Literal["depth", "mask"] = "depth"
    """What the maps are: depth in metres, 0 where unknown, or masks in [0, 1]."""
    image: int = 480
    """Side of a map in pixels."""
    ratio: int = 32
    """Pixels a token, along each side; a power of 2."""
    hidden: int = 16
    """Channels of the finest level of the VQ-VAE; each coarser one has twice as many."""
    codes: int = 128
    """Codes of the codebook."""
    dim: int = 512
    """Channels of a code."""
    holes: float = 0.5
    """Share of the patches of a depth map that training hides from the encoder."""
    hole: int = 16
    """Side of such a patch in pixels."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""
    solver_size: tuple[int, int, int] = (256, 6, 8)
    """Width, blocks of encoder and decoder each, and heads of the solver."""
    bins: int = 2001
    """Ids of coordinates."""
    classes: int = 80
    """Ids of classes; two extra ids, the codes of masks and those of depth follow."""
    mask_tokens: int = 16
    """Tokens of an object's mask."""
    parallel: bool = False
    """Whether all tokens of a depth map are written at once (AiT-P)."""
    weights: tuple[float, float] = (1.0, 1.0)
    """Of the tokens' cross-entropy and of the loss of the decoded map; of masks the authors' are 0.2 and 5."""
    parity: Literal["paper", "authors"] = "paper"
    """ "authors": averages of the codebook begin with counts of 0 and sums of their own; no restart."""

    @property
    def start(self) -> int:
        """The id that begins a depth map, or an object."""
        return self.bins + self.classes + (self.label == "mask")

    @property
    def sequence(self) -> tuple[Stretch, ...]:
        """A depth map: its tokens, row after row. An object: four coordinates, a class, the tokens of its mask."""
        masks = self.bins + self.classes + 2
        if self.label == "depth":
            return (Stretch(masks + self.codes, self.codes, (self.image // self.ratio) ** 2, True),)
        box, kind = Stretch(0, self.bins, 4, False), Stretch(self.bins, self.classes, 1, False)
        return box, kind, Stretch(masks, self.codes, self.mask_tokens, True)

    def labels(self) -> LabelVQ:
        """An untrained VQ-VAE: its maps are no pictures, so it is no ``Tokenizer``."""
        released = self.parity == "authors"
        restart = None if released else self.restart_after
        table = EMAQuantizer(self.codes, self.dim, write_back=True, restart_after=restart)
        if released:
            table.count_average.zero_()
            table.sum_average.normal_()
            table.codebook.normal_()
        return LabelVQ(self.label == "depth", self.image, self.ratio, self.hidden, self.holes, self.hole, table)

    def solver(self, trunk: nn.Module, channels: int) -> Solver:
        """An untrained solver on ``trunk``, pictures to features (B, ``channels``, h, w). Depth's writes objects too.

        Raises ValueError for objects in parallel, whose masks depend on their boxes.
        """
        if self.parallel and self.label == "mask":
            raise ValueError("parallel: got True for masks, must be False: a mask depends on its box")
        longest = max(5 + self.mask_tokens, (self.image // self.ratio) ** 2)
        vocabulary = self.bins + self.classes + 2 + 2 * self.codes
        return Solver(trunk, channels, vocabulary, longest, self.solver_size, self.parallel)

    def lesson(
        self, solver: Solver, labels: LabelVQ, images: Tensor, maps: Tensor, named: Tensor | None = None
    ) -> Tensor:
        """A training step's loss, a scalar; ``labels`` is trained and frozen. One row of ``images`` for each map.

        Cross-entropy of the tokens of ``maps`` (B, 1, H, W), and the loss of the maps that their soft tokens give:
        ``si_log`` of depth, the square error of up to 100 masks. ``named`` (B, 5): ids of coordinates and class of
        masks, learned with weight 1.
        """
        if (named is None) != (self.label == "depth"):
            raise ValueError(f"named: got {named}, must be given with masks and only then")
        part, weights = self.sequence[-1], self.weights
        with torch.no_grad():
            codes = labels.encode(maps)
        assert codes.ids is not None
        ids = codes.ids + part.start if named is None else torch.cat([named, codes.ids + part.start], 1)
        logits = solver.forced(images, ids, self.start).float()
        each = cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        loss = weights[0] * each[:, -part.length :].mean()
        if named is not None:
            loss = loss + each[:, : -part.length].mean()
        if weights[1]:
            of_codes = logits[:100, -part.length :, part.start : part.start + part.size]
            made = labels.decode_soft(of_codes)
            auxiliary = si_log(made, maps[:100]) if named is None else labels.loss_of(made, maps[:100])
            loss = loss + weights[1] * auxiliary
        return loss

    def solve(self, solver: Solver, labels: LabelVQ, images: Tensor, soft: bool = True) -> Tensor:
        """(B, 1, H, W): the maps of ``images`` (with masks, of their first objects), by soft tokens or by hard ones."""
        ids, logits = solver.generate(images, self.start, self.sequence, soft=soft)
        part = self.sequence[-1]
        return labels.decode_soft(logits[-1]) if soft else labels.decode(ids[:, -part.length :] - part.start)


def views(n: int, split: str, size: int) -> tuple[Tensor, Tensor]:
    """``n`` solids of the world from one side: pictures (n, 3, S, S) in [0, 1], depths (n, 1, S, S), 0 where nothing
    is seen."""
    found = [make_solid(derive_seed(0, i, split)).view("+x", size) for i in range(n)]
    pictures, depths = (torch.from_numpy(np.stack(x)).float() for x in zip(*found, strict=True))
    return pictures.permute(0, 3, 1, 2), depths.nan_to_num(posinf=0)[:, None]


def claim(trial: TokenizeTrial, first: int = 400, steps: int = 250) -> Outcome:
    """Root of the mean square error of depth on held-out solids, of hard and of soft tokens of one solver.

    A VQ-VAE of 64 codes, 16 a map, learns for ``first`` steps; then a small solver, which writes one token after
    another, by cross-entropy alone for ``steps`` steps. Holds if soft tokens have 2% less. The note gives that of a
    solver which was also trained on the soft tokens' map, as the paper's is.
    """
    size = trial.size
    sizes: dict[str, Any] = dict(hidden=16, codes=64, dim=32, holes=0.0, bins=1, classes=1, solver_size=(64, 2, 4))
    recipe = AiT("depth", size, size // 4, **sizes, restart_after=20, weights=(1.0, 0.0))
    known, held = views(3 * trial.pictures, "train", size), views(trial.pictures, "test", size)
    order = torch.Generator().manual_seed(trial.seed)

    def batch() -> list[Tensor]:
        chosen = torch.randint(len(known[0]), (16,), generator=order)
        return [x[chosen] for x in known]

    torch.manual_seed(trial.seed)
    labels = recipe.labels()
    learn(labels, lambda: labels.objective(batch()[1]), first)
    labels.eval().requires_grad_(False)

    def error(made: Tensor) -> float:
        return float(pixel(made, held[1], valid=held[1] > 0).sqrt())

    found = []
    for each in (recipe, replace(recipe, weights=(1.0, 1.0))):
        torch.manual_seed(trial.seed)
        solver = each.solver(nn.Conv2d(3, 64, 4, 4), 64)
        learn(solver, lambda: each.lesson(solver, labels, *batch()), steps, 2e-3)  # noqa: B023
        found += [error(each.solve(solver.eval(), labels, held[0], soft)) for soft in (False, True)]
    ids = labels.encode(held[1]).ids
    assert ids is not None
    told = (
        f"trained on the map too: hard {found[2]:.4f}, soft {found[3]:.4f}; true tokens {error(labels.decode(ids)):.4f}"
    )
    return Outcome("error of depth", found[0], found[1], found[1] <= 0.98 * found[0], told)

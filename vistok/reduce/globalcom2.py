"""GlobalCom2: the thumbnail commands how many tokens each crop of a cut picture keeps, and helps to say which.

What: the thumbnail sees the whole picture. It keeps its share of the tokens by its own class token's scores. Summed
over the region that a crop shows, those scores say how rich the crop is: softmax over the crops (temperature 10) gives
it 1 + w - mean(w) times the common retention ratio. A crop's tokens are ranked by its own class token's scores plus the
thumbnail's, resized to the picture and cut at the crop's border, each with its vector scaled to length 1. Source: Liu
et al., arXiv 2501.05179, xuyang-liu16/GlobalCom2. Where: between the projector and the language model, once. A picture
in one piece is ranked by the class token's scores. Where the host cannot tell where a crop lies (InternVL), the crops
share by size and are ranked by their own scores.

Scores: released are scaled products of queries and keys before the softmax, mean over heads: ``score="logits"``, only
for encoders with a class token. The default takes the logarithm of the attention (the same up to one number a part) and
its distance from the part's mean, so that this number does not matter; it also serves encoders without a class token,
by the attention that tokens receive.

Departures: exactly ``keep`` tokens stay (the retention ratio that gives them, largest remainders). A crop's region is
what it shows of the picture, padding left out. The released code rounds down part by part, cuts the thumbnail into rows
and columns of equal width of which the last takes the remainder, emits the thumbnail in order of score, and writes a
crop's tokens at their ranks among those that are no padding, as if these were places in the padded crop:
``parity="authors"`` (values in that order, read in the prompt's raster order; closest to the released runs with the
host's ``position="recompact"``). Its use of the first picture's scores for all pictures of a batch is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.allocate import softmax_shares, split_budget
from vistok.core.select import topk_per_group
from vistok.core.tensors import take, upcast
from vistok.host.recipe import Recipe, Shares, SlotNeeds
from vistok.host.reducer import Evidence, Reduction
from vistok.reduce._crops import crop_boxes, rows_and_columns, shown_by

CARD = Card(
    title="Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution LVLMs (GlobalCom2)",
    kind="training-free",
    site="projector output, before the language model",
    paper="Liu et al., 2025, arXiv 2501.05179",
    repository="xuyang-liu16/GlobalCom2",
    mechanism=("attention",),
    needs=("class-token attention of the last encoder layer (received attention where there is no class token)",),
    score="class-token score; in a crop plus the thumbnail's, resized and cut",
    allocate="a common ratio, for each crop times 1 + its share of the thumbnail's scores - the mean share",
    select="top-k in each part",
    claim="Keeps 90% of the dense accuracy with 10% of the visual tokens.",
    departures=(
        "exactly the tokens asked for stay; what rounding down leaves is given out",
        "a crop's region is the part of the picture that it shows, padding left out",
        "tokens stand at their own places in raster order, also beside padding and in the thumbnail",
        "each picture of a batch has its own scores",
    ),
)


@dataclass(frozen=True)
class GlobalCom2(Recipe):
    """Ratios for the crops and a map for their tokens from the thumbnail, top-k in each part."""

    temperature: float = 10.0
    """Of the softmax over the crops; large means equal ratios."""
    score: Literal["attention", "logits"] = "attention"
    """"attention": logarithm of the attention, centred in each part; "logits": as released, for class tokens only."""
    layer: int = -1
    """Encoder layer whose class-token row is used."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": rounded down, equal regions, released order (fewer than ``keep`` tokens)."""

    whole_picture: ClassVar[bool] = True
    thumbnail: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: got {self.temperature}, must be greater than 0")
        for name, choices in (("score", ("attention", "logits")), ("parity", ("paper", "authors"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, must be {choices[0]!r} or {choices[1]!r}")

    @property
    def one_at_a_time(self) -> bool:  # type: ignore[override]
        """True if counts are rounded down."""
        return self.parity == "authors"

    @property
    def slot_needs(self) -> SlotNeeds:
        row = {"cls_logits" if self.score == "logits" else "cls_attention": self.layer}
        return {"score": row, "allocate": row}

    def own_scores(self, evidence: Evidence) -> list[Tensor]:
        """(B, n) for each part: its class token's scores, thumbnail first."""
        sizes = [h * w for h, w in evidence.crops] or [evidence.num_tokens]
        if self.score == "logits":
            return list(upcast(evidence.cls_logits).mean(1).split(sizes, 1))
        attention = upcast(evidence.cls_attention)
        logs = attention.clamp_min(torch.finfo(attention.dtype).tiny).log().mean(1)
        return [part - part.mean(1, keepdim=True) for part in logs.split(sizes, 1)]

    def weights(self, evidence: Evidence, thumbnail: Tensor) -> Tensor:
        """(B, J) float64: how many times the common retention ratio each crop keeps."""
        crops, (h, w) = len(evidence.crops) - 1, evidence.crops[0]
        region = shown_by(evidence)
        if region is None:
            return thumbnail.new_ones(len(thumbnail), crops, dtype=torch.float64)
        grid = rows_and_columns(evidence)
        if self.parity == "authors" and grid is not None:
            down, across = (int(axis.max()) + 1 for axis in grid)
            y = (torch.arange(h, device=region.device) // max(h // down, 1)).clamp_max(down - 1)
            x = (torch.arange(w, device=region.device) // max(w // across, 1)).clamp_max(across - 1)
            region = (y[:, None] * across + x).flatten()
        sums = thumbnail.new_zeros(len(thumbnail), crops, dtype=torch.float64)
        sums = sums.scatter_add(1, region.expand(len(thumbnail), -1), thumbnail.double())
        return 1 + softmax_shares(sums, self.temperature) - 1 / crops

    def scores(self, evidence: Evidence) -> Tensor:
        """(B, N) what the tokens of each part are ranked by."""
        thumbnail, *crops = self.own_scores(evidence)
        boxes = crop_boxes(evidence)
        if boxes is not None:
            picture = thumbnail.unflatten(1, evidence.crops[0])[:, None]
            for number, (box, (h, w)) in enumerate(zip(boxes.tolist(), evidence.crops[1:], strict=True)):
                height, width = round(h / (box[3] - box[1])), round(w / (box[2] - box[0]))
                top, left = round(box[1] * height), round(box[0] * width)
                seen = interpolate(picture, (height, width), mode="bilinear")[:, 0, top : top + h, left : left + w]
                crops[number] = normalize(crops[number]) + normalize(seen.flatten(1))
        return torch.cat([thumbnail, *crops], 1)

    def budgets(self, evidence: Evidence, keep: int) -> Tensor:
        """(B, P) int64: how many tokens of each part stay, thumbnail first."""
        weights = self.weights(evidence, self.own_scores(evidence)[0])
        sizes = torch.tensor([[h * w for h, w in evidence.crops]], device=weights.device)
        weights = torch.cat([torch.ones_like(weights[:, :1]), weights], 1) * sizes
        return split_budget(weights, keep, capacity=sizes)

    def allocate(self, evidence: Evidence, scores: Tensor, keep: int) -> Shares | None:
        sizes = [h * w for h, w in evidence.crops]
        return Shares(sizes, self.budgets(evidence, keep)) if sizes else None

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        if self.parity == "authors" and evidence.crops:
            return self.released(evidence, keep / evidence.num_tokens)
        return super().compress(evidence, keep)

    def released(self, evidence: Evidence, rate: float) -> Reduction:
        """The released reduction at the retention ratio ``rate``: counts rounded down, released order."""
        sizes = [h * w for h, w in evidence.crops]
        ratios = (rate * self.weights(evidence, self.own_scores(evidence)[0])).clamp_max(1)
        counts = (torch.cat([torch.full_like(ratios[:, :1], rate), ratios], 1) * ratios.new_tensor(sizes)).long()
        picks = topk_per_group(self.scores(evidence), sizes, counts)
        first = int(counts[0, 0])
        crops = picks[:, first:].sort(1).values
        keep = torch.cat([picks[:, :first].sort(1).values, crops], 1)

        true, wrong = reading_order(evidence)
        slots = true[keep].sort(1).indices  # of the kept places in the order in which the prompt has them
        emitted = torch.cat([picks[:, :first], crops.gather(1, wrong[crops].sort(dim=1, stable=True).indices)], 1)
        order = torch.empty_like(emitted).scatter(1, slots, emitted)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        source = torch.full_like(evidence.features[..., 0], -1, dtype=torch.int64).scatter(1, order, places)
        return Reduction(keep, take(evidence.features, order), source)


def reading_order(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """(N,) int64 each: at which of the prompt's places, up to gaps, each token stands, and where the released code
    puts it: at its rank among a crop's tokens that are no padding, read as a place in the padded crop."""
    (h, w), grid, boxes = evidence.crops[0], rows_and_columns(evidence), crop_boxes(evidence)
    device = evidence.features.device
    if grid is None or boxes is None:
        places = torch.arange(evidence.num_tokens, device=device)
        return places, places
    line = w * (int(grid[1].max()) + 1)  # tokens in a row of all crops, padding included
    true = [torch.arange(h * w, device=device)]
    wrong = list(true)
    for down, across, box, (rows, columns) in zip(
        grid[0].tolist(), grid[1].tolist(), boxes.tolist(), evidence.crops[1:], strict=True
    ):
        rank = torch.arange(rows * columns, device=device)
        top, left = round(box[1] * rows / (box[3] - box[1])), round(box[0] * columns / (box[2] - box[0]))
        true.append(h * w + (top + rank // columns) * line + left + rank % columns)
        wrong.append(h * w + (down * h + rank // w) * line + across * w + rank % w)
    return torch.cat(true), torch.cat(wrong)


def claim(trial: Trial) -> Outcome:
    """The abstract: over 90% of the performance while 90% of the tokens go. It is about pictures that were cut."""
    dense = trial.accuracy(None)
    pruned = trial.accuracy(GlobalCom2(), keep=0.1)
    return Outcome("accuracy with 10% of the tokens", baseline=dense, value=pruned, holds=pruned >= 0.9 * dense)

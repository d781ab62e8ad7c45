"""Where the parts of a cut picture lie: what ``hired`` and ``globalcom2`` read off the thumbnail."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.host.reducer import Evidence


def crop_boxes(evidence: Evidence) -> Tensor | None:
    """(J, 4) float64 (x0, y0, x1, y1) of the crops, thumbnail left out; None where the model does not tell."""
    boxes = [box for box in evidence.boxes[1:] if box is not None]
    if not evidence.crops or len(boxes) < len(evidence.crops) - 1:
        return None
    return torch.tensor(boxes, dtype=torch.float64, device=evidence.features.device).view(-1, 4)


def shown_by(evidence: Evidence) -> Tensor | None:
    """(h * w,) int64: which crop, 0 .. J - 1, shows the middle of each token of the thumbnail.

    The nearest crop where none does, the first of those that meet there. None where the model does not tell.
    """
    boxes = crop_boxes(evidence)
    if boxes is None:
        return None
    height, width = evidence.crops[0]
    apart = []
    for side, near, far in ((height, 1, 3), (width, 0, 2)):
        middle = (torch.arange(side, dtype=torch.float64, device=boxes.device) + 0.5) / side
        apart.append(torch.maximum(boxes[:, near, None] - middle, middle - boxes[:, far, None]).clamp_min(0))
    return (apart[0][:, :, None] + apart[1][:, None]).argmin(0).flatten()


def rows_and_columns(evidence: Evidence) -> tuple[Tensor, Tensor] | None:
    """(J,) int64 each: the row and the column of each crop among the crops. None where the model does not tell."""
    boxes = crop_boxes(evidence)
    if boxes is None:
        return None
    down, across = (boxes[:, edge].contiguous().unique(return_inverse=True)[1] for edge in (1, 0))
    return down, across

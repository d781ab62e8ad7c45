"""GlobalCom2: logits as they are; padding of the crops is left out of the evidence, as hosts do, and the released
order is read off the slots. The recorded sequence has a newline row (-1) behind each row of all crops, padding
included."""

from __future__ import annotations

import torch

from vistok.host.reducer import Evidence
from vistok.reduce.globalcom2 import GlobalCom2, reading_order


def run(case):
    hyper = case.hyper
    rows, cols, side = hyper["rows"], hyper["cols"], hyper["side"]
    thumbnail, crops = case.inputs["thumb_logits"], case.inputs["crop_logits"]
    valid = _valid(hyper["image_size"], rows, cols, side)  # (J, side * side)
    grids, boxes = _parts(valid.view(rows, cols, side, side))
    features = case.inputs["features"]
    logits = [thumbnail, *(c[v] for c, v in zip(crops, valid, strict=True))]
    values = [features[0], *(x[v] for x, v in zip(features[1:], valid, strict=True))]
    evidence = Evidence(
        features=torch.cat(values)[None],
        cls_logits=torch.cat(logits)[None, None],
        crops=((side, side), *grids),
        boxes=((0.0, 0.0, 1.0, 1.0), *boxes),
    )
    system = GlobalCom2(score="logits", parity="authors")
    reduction = system.released(evidence, hyper["R"])

    count = reduction.keep.shape[1]
    token = (reduction.source[0] == torch.arange(count)[:, None]).int().argmax(1)  # of each slot
    first = int((reduction.keep[0] < side * side).sum())
    read, put = reading_order(evidence)
    slots = first + read[reduction.keep[0, first:]].argsort()  # the crops' slots in the order of the prompt
    owner = torch.cat([torch.full((len(part),), j - 1) for j, part in enumerate(logits)])
    place = torch.cat([torch.arange(side * side), *(v.nonzero()[:, 0] for v in valid)])
    line = (put[token[slots]] - side * side) // (side * cols)
    tokens, source, newline = [], [], torch.full((1, features.shape[2]), -1.0)
    for row in range(rows * side):
        mine = slots[line == row]
        tokens += [reduction.tokens[0, mine], newline]
        source += [torch.stack([owner[token[mine]], place[token[mine]]], 1), torch.full((1, 2), -1)]
    weights = system.weights(evidence, thumbnail[None])
    return {
        "thumb_order": token[:first],
        "crop_ratios": (hyper["R"] * weights).clamp_max(1)[0],
        "crop_tokens": torch.cat(tokens),
        "crop_source": torch.cat(source),
    }


def _valid(image_size, rows, cols, side):
    """(J, side * side) bool: which tokens of each crop are no padding, by the picture's (width, height)."""
    width, height = image_size
    full = torch.zeros(rows * side, cols * side, dtype=torch.bool)
    if width / height > cols / rows:
        pad = (rows * side - int(height * (cols * side / width))) // 2
        full[pad : rows * side - pad] = True
    else:
        pad = (cols * side - int(width * (rows * side / height))) // 2
        full[:, pad : cols * side - pad] = True
    return full.view(rows, side, cols, side).transpose(1, 2).reshape(rows * cols, side * side)


def _parts(valid):
    """The grid of each crop (h, w) without padding, and the box that it shows of the picture without padding."""
    rows, cols = valid.shape[:2]
    heights = [int(valid[r, 0].any(1).sum()) for r in range(rows)]
    widths = [int(valid[0, c].any(0).sum()) for c in range(cols)]
    grids, boxes = [], []
    for r in range(rows):
        for c in range(cols):
            x, y, w, h = sum(widths[:c]), sum(heights[:r]), sum(widths), sum(heights)
            grids.append((heights[r], widths[c]))
            boxes.append((x / w, y / h, (x + widths[c]) / w, (y + heights[r]) / h))
    return grids, boxes

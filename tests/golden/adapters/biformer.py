"""Bi-level routing attention, and its core with given routes; padded keys as released."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from vistok.attend.biformer import BiLevelRoutingAttention, route, routed_attention
from vistok.core.attention import TileOrder


def run(case):
    return _core(case) if "region_graph" in case.inputs else _module(case)


def _module(case):
    hyper = case.hyper
    operator = BiLevelRoutingAttention(
        hyper["dim"], hyper["heads"], hyper["n_win"], hyper["topk"], hyper["side_dwconv"], parity="authors"
    )
    state = {n.removeprefix("param."): t for n, t in case.inputs.items() if n.startswith("param.")}
    operator.load_state_dict(state)
    x = case.inputs["x"]
    with torch.no_grad():
        q, k, _ = operator.qkv_linear(x).chunk(3, 1)
        index, logits = route(q, k, operator.region(*x.shape[2:]), hyper["topk"])
        return {"out": operator(x), "region_graph": index, "region_logits": logits}


def _core(case):
    """The weights are what values that are unit vectors become, keys in the order of the table."""
    q, k, v, index = (case.inputs[n] for n in ("q", "k", "v", "region_graph"))
    region, scale, heads = tuple(case.hyper["region_size"]), case.hyper["scale"], index.shape[1]
    out = routed_attention(q, k, v, heads, region, index, scale, "authors")
    short = -q.shape[2] % region[0], -q.shape[3] % region[1]
    q, k = (pad(x, (0, short[1], 0, short[0])) for x in (q, k))
    grid, n = q.shape[2:], q.shape[2:].numel()
    unit = torch.eye(n).unflatten(1, grid).repeat(1, heads, 1, 1)
    weights = routed_attention(q, k, unit, heads, region, index, scale, "authors").unflatten(1, (heads, n))
    order = TileOrder.of(grid, region).order
    by_region = (
        weights.flatten(3)[:, :, order][..., order]
        .unflatten(3, (index.shape[2], -1))
        .unflatten(2, (index.shape[2], -1))
    )
    # (B, heads, key region, key, region, query)
    by_region = by_region.permute(0, 1, 4, 5, 2, 3)
    size = by_region.shape[3]
    columns = index[:, :, :, None, :, None].expand(-1, -1, -1, size, -1, size)
    return {"out": out, "attention": by_region.gather(4, columns).flatten(4)}

"""DaViT's channel attention, timm's second version of it too, and its blocks of both kinds."""

from __future__ import annotations

import torch

from vistok.attend.davit import Block, ChannelGroupAttention, WindowAttention


def run(case):
    hyper, x = case.hyper, case.inputs["x"]
    state = {n.removeprefix("param."): t for n, t in case.inputs.items() if n.startswith("param.")}
    if "block" in hyper:
        dim, heads = hyper["dim"], hyper["heads"]
        spatial = hyper["block"] == "SpatialBlock"
        attn = WindowAttention(dim, heads, hyper["window"]) if spatial else ChannelGroupAttention(dim, heads)
        model, given = Block(dim, attn, hyper["mlp_ratio"]), (x, tuple(hyper["size"]))
    else:
        second = "dynamic_scale" in hyper
        scale = "tokens" if hyper.get("dynamic_scale") else "head"
        model = ChannelGroupAttention(hyper["dim"], hyper["groups"], "qkv.bias" in state, scale)
        given = (x,)
        if second:  # thirds are query, key, value there
            for name in ("qkv.weight", "qkv.bias"):
                q, k, v = state[name].chunk(3)
                state[name] = torch.cat([v, q, k])
    model.load_state_dict(state)
    with torch.no_grad():
        return {"out": model(*given)}

"""A step of k-means, the grouped attention, and the whole block in evaluation and its first training step."""

from __future__ import annotations

import torch

from vistok.attend.catanet import IntraGroupAttention, TokenAggregationBlock, center_iter

NAMES = {"mlp.norm.": "mlp.norm.", "mlp.fn.dwconv.depthwise_conv.0.": "mlp.dwconv.", "mlp.fn.": "mlp."}
"""Their names, of which ours differ."""


def run(case):
    given, hyper = case.inputs, case.hyper
    state = {_ours(n.removeprefix("param.")): t for n, t in given.items() if n.startswith("param.")}
    if "n_iter" in hyper:
        return _block(given, hyper, state)
    if "order" in given:
        attention = IntraGroupAttention(hyper["dim"], hyper["qk_dim"], hyper["heads"], hyper["group"], "authors")
        attention.load_state_dict(state)
        with torch.no_grad():
            return {"out": attention(given["x"], given["order"], given["k_global"], given["v_global"])}
    return {"centers": center_iter(given["x"], given["means"])}


def _block(given, hyper, state):
    shape = (hyper[n] for n in ("dim", "qk_dim", "heads", "centers", "group", "mlp_dim", "n_iter"))
    block = TokenAggregationBlock(*shape, parity="authors").train(hyper["training"])
    means = given.get("means", block.means)
    block.load_state_dict(state | {"means": means, "initialised": torch.tensor(hyper["initialised"])})
    with torch.no_grad():
        return {"out": block(given["x"]), "means": block.means}


def _ours(name):
    for theirs, ours in NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name

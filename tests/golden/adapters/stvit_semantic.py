"""STViT: semantic tokens and recovery, with the authors' weights."""

from __future__ import annotations

import math

from vistok.vit.stvit_semantic import Recover, SemanticTokens

NAMES = {"param.generate.": "generate.", "param.global.": "globally.", "global_tokens": "queries"}


def run(case):
    given, hyper = case.inputs, case.hyper
    x = given["x"]
    side = math.isqrt(x.shape[1])
    tokens = SemanticTokens(
        hyper["dim"],
        hyper["num_heads"],
        (side, side),
        hyper["window"],
        hyper["samples"],
        hyper["neighbourhood"],
        hyper["mlp_ratio"],
        hyper["shortcut"],
    )
    weights = {}
    for name, value in given.items():
        for theirs, ours in NAMES.items():
            if name.startswith(theirs):
                weights[ours + name.removeprefix(theirs)] = value
    tokens.load_state_dict(weights)
    recover = Recover(hyper["dim"], hyper["num_heads"], hyper["mlp_ratio"])
    start = "param.recover."
    recover.load_state_dict({n.removeprefix(start): v for n, v in given.items() if n.startswith(start)})
    semantic = tokens(x)
    return {"semantic_1": tokens.local(x), "semantic_2": semantic, "recovered": recover(x, semantic)}

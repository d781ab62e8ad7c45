"""One call, its output and its weights, as released."""

from __future__ import annotations

from vistok.attend.infsa import infsa, key_weights, walk_map


def run(case):
    q, k, v = (case.inputs[name] for name in "qkv")
    variant, rho = case.hyper["variant"].removesuffix("_infsa"), case.hyper["rho"]
    scores = walk_map(q, k, rho) if variant == "pure" else rho * key_weights(q, k)
    return {"out": infsa(q, k, v, variant, rho), "scores": scores}

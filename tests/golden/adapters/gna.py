"""Generalised neighbourhood attention, NATTEN's, with its stride."""

from __future__ import annotations

from vistok.attend.gna import GeneralizedNeighborhoodAttention


def run(case):
    given, hyper = case.inputs, case.hyper
    operator = GeneralizedNeighborhoodAttention(
        *(tuple(v) if isinstance(v, list) else v for v in (hyper["kernel"], hyper["stride"], hyper["dilation"])),
        tuple(map(bool, hyper["causal"])) if isinstance(hyper["causal"], list) else bool(hyper["causal"]),
    )
    out, lse = operator(given["q"], given["k"], given["v"], hyper["scale"], return_lse=True, executor="tiles")
    return {"out": out, "lse": lse}

"""Neighbourhood attention, NATTEN's: heads last, windows that shift at borders, the log-sum-exp too."""

from __future__ import annotations

from vistok.attend.faster_na import NeighborhoodAttention


def run(case):
    given, hyper = case.inputs, case.hyper
    operator = NeighborhoodAttention(
        *(tuple(v) if isinstance(v, list) else v for v in (hyper["kernel"], hyper["dilation"])),
        tuple(map(bool, hyper["causal"])) if isinstance(hyper["causal"], list) else bool(hyper["causal"]),
    )
    extra = (given["extra_k"], given["extra_v"]) if "extra_k" in given else None
    out, lse = operator(given["q"], given["k"], given["v"], hyper["scale"], extra, return_lse=True, executor="tiles")
    return {"out": out, "lse": lse}

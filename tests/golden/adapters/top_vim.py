"""ToP-ViM: the ordinary selective scan of the released package."""

from __future__ import annotations

from vistok.core.scan import selective_scan


def run(case):
    given = case.inputs
    optional = {name: given.get(name) for name in ("D", "z", "delta_bias")}
    y, last = selective_scan(
        given["u"],
        given["delta"],
        given["A"],
        given["B"],
        given["C"],
        **optional,
        delta_softplus=case.hyper["softplus"],
        chunk=7,
    )
    return {"y": y, "last_state": last}

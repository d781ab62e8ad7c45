"""Cases whose inputs are fields of Evidence, for systems without an adapter of their own."""

from __future__ import annotations

import vistok
from vistok.host.reducer import Evidence


def run(case):
    hyper = case.hyper
    known = vistok.card(case.metadata["system"]).hyper
    reducer = vistok.create(case.metadata["system"], **{k: v for k, v in hyper.items() if k in known})
    fields = dict(case.inputs)
    if "features" not in fields:  # the projector was left out when the case was recorded
        fields["features"] = fields["encoder_features"]
    grid = tuple(hyper["grid"]) if "grid" in hyper else None
    reduction = reducer.reduce(Evidence(**fields, grid=grid), hyper["keep"])
    return {"keep": reduction.keep, "tokens": reduction.tokens, "source": reduction.source}

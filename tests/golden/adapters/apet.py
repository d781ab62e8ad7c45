"""ApET: the stage before the projector, and the one inside the language model (between ``start`` and the text).

The first farthest point is an input. ``approximate`` has no short cut for all tokens, as the released code
(``parity="authors"``).
"""

from __future__ import annotations

import torch

from vistok.reduce.apet import ApET


def run(case):
    hyper = case.hyper
    system = ApET(basis=hyper["basis"], sampler=hyper.get("sampler", "fps"))
    first = case.inputs["fps_start"]
    if "hidden_states" in case.inputs:
        hidden, span = case.inputs["hidden_states"], slice(hyper["start"], hyper["start"] + hyper["N"])
        reduction = system.approximate(hidden[:, span], hyper["keep"], "error", first)
        kept = [hidden[:, : span.start], reduction.tokens, hidden[:, span.stop :]]
        return {"hidden_states": torch.cat(kept, 1)}
    x = case.inputs["encoder_features"]
    reduction = system.approximate(x, hyper["keep"], "position", first)
    basis_index = system.basis_of(x, hyper["keep"], first)[1]
    return {"keep": reduction.keep, "tokens": reduction.tokens, "basis_index": basis_index}

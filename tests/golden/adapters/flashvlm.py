"""FlashVLM: the projector is a matrix of the case; without ``text`` there is no question. The released gate."""

from __future__ import annotations

from vistok.host.reducer import Evidence
from vistok.reduce.flashvlm import FlashVLM


def run(case):
    given = case.inputs
    x, encoded = given["features"], given["encoder_features"]
    text = given["text"] if "text" in given else x.new_zeros(len(x), 0, x.shape[2])
    mask = given["text_mask"].bool() if "text_mask" in given else None
    evidence = Evidence(
        features=x, encoder_features=encoded, cls_attention=given["cls_attention"], text=text, text_mask=mask
    )
    reduction = FlashVLM(parity="authors").reduce(evidence, case.hyper["keep"])
    kept = encoded.gather(1, reduction.keep[..., None].expand(-1, -1, encoded.shape[2]))
    return {"keep": reduction.keep, "tokens": kept @ given["projector"]}

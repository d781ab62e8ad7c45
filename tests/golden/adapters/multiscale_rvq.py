"""VAR's residual codes of several scales."""

import torch

from tests.golden.bottleneck import like, tokens
from vistok.parts.quantize import MultiScale, VectorQuantizer


def run(case):
    given, hyper = case.inputs, case.hyper
    inner = VectorQuantizer(
        *given["codebook"].shape,
        norm="lookup" if hyper["using_znorm"] else "none",
        commitment=hyper["beta"],
        restart_after=None,
    )
    quantizer = MultiScale(inner, hyper["scales"], mixers=hyper["share_quant_resi"], mix=hyper["quant_resi"]).eval()
    with torch.no_grad():
        inner.codebook.copy_(given["codebook"])
        for i, mixer in enumerate(quantizer.mixers):
            mixer.weight.copy_(given.get(f"phi{i}_weight", torch.zeros_like(mixer.weight)))
            mixer.bias.copy_(given.get(f"phi{i}_bias", torch.zeros_like(mixer.bias)))
    f, side = given["f"], hyper["scales"][-1]
    codes = quantizer(tokens(f), grid=(side, side))
    first = codes.prefix(quantizer.lengths[0])
    return {
        "indices": codes.ids,
        "f_hat": like(codes.z, f),
        "f_hat_first": like(quantizer.ids_to_z(first.ids), f),
        "var_input": quantizer.next_inputs(codes.ids),
        "loss": codes.loss,
    }

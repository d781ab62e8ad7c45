"""VQ on the sphere with either gradient; the averages that queries begin as."""

import torch

from tests.golden.bottleneck import grads, like, tokens
from vistok.parts.quantize import VectorQuantizer
from vistok.tokenize.gigatok import multilevel


def run(case):
    given, hyper = case.inputs, case.hyper
    if "n_level" in hyper:
        return {"tokens": multilevel(given["x"], hyper["n_level"], hyper["first_grow"])}
    quantizer = VectorQuantizer(
        *given["codebook"].shape,
        norm="both" if hyper["l2_norm"] else "none",
        gradient="rotation" if hyper["rotation"] else "straight-through",
        commitment=hyper["beta"],
        entropy=hyper["entropy_loss_ratio"],
        temperature=hyper["entropy_temperature"],
        restart_after=None,
    )
    with torch.no_grad():
        quantizer.codebook.copy_(given["codebook"])
    z = given["z"].requires_grad_()
    codes = quantizer(tokens(z))
    z_q = like(codes.z, z)
    found = {
        "z_q": z_q,
        "indices": codes.ids,
        "codebook_loss": codes.losses["codebook"],
        "commitment_loss": codes.losses["commitment"],
        "grad_z": grads((z_q * given["cotangent"]).sum(), z)[0],
        "grad_codebook": grads(codes.losses["codebook"], quantizer.codebook)[0],
    }
    return found | ({"entropy_loss": codes.losses["entropy"]} if hyper["entropy_loss_ratio"] else {})

"""VQ on the sphere with either gradient."""

import torch

from tests.golden.bottleneck import grads, like, tokens
from vistok.parts.quantize import VectorQuantizer

WAITS = ("gigatok-multilevel",)


def run(case):
    given, hyper = case.inputs, case.hyper
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

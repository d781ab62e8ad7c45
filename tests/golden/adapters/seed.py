"""Plain VQ, with the weight on either term."""

import torch

from tests.golden.bottleneck import grads
from vistok.parts.quantize import VectorQuantizer


def run(case):
    given, hyper = case.inputs, case.hyper
    weights = (hyper["beta"], 1.0) if hyper["legacy"] else (1.0, hyper["beta"])
    quantizer = VectorQuantizer(
        *given["codebook"].shape, codebook=weights[0], commitment=weights[1], restart_after=None
    )
    with torch.no_grad():
        quantizer.codebook.copy_(given["codebook"])
    z = given["z"].requires_grad_()
    codes = quantizer(z)
    grad_z, grad_codebook = grads(codes.loss, z, quantizer.codebook)
    return {
        "z_q": codes.z,
        "indices": codes.ids,
        "loss": codes.loss,
        "grad_z_loss": grad_z,
        "grad_codebook": grad_codebook,
    }

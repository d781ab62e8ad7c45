"""The IBQ quantiser."""

import torch

from tests.golden.bottleneck import grads, like, tokens
from vistok.core.quantize import entropies
from vistok.parts.quantize import IBQuantizer


def run(case):
    given, hyper = case.inputs, case.hyper
    quantizer = IBQuantizer(*given["codebook"].shape, codebook=hyper["beta"], restart_after=None).eval()
    with torch.no_grad():
        quantizer.codebook.copy_(given["codebook"])
    z = given["z"].requires_grad_()
    codes = quantizer(tokens(z))
    z_q, table = like(codes.z, z), quantizer.codebook
    grad_z, grad_codebook = grads((z_q * given["cotangent"]).sum(), z, table)
    grad_z_loss, grad_codebook_loss = grads(codes.loss, z, table)
    found = {
        "z_q": z_q,
        "indices": codes.ids.view(len(z), *z.shape[2:]),
        "loss": codes.loss,
        "grad_z": grad_z,
        "grad_codebook": grad_codebook,
        "grad_z_loss": grad_z_loss,
        "grad_codebook_loss": grad_codebook_loss,
    }
    if hyper["entropy"]:
        sample, batch = entropies(tokens(z), table, hyper["entropy_temperature"], "dot")
        found |= {"sample_entropy": sample, "batch_entropy": batch, "entropy_loss": sample - batch}
    return found

"""Two tables that share their ids, alone and at several scales."""

import torch

from tests.golden.bottleneck import grads, like, tokens
from vistok.parts.quantize import MultiScale, VectorQuantizer


def run(case):
    given, hyper = case.inputs, case.hyper
    widths = (hyper["semantic_dim"], hyper["pixel_dim"])
    ratio = hyper.get("entropy_loss_ratio", 0.0)
    inner = VectorQuantizer(
        hyper["codebook_size"],
        sum(widths),
        norm="both",
        parts=widths,
        weights=(1.0, hyper.get("pixel_distance_weight", 1.0)),
        commitment=hyper.get("beta", 0.25),
        entropy=ratio,
        temperature=hyper.get("entropy_temperature", 0.01),
        restart_after=None,
    )
    with torch.no_grad():
        inner.codebook.copy_(torch.cat([given["codebook_semantic"], given["codebook_pixel"]], 1))
    z = given["z"].requires_grad_()
    if "scales" in hyper:
        return several(case, inner, z)
    codes = inner(tokens(z))
    z_q = like(codes.z, z)
    grad_table = grads(codes.losses["codebook"], inner.codebook)[0].split(widths, 1)
    found = {
        "z_q": z_q,
        "indices": codes.ids.view(len(z), *z.shape[2:]),
        "codebook_loss": codes.losses["codebook"],
        "commitment_loss": codes.losses["commitment"],
        "grad_z": grads((z_q * given["cotangent"]).sum(), z)[0],
        "grad_codebook_semantic": grad_table[0],
        "grad_codebook_pixel": grad_table[1],
    }
    return found | ({"entropy_loss": codes.losses["entropy"]} if ratio else {})


def several(case, inner, z):
    quantizer = MultiScale(inner, case.hyper["scales"], gradient="each").eval()
    codes = quantizer(tokens(z))
    z_q = like(codes.z, z)
    first = codes.prefix(sum(quantizer.lengths[: case.hyper["prefix_scales"]]))
    return {
        "z_q": z_q,
        "indices": codes.ids,
        "z_q_prefix": like(quantizer.ids_to_z(first.ids), z),
        "grad_z": grads((z_q * case.inputs["cotangent"]).sum(), z)[0],
    }

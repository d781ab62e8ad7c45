"""SimVQ."""

import torch

from tests.golden.bottleneck import grads, like, tokens
from vistok.parts.quantize import SimVQuantizer


def run(case):
    given, hyper = case.inputs, case.hyper
    quantizer = SimVQuantizer(
        *given["frozen_codebook"].shape,
        gradient="rotation" if hyper["rotation_trick"] else "straight-through",
        commitment=hyper["input_to_quantize_commit_loss_weight"],
    )
    with torch.no_grad():
        quantizer.frozen.copy_(given["frozen_codebook"])
        quantizer.transform.weight.copy_(given["transform_weight"])
    x = given["x"].requires_grad_()
    codes = quantizer(tokens(x))
    z_q = like(codes.z, x)
    grad_x_loss, grad_transform = grads(codes.loss, x, quantizer.transform.weight)
    return {
        "z_q": z_q,
        "indices": codes.ids.view(len(x), *x.shape[2:]),
        "loss": codes.loss,
        "grad_x": grads((z_q * given["cotangent"]).sum(), x)[0],
        "grad_x_loss": grad_x_loss,
        "grad_transform": grad_transform,
    }

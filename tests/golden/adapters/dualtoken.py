"""Residual stacks and the moving averages of their tables."""

import torch

from tests.golden.bottleneck import grads, projected
from vistok.parts.quantize import EMAQuantizer, Residual


def run(case):
    if "in_dim" in case.hyper:
        return projected(case)
    return ema(case) if "ema_count" in case.inputs else stack(case)


def ema(case):
    given, hyper = case.inputs, case.hyper
    size, dim = given["codebook"].shape
    vq = EMAQuantizer(size, dim, decay=hyper["decay"], eps=hyper["eps"], restart_after=None)
    vq.codebook.copy_(given["codebook"])
    vq.count_average.copy_(given["ema_count"])
    vq.sum_average.copy_(given["ema_sum"])
    codes = vq(given["x"][None])
    assert torch.equal(vq.ids_to_z(codes.ids), codes.z)
    vq.update()
    return {
        "quantized": codes.z[0],
        "indices": codes.ids[0],
        "codebook_after": vq.codebook,
        "ema_count_after": vq.count_average,
        "ema_sum_after": vq.sum_average,
    }


def stack(case):
    x, tables, hyper = case.inputs["x"].requires_grad_(), case.inputs["codebooks"], case.hyper
    assert hyper["shape_divisor"] == 1
    stages = []
    for table in tables:
        stage = EMAQuantizer(*table.shape, commitment=1.0, restart_after=None)
        stage.codebook.copy_(table)
        stages.append(stage)
    quantizer = Residual(stages, hyper["depth"]).eval()
    codes = quantizer(x.flatten(1, 2))
    z_q = codes.z.view_as(x)
    sums = torch.stack([torch.zeros_like(codes.z), *quantizer.partial_sums(codes.ids)])
    each = torch.stack([quantizer.stage(d).ids_to_z(codes.ids[..., d]) for d in range(hyper["depth"])], 2)
    torch.testing.assert_close(sums.diff(dim=0).permute(1, 2, 0, 3), each, atol=1e-5, rtol=1e-5)
    return {
        "z_q": z_q,
        "codes": codes.ids.view(*x.shape[:3], -1),
        "loss": codes.loss,
        "embed_depth": each.view(*x.shape[:3], *each.shape[2:]),
        "grad_z": grads((z_q * case.inputs["cotangent"]).sum(), x)[0],
        "grad_z_loss": grads(codes.loss, x)[0],
    }

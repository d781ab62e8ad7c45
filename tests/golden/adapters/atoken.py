"""FSQ of channels in groups."""

from tests.golden.bottleneck import grads
from vistok.parts.quantize import FSQ

WAITS = ("atoken-rope4d",)


def run(case):
    groups = case.hyper["num_codebooks"]
    fsq = FSQ(case.hyper["levels"], groups)
    z = case.inputs["z"].requires_grad_()
    codes = fsq(z[None])
    assert (fsq.ids_to_z(codes.ids) == codes.z).all()
    every = case.inputs["all_indices"][None]
    return {
        "codes": codes.z[0].detach(),
        "indices": codes.ids[0].view(len(z), groups),
        "grad_z": grads((codes.z[0] * case.inputs["cotangent"]).sum(), z)[0],
        "codes_of_indices": fsq.ids_to_z(every[..., None].expand(-1, -1, groups) if groups > 1 else every)[0],
    }

"""FSQ of channels in groups; rotary positions on four axes."""

from timm.layers import apply_rot_embed_cat

from tests.golden.bottleneck import grads
from vistok.parts.quantize import FSQ
from vistok.tokenize._sparse import rotary


def run(case):
    if "positions" in case.inputs:
        turn = rotary(case.inputs["positions"], case.hyper["head_dim"], case.hyper["base"])[:, None]
        return {f"{name}_out": apply_rot_embed_cat(case.inputs[name], turn) for name in "qk"}
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

"""Signs, in both orders of bits."""

from tests.golden.bottleneck import grads, like, tokens
from vistok.core.quantize import entropies
from vistok.parts.quantize import LFQ


def run(case):
    z, bits = case.inputs["z"].requires_grad_(), case.hyper["bits"]
    quantizer = LFQ(bits, commitment=1.0, entropy=1.0, temperature=case.hyper["temperature"])
    codes = quantizer(tokens(z))
    other = LFQ(bits, bit_order="first-highest")(tokens(z))
    sample, batch = entropies(tokens(z), quantizer.all_codes(), case.hyper["temperature"])
    z_q = like(codes.z, z)
    shape = (len(z), *z.shape[2:])
    return {
        "z_q": z_q,
        "indices": codes.ids.view(shape),
        "indices_msb_first": other.ids.view(shape),
        "sample_entropy": sample,
        "batch_entropy": batch,
        "entropy_loss": codes.losses["entropy"],
        "commitment": codes.losses["commitment"],
        "grad_z": grads((z_q * case.inputs["cotangent"]).sum(), z)[0],
        "grad_z_entropy": grads(codes.losses["entropy"], z)[0],
    }

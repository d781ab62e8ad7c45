"""Plain VQ on and off the sphere, and the meters of codebooks."""

import torch

from tests.golden.bottleneck import grads, like, tokens
from vistok.core import losses
from vistok.core.fidelity import Moments, frechet
from vistok.core.masked import sampling_steps, training_mask
from vistok.core.quantize import count_ids, entropy_bits, soft_lookup, usage
from vistok.parts.quantize import VectorQuantizer
from vistok.tokenize._latents import proxy_head
from vistok.tokenize.titok import TiTokNetwork


def run(case):
    if "codebook" in case.inputs:
        return quantized(case)
    if "pixel_values" in case.inputs:
        return network(case)
    if "mix" in case.inputs:
        return sampled(case)
    if "u_ratio" in case.inputs:
        mask = training_mask(case.inputs["u_ratio"], case.inputs["u_order"])
        return {"mask": mask, "masked_tokens": torch.where(mask, case.hyper["mask_id"], case.inputs["tokens"])}
    if set(case.inputs) == {"indices"}:
        counts = count_ids(case.inputs["indices"], case.hyper["codebook_size"])
        return {"usage": usage(counts), "entropy_bits": entropy_bits(counts)}
    if "features_real" in case.inputs:
        one, two = (Moments().and_of(case.inputs[name]) for name in ("features_fake", "features_real"))
        return {"fid": torch.tensor(frechet(one, two))}
    real, fake = case.inputs["logits_real"], case.inputs["logits_fake"]
    return {
        "hinge_d": losses.hinge_discriminator(real, fake),
        "lecam": losses.lecam(real, fake, case.inputs["ema_real"], case.inputs["ema_fake"]),
    }


def quantized(case):
    given, hyper = case.inputs, case.hyper
    quantizer = VectorQuantizer(
        *given["codebook"].shape,
        norm="both" if hyper["l2_norm"] else "none",
        commitment=hyper["commitment_cost"],
        restart_after=None,
    )
    with torch.no_grad():
        quantizer.codebook.copy_(given["codebook"])
    z = given["z"].requires_grad_()
    codes = quantizer(tokens(z))
    z_q = like(codes.z, z)
    grad_z_loss, grad_codebook = grads(codes.loss, z, quantizer.codebook)
    return {
        "z_q": z_q,
        "indices": codes.ids[:, None],
        "loss": codes.loss,
        "commitment_loss": codes.losses["commitment"],
        "codebook_loss": codes.losses["codebook"],
        "grad_z": grads((z_q * given["cotangent"]).sum(), z)[0],
        "grad_z_loss": grad_z_loss,
        "grad_codebook": grad_codebook,
    }


def network(case):
    given, hyper = case.inputs, case.hyper
    side, width, size = hyper["grid"], hyper["width"], hyper["proxy_codebook_size"]
    model = TiTokNetwork(
        hyper["grid"] * hyper["patch"],
        hyper["patch"],
        width,
        hyper["num_layers"],
        hyper["num_heads"],
        hyper["num_latent_tokens"],
        codes=8,
        dim=hyper["token_size"],
        legacy=hyper["is_legacy"],
    )
    if size is not None:
        model.head = proxy_head(width, size)
    state = {k: v for k, v in given.items() if k.startswith(("encoder.", "decoder.")) or k == "latent_tokens"}
    model.load_published({**state, "quantize.embedding.weight": torch.randn(8, hyper["token_size"])})
    z = model.latents(given["pixel_values"])
    decoded = model.logits(z)
    found = {"z": z.transpose(1, 2)[:, :, None], "decoded": decoded}
    if size is not None:
        soft = soft_lookup(decoded.flatten(2).transpose(1, 2), given["proxy_codebook"])
        found["soft_code"] = soft.transpose(1, 2).unflatten(2, (side, side))
    return found


def sampled(case):
    """The transformer is a bias and a mixture of the tokens' rows of a table."""
    given, hyper = case.inputs, case.hyper
    steps, b, n = given["uniform_confidence"].shape
    draws = iter([u for pair in zip(given["uniform_sample"], given["uniform_confidence"], strict=True) for u in pair])

    def model(ids, conditional):
        base = given["base_cond" if conditional else "base_uncond"]
        return base + torch.einsum("nm,bmk->bnk", given["mix"], given["embed"][ids])

    start = torch.full((b, n), hyper["mask_id"])
    after = sampling_steps(
        model,
        start,
        hyper["mask_id"],
        steps,
        temperature=hyper["randomize_temperature"],
        scale=hyper["guidance_scale"],
        decay=hyper["guidance_decay"],
        power=hyper["guidance_scale_pow"],
        anneal_softmax=hyper["softmax_temperature_annealing"],
        uniform=lambda shape: next(draws),
    )
    *before, last = [start, *after]
    before = torch.stack(before)
    return {"ids": last, "ids_before_step": before, "masked_before_step": (before == hyper["mask_id"]).sum(2)}

"""The decoder on the first tokens."""

from vistok.tokenize._latents import MaskDecoder, proxy_head, renamed


def run(case):
    given, hyper = case.inputs, case.hyper
    decoder = MaskDecoder(
        hyper["grid"],
        hyper["width"],
        hyper["num_layers"],
        hyper["num_heads"],
        hyper["num_latent_tokens"],
        hyper["token_size"],
    )
    head = proxy_head(hyper["width"], hyper["proxy_codebook_size"])
    state = renamed({k: v for k, v in given.items() if k.startswith("decoder.")})
    for module, prefix in ((decoder, "decoder."), (head, "head.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    z = given["z_q"][:, :, 0].transpose(1, 2)
    return {f"decoded_{k}": head(decoder(z[:, :k])) for k in given["lengths"].tolist()}

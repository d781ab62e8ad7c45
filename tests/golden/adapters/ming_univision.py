"""The flow head: its velocity at a probe, and sampling with and without guidance."""

import torch

from vistok.parts.flow_head import LatentHead, published_head


def run(case):
    given, hyper = case.inputs, case.hyper
    head = LatentHead(hyper["channels"], hyper["cond"], hyper["width"], hyper["depth"])
    state = {name.removeprefix("net."): value for name, value in given.items() if name.startswith("net.")}
    head.net.load_state_dict(published_head(state))
    z, noise = given["z"], given["noise"]
    copies = len(z) // len(noise)
    rows = z.chunk(copies)
    sample = head.sample(
        *rows,
        scale=hyper["text_cfg"],
        image_scale=hyper["image_cfg"],
        steps=hyper["steps"],
        shift=hyper["time_shifting_factor"] or 1.0,
        renormed=hyper["cfg_renorm_type"] == "channel",
        noise=noise,
        temperature=hyper["temperature"],
    )
    probe = (noise * hyper["temperature"]).repeat(copies, 1)
    with torch.no_grad():
        velocity = head.net(probe, given["t_probe"], z)
    return {"sample": sample.repeat(copies, 1), "velocity_probe": velocity}

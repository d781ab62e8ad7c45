"""The fusion decoder: causal over [carriers | patches], read early."""

import torch

from vistok.tokenize._holistic import FusionDecoder


def run(case):
    given, hyper = case.inputs, case.hyper
    decoder = FusionDecoder(
        hyper["n_carrier"],
        hyper["grid"],
        hyper["shift_k"],
        hyper["dim"],
        depth=hyper["depth"],
        heads=hyper["heads"],
        mlp=hyper["mlp"],
    )
    state = {
        "positions": given["decoder.position_embedding"],
        "carrier_positions": given["decoder.slot_position_embedding"],
    }
    for end in ("weight", "bias"):
        state[f"stack.norm.{end}"] = given[f"decoder.norm.{end}"]
        for i in range(hyper["depth"]):
            theirs, ours = f"decoder.transformer.layers.{i}.", f"stack.blocks.{i}."
            q, k, v = (given[f"{theirs}attn1.{x}_proj.{end}"] for x in "qkv")
            state[f"{ours}attn.qkv.{end}"] = torch.cat([q, k, v])
            state[f"{ours}attn.proj.{end}"] = given[f"{theirs}attn1.out_proj.{end}"]
            gate, value = given[f"{theirs}ffnet.w12.{end}"].chunk(2)
            state[f"{ours}mlp.fc1_g.{end}"], state[f"{ours}mlp.fc1_x.{end}"] = gate, value
            state[f"{ours}mlp.fc2.{end}"] = given[f"{theirs}ffnet.w3.{end}"]
            for norm in ("norm1", "norm2"):
                state[f"{ours}{norm}.{end}"] = given[f"{theirs}{norm}.{end}"]
    decoder.load_state_dict(state)
    z = given["z"]
    found = decoder.eval()(given["carriers"], z.flatten(2).transpose(1, 2))
    return {"z_out": found.transpose(1, 2).view_as(z)}

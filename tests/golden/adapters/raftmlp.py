"""RaftMLP's stages, with both embeddings and with a map that is resized, and a whole network without shortcuts."""

from __future__ import annotations

import re

import torch
from torch import nn

from vistok.attend.raftmlp import Block, MultiScalePatchEmbed, RaftMLP, RaftTokenMixer
from vistok.parts.token_stage import TokenStage

PLACES = ("mixer.vertical", "mixer.horizontal", "")
LAYERS = {"norm.1": "norm", "norm": "norm", "fn.0": "mlp.0", "fn.3": "mlp.2"}


def run(case):
    hyper = case.hyper
    state = {n.removeprefix("param."): t for n, t in case.inputs.items() if n.startswith("param.")}
    with torch.no_grad():
        if "layers" not in hyper:
            stage = _stage(hyper)
            stage.load_state_dict(_published(state, hyper["in_channels"], hyper["patch"]))
            return {"out": stage(case.inputs["x"])}
        dims, _, kernels = zip(*hyper["layers"], strict=True)
        wide, narrow = state["levels.0.fn.2.5.fn.0.weight"].shape
        shape = dict(kernels=kernels, depths=(1,) * len(dims), channel_expansion=wide // narrow)
        system = RaftMLP(image=hyper["image"], drop_path=0.0, **shape)
        net = system.of(dims, hyper["classes"]).eval()
        ours = {n.replace("classifier", "head").replace("heads.0.1", "norm"): t for n, t in state.items()
                if not n.startswith("levels.")}  # fmt: skip
        for i in range(len(dims)):
            of = f"levels.{i}."
            level = {n.removeprefix(of): t for n, t in state.items() if n.startswith(of)}
            ours |= {f"stages.{i}.{n}": t for n, t in _published(level, 0, 0).items()}
        net.load_state_dict(ours)
        return {"logits": net(case.inputs["x"])}


def _stage(hyper) -> nn.Module:
    kernels = hyper["kernels"] if hyper["embedding"] == "emb_cross_mlp" else [hyper["patch"]]
    side, dim = hyper["image"] // hyper["patch"], hyper["dim"]
    shape = dim, side, side, hyper["raft"], hyper["token_expansion"]
    blocks = [Block(dim, RaftTokenMixer(*shape), hyper["channel_expansion"]) for _ in range(hyper["depth"])]
    return TokenStage(MultiScalePatchEmbed(hyper["in_channels"], dim, kernels), blocks)


def _published(state, channels, patch):
    """The authors' state of a stage under our names. A mixer's patch is (row, column, channel) there."""
    ours, found = {}, {}
    for name, t in state.items():
        if matched := re.fullmatch(r"fn\.2\.(\d+)\.(.*)\.(weight|bias)", name):
            found.setdefault(int(matched[1]), {})[LAYERS[matched[2]] + "." + matched[3]] = t
        elif name == "fn.1.weight":
            pixels = t.unflatten(1, (patch, patch, channels))
            ours["embed.fc.weight"] = pixels.permute(0, 3, 1, 2).flatten(1)
        else:
            ours["embed.fc." + name.rpartition(".")[2]] = t
    for place, number in enumerate(sorted(found)):
        block, part = divmod(place, 3)
        start = ".".join(filter(None, (f"blocks.{block}", PLACES[part])))
        ours |= {f"{start}.{n}": t for n, t in found[number].items()}
    return ours

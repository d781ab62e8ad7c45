"""EViT: the authors' block on a class token and patches against a timm block with ours in it; and the schedule."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vistok
from vistok.host.vit import TokenState, ViTEvidence
from vistok.host.vit.engine import Run
from vistok.vit.evit import EViT, KeepRateSchedule


def run(case) -> dict[str, Tensor]:
    return schedule(case) if "keep_rate" in case.outputs else block(case)


def schedule(case) -> dict[str, Tensor]:
    hyper = case.hyper
    start = hyper["warmup_epochs"]
    rate = KeepRateSchedule(hyper["base"], start, hyper["total_epochs"] - start, hyper["max"])
    epochs = case.inputs["iteration"] / hyper["iters_per_epoch"]
    return {"keep_rate": torch.tensor([rate(float(epoch)) for epoch in epochs])}


def block(case) -> dict[str, Tensor]:
    hyper, x = case.hyper, case.inputs["x"]
    patches = x.shape[1] - 1
    model = VisionTransformer(
        img_size=(1, patches),
        patch_size=1,
        embed_dim=hyper["dim"],
        depth=1,
        num_heads=hyper["num_heads"],
        mlp_ratio=hyper["mlp_ratio"],
        num_classes=0,
    ).eval()
    given = {n.removeprefix("param."): t for n, t in case.inputs.items() if n.startswith("param.")}
    model.blocks[0].load_state_dict(given)
    seen: dict[str, Tensor] = {}

    class Watched(EViT):
        def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
            seen.update(after_attention=state.x, cls_attention=evidence.class_row)
            return super().reduce(state, evidence, count)

    keep = hyper["keep_rate"] if hyper["keep"] is None else hyper["keep"]
    method = Watched(keep=keep, layers=(0,), fuse=hyper["fuse"], order="author")
    with torch.no_grad(), vistok.apply(model, method) as session:
        model.blocks[0].norm2.register_forward_pre_hook(lambda module, args: seen.update(reorganized=args[0]))
        session._engine.log.run = Run((1, patches))
        tokens = model.blocks(x)
        state = session.states[-1]
    kept = state.anchor[:, : state.num_slots - hyper["fuse"]]
    return seen | {"tokens": tokens, "keep": kept}

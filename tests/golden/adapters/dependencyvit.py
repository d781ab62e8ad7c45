"""A block of the third-party port (the authors published no code); the note says which of its revisions."""

from __future__ import annotations

import torch

from vistok.attend.dependencyvit import DependencyBlock, dependency_map


def run(case):
    hyper, given = case.hyper, case.inputs
    state = {n.removeprefix("param."): t for n, t in given.items() if n.startswith("param.")}
    state = {n.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.2."): t for n, t in state.items()}
    i, ratio = hyper["prune_index"], hyper["prune_ratio"]
    keep = (1 - i * ratio) / (1 - (i - 1) * ratio) if i else 1.0
    by_message = "score = the cumulative message" in case.metadata["note"]
    hidden = state["mlp.0.weight"].shape[0]
    block = DependencyBlock(
        hyper["dim"], hyper["heads"], hidden / hyper["dim"], keep, "message" if by_message else "received"
    )
    block.load_state_dict(state)
    x, message = given["x"], given["message"]
    with torch.no_grad():
        normed = block.norm1(x)
        q, k, _, selector, after = block.attn.parts(normed, message)
        out, messages, kept = block(x, message)
        return {
            "attention_out": block.attn(normed, message)[0],
            "dependency": dependency_map(q, k, selector, after),
            "score": after if by_message else block.attn.received(normed, message),
            "out": out,
            "message": messages,
            "keep": kept,
        }

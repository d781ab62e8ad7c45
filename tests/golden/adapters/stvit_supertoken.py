"""STViT with super tokens: the attention and a whole block, with the authors' weights."""

from __future__ import annotations

from vistok.core.supertoken import associate
from vistok.vit.stvit_supertoken import SuperTokenAttention, SuperTokenBlock


def run(case):
    given, hyper = dict(case.inputs), case.hyper
    x, cell = given.pop("x"), tuple(hyper["cell"])
    weights = {name.removeprefix("param."): value for name, value in given.items()}
    if "refine" not in hyper:
        block = SuperTokenBlock(hyper["dim"], hyper["num_heads"], cell, hyper["n_iter"], hyper["mlp_ratio"]).eval()
        block.load_state_dict(weights | {"norm2.num_batches_tracked": block.norm2.num_batches_tracked})
        placed = block.pos_embed(x)
        attention = block.attn(block.norm1(placed))
        return {
            "attention_input": block.norm1(placed),
            "attention_output": attention,
            "after_attention": placed + attention,
            "output": block(x),
        }
    attention = SuperTokenAttention(
        hyper["dim"], hyper["num_heads"], cell, hyper["n_iter"], hyper["refine"], hyper["qkv_bias"]
    )
    attention.load_state_dict(weights)
    return {"output": attention(x), "super_tokens": associate(x, cell, hyper["n_iter"])[0]}

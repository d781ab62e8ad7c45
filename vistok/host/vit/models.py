"""Which vision transformers a method can be put into, and where their parts are.

A block must be of the form ``x = x + attention(norm(x)); x = x + mlp(norm(x))``, whatever scales, drops or turns stand
in its branches. Models are told by the names of their classes, so that timm and transformers are imported only by
those who use them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vistok.host.hosts.base import UnsupportedModel


@dataclass(frozen=True)
class Block:
    """One block, as hooks see it."""

    module: Any
    attention: Any
    query: Any
    key: Any
    """What leaves queries and keys; see ``ViT.heads``."""
    value: Any
    """What leaves the values, or what they are made of."""
    values: Callable[[Tensor], Tensor]
    """What ``value`` left, to values (B, Hk, T, d)."""
    norm: Any
    """The second norm: it is given what attention left."""
    branch: Any
    """What the MLP's branch leaves last, before it is added."""
    mlp: Any


@dataclass(frozen=True)
class ViT:
    """A supported model."""

    tower: Any
    """The transformer without the heads around it."""
    blocks: tuple[Block, ...]
    patches: Any
    """Is given the pixels (B, C, H, W)."""
    patch: tuple[int, int]
    """Pixels of a patch, down and across."""
    pads: bool
    """Whether pictures are padded to whole patches; they are cut otherwise."""
    final: Any
    """Leaves the tokens that dense heads read: the last norm, or the last block."""
    prefix: int
    class_token: bool
    mask: str
    """The blocks' argument for an additive attention mask (B, 1, 1, T)."""
    rotary: str | None
    """The blocks' argument for rotary angles of the N patches, None where positions are added at the input."""
    heads: Callable[[Any, Tensor], Tensor]
    """(attention, output of ``query`` or ``key``) to (B, H, T, d), before any turning."""
    turn: Callable[[Any, Tensor, Any], Tensor]
    """(attention, queries or keys, rotary angles) turned."""
    fused: bool
    """Whether attention runs on a kernel that takes no additive mask (flash attention, flex attention)."""

    @property
    def width(self) -> int:
        """C, the channels of a token."""
        weight: Tensor = self.blocks[0].norm.weight
        return weight.numel()

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """(h, w) patches of ``pixels`` (B, C, H, W)."""
        (height, width), (down, across) = pixels.shape[-2:], self.patch
        if self.pads:
            return -(-height // down), -(-width // across)
        return height // down, width // across


def is_vit(model: Any) -> bool:
    """Whether ``model`` is a vision transformer that ``vit_of`` knows."""
    return _spec(model) is not None


def vit_of(model: nn.Module) -> ViT:
    """The parts of ``model``. Raises UnsupportedModel, which names what is supported."""
    spec = _spec(model)
    if spec is None:
        names = ["timm VisionTransformer (ViT, DeiT, CLIP, SigLIP, DINOv2)", "timm Eva (EVA, EVA-02, DINOv3)"]
        raise UnsupportedModel(
            f"{type(model).__name__}: not a vision transformer that methods of the vit family can be put into (yet). "
            f"Supported are {', '.join([*names, *_TOWERS, *_INSIDE])}."
        )
    return spec(model)


def _spec(model: Any) -> Callable[[Any], ViT] | None:
    for cls in type(model).__mro__:
        if cls.__module__ == "timm.models.vision_transformer" and cls.__name__ == "VisionTransformer":
            return _timm
        if cls.__module__ == "timm.models.eva" and cls.__name__ == "Eva":
            return _timm
        if cls.__module__.startswith("transformers.models."):
            if cls.__name__ in _TOWERS:
                return _transformers
            if cls.__name__ in _INSIDE:
                return partial(_inner, _INSIDE[cls.__name__])
    return None


# timm -----------------------------------------------------------------------------------------------------------------


def _timm(model: Any) -> ViT:
    name = type(model).__name__
    eva = any(cls.__name__ == "Eva" for cls in type(model).__mro__)
    blocks = []
    for block in model.blocks:
        kind, attention = type(block).__name__, type(getattr(block, "attn", None)).__name__
        if kind not in ("Block", "EvaBlock") or attention not in ("Attention", "AttentionRope", "EvaAttention"):
            raise UnsupportedModel(
                f"{name} with blocks {kind} of {attention}: only pre-norm blocks with one attention and one MLP are "
                "supported (Block, EvaBlock with Attention, AttentionRope, EvaAttention)"
            )
        attn = block.attn
        value, values = _timm_values(block)
        norm, branch = block.norm2, block.drop_path2
        blocks.append(Block(block, attn, attn.q_norm, attn.k_norm, value, values, norm, branch, block.mlp))
    if not any(cls.__name__ == "PatchEmbed" for cls in type(model.patch_embed).__mro__):
        raise UnsupportedModel(
            f"{name} with patches of {type(model.patch_embed).__name__}: only those of a PatchEmbed are known to lie "
            "on a grid of whole patches"
        )
    size = model.patch_embed.patch_size
    return ViT(
        tower=model,
        blocks=tuple(blocks),
        patches=model.patch_embed,
        patch=(size, size) if isinstance(size, int) else tuple(size),
        pads=bool(getattr(model.patch_embed, "dynamic_img_pad", False)),
        final=model.norm,
        prefix=model.num_prefix_tokens,
        class_token=model.cls_token is not None,
        mask="attn_mask",
        rotary="rope" if eva else None,
        heads=lambda attention, x: x,
        turn=_timm_turn,
        fused=False,
    )


def _timm_values(block: Any) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """``Block.value`` and ``Block.values``. EvaAttention with biases calls no module for its values: they are computed
    from the attention's input, if asked for."""
    attention = block.attn
    split = partial(_heads, attention)
    if attention.qkv is None:
        return attention.v_proj, split
    if getattr(attention, "v_bias", None) is None:
        return attention.qkv, lambda x: split(x.chunk(3, -1)[2])
    width = len(attention.v_bias)
    return block.norm1, lambda x: split(linear(x, attention.qkv.weight[-width:], attention.v_bias))


def _timm_turn(attention: Any, x: Tensor, angles: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix = attention.num_prefix_tokens
    turned = apply_rot_embed_cat(x[:, :, prefix:], angles, half=getattr(attention, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], turned], 2).to(x.dtype)


# transformers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """Where the parts of a tower of transformers are, as dotted names."""

    layers: str
    norm: str
    branch: str
    final: str
    """"" where the tower leaves its tokens as the last block does."""
    attention: str = "attention"
    patches: str = "embeddings.patch_embeddings"
    rotary: str | None = None
    prefix: Callable[[Any], int] = lambda config: 1


_DINO = _Names("encoder.layer", "norm2", "drop_path", "layernorm")
_TOWERS: Mapping[str, _Names] = {
    "ViTModel": _Names("layers", "layernorm_after", "dropout", "layernorm"),
    "DeiTModel": _Names("layers", "layernorm_after", "dropout", "layernorm", prefix=lambda config: 2),
    "Dinov2Model": _DINO,
    "Dinov2WithRegistersModel": _Names(
        "encoder.layer", "norm2", "drop_path", "layernorm", prefix=lambda config: 1 + config.num_register_tokens
    ),
    "DINOv3ViTModel": _Names(
        "model.layer",
        "norm2",
        "drop_path",
        "norm",
        rotary="position_embeddings",
        prefix=lambda config: 1 + config.num_register_tokens,
    ),
    "CLIPVisionModel": _Names("encoder.layers", "layer_norm2", "mlp", "", "self_attn", "embeddings.patch_embedding"),
    "SiglipVisionModel": _Names(
        "encoder.layers",
        "layer_norm2",
        "mlp",
        "post_layernorm",
        "self_attn",
        "embeddings.patch_embedding",
        prefix=lambda config: 0,
    ),
}
_INSIDE: Mapping[str, str] = {
    "ViTForImageClassification": "vit",
    "DeiTForImageClassification": "deit",
    "DeiTForImageClassificationWithTeacher": "deit",
    "Dinov2ForImageClassification": "dinov2",
    "Dinov2WithRegistersForImageClassification": "dinov2_with_registers",
    "CLIPModel": "vision_model",
    "CLIPVisionModelWithProjection": "vision_model",
    "CLIPForImageClassification": "vision_model",
    "SiglipModel": "vision_model",
    "SiglipForImageClassification": "vision_model",
}
"""Models around a tower, and the name of the tower in them."""


def _inner(name: str, model: Any) -> ViT:
    return _transformers(getattr(model, name))


def _transformers(tower: Any) -> ViT:
    names = next(_TOWERS[cls.__name__] for cls in type(tower).__mro__ if cls.__name__ in _TOWERS)
    blocks = []
    for layer in tower.get_submodule(names.layers):
        attention = getattr(layer, names.attention)
        norm, branch = getattr(layer, names.norm), getattr(layer, names.branch)
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        blocks.append(Block(layer, attention, q, k, v, partial(_heads, attention), norm, branch, layer.mlp))
    size = tower.config.patch_size
    prefix = names.prefix(tower.config)
    implementation = tower.config._attn_implementation
    return ViT(
        tower=tower,
        blocks=tuple(blocks),
        patches=tower.get_submodule(names.patches),
        patch=(size, size) if isinstance(size, int) else tuple(size),
        pads=False,
        final=tower.get_submodule(names.final) if names.final else blocks[-1].module,
        prefix=prefix,
        class_token=prefix > 0,
        mask="attention_mask",
        rotary=names.rotary,
        heads=_heads,
        turn=_transformers_turn,
        fused=implementation not in ("sdpa", "eager", None),
    )


def _heads(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _transformers_turn(attention: Any, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    turned: Tensor = sys.modules[type(attention).__module__].apply_rotary_pos_emb(x, x, *angles)[0]
    return turned

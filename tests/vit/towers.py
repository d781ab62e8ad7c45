"""Small untrained vision transformers, one of each kind that the host knows: 8 x 8 patches, 6 blocks, width 32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import transformers
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vistok

DEPTH, WIDTH, HEADS, GRID = 6, 32, 4, (8, 8)
PATCHES = GRID[0] * GRID[1]


@dataclass(frozen=True)
class Kind:
    """How to make one, and what its dense output is."""

    name: str
    make: Callable[..., nn.Module]
    prefix: int
    dense: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    """(B, P + tokens, C) of (B, 3, 32, 32) pixels."""

    def build(self, **changes) -> nn.Module:
        torch.manual_seed(0)
        model = self.make(**changes)
        with torch.no_grad():  # untrained weights are so small that attention is nearly uniform
            for name, p in model.named_parameters():
                if p.ndim > 1:
                    p.normal_(std=0.2)
                elif "lambda" in name or "gamma" in name:
                    p.uniform_(0.5, 1.0)
        return model.eval()


def timm(cls=VisionTransformer, **given):
    def make(**changes):
        size = dict(img_size=32, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=5)
        return cls(**size | given | changes)

    return make


def hugging(cls, config, **given):
    def make(**changes):
        size = dict(
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=2 * WIDTH,
            image_size=32,
            patch_size=4,
        )
        made = getattr(transformers, config)(**size | given | changes)
        made._attn_implementation = "sdpa"
        return getattr(transformers, cls)(made)

    return make


def features(model, pixels):
    return model.forward_features(pixels)


def last(model, pixels):
    inner = {"vit", "dinov2", "vision_model"} & {name for name, _ in model.named_children()}
    tower = getattr(model, inner.pop()) if inner else model
    return tower(pixels).last_hidden_state


KINDS = {
    kind.name: kind
    for kind in (
        Kind("timm-vit", timm(), 1, features),
        Kind("timm-deit-distilled", timm(VisionTransformerDistilled), 2, features),
        Kind("timm-registers", timm(reg_tokens=4, init_values=1e-1, qk_norm=True, drop_path_rate=0.2), 5, features),
        Kind("timm-no-class", timm(class_token=False, global_pool="map"), 0, features),
        Kind("timm-average", timm(global_pool="avg", pre_norm=True), 1, features),
        Kind("timm-eva", timm(Eva, use_abs_pos_emb=False, use_rot_pos_emb=True, init_values=0.1), 1, features),
        Kind(
            "timm-eva02",
            timm(Eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, drop_path_rate=0.2),
            1,
            features,
        ),
        Kind(
            "timm-dinov3",
            timm(
                Eva,
                num_reg_tokens=4,
                use_abs_pos_emb=False,
                use_rot_pos_emb=True,
                rope_type="dinov3",
                rope_rotate_half=True,
                init_values=0.1,
            ),
            5,
            features,
        ),
        Kind("timm-rope-mixed", timm(Eva, attn_type="rope", use_rot_pos_emb=True, rope_type="mixed"), 1, features),
        Kind("vit", hugging("ViTModel", "ViTConfig", hidden_dropout_prob=0.1), 1, last),
        Kind("vit-classifier", hugging("ViTForImageClassification", "ViTConfig", num_labels=5), 1, last),
        Kind("deit", hugging("DeiTModel", "DeiTConfig"), 2, last),
        Kind("dinov2", hugging("Dinov2Model", "Dinov2Config", mlp_ratio=2, drop_path_rate=0.2), 1, last),
        Kind("dinov2-classifier", hugging("Dinov2ForImageClassification", "Dinov2Config", num_labels=5), 1, last),
        Kind("dinov2-registers", hugging("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"), 5, last),
        Kind("dinov3", hugging("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4), 5, last),
        Kind("clip", hugging("CLIPVisionModel", "CLIPVisionConfig"), 1, last),
        Kind("siglip", hugging("SiglipVisionModel", "SiglipVisionConfig"), 0, last),
        Kind("siglip-classifier", lambda **changes: siglip_classifier(**changes), 0, last),
    )
}


def siglip_classifier(**changes):
    text = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=WIDTH)
    vision = dict(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        image_size=32,
        patch_size=4,
    )
    config = transformers.SiglipConfig(text_config=text, vision_config=vision | changes, num_labels=5)
    return transformers.SiglipForImageClassification(config)


@cache
def built(name: str) -> nn.Module:
    """The model of that kind, shared: leave it as it is."""
    return KINDS[name].build()


def pixels(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The model's blocks, found without the host: the longest list of modules in it."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) == DEPTH]
    return lists[-1] if len(lists) == 1 else max(lists, key=lambda m: sum(1 for _ in m.parameters()))


def outputs(result) -> list[torch.Tensor]:
    """All tensors that a model returned."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tuple):
        return [t for t in result if isinstance(t, torch.Tensor)]
    return [t for t in result.values() if isinstance(t, torch.Tensor)]


def half(name: str, **hyper):
    """The system ``name`` with half of the patches: at blocks 1 and 3 where it acts at a few."""
    layers = {"layers": (1, 3)} if "layers" in vistok.card(name).hyper else {}
    return vistok.create(name, **{"keep": 0.5} | layers | hyper)

"""Small vision transformers of the zoo: timm's own class, kept in timm's own format (config.json, model.safetensors).

One encoder, three uses, none of which needs a class of its own: a classifier reads the class token by the model's
``head`` (``model(pixels)``); a segmenter reads every patch by the same ``head`` (``segment``); a model for retrieval
has no ``head``, and its patches are pooled to a descriptor (``describe``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import ModelNotFound, locate, shipped

if TYPE_CHECKING:
    from timm.models import VisionTransformer

Pooling: TypeAlias = Literal["gem", "mean", "class"]
IMAGE_SIZE, PATCH, WIDTH, DEPTH, HEADS = 96, 8, 96, 12, 3
GEM_POWER = 3.0
_ARCHITECTURE = "vit_tiny_patch16_224"


def build_vit(classes: int) -> VisionTransformer:
    """An untrained VisionTransformer: 96 px, 144 patches of 8 px and a class token, 12 blocks of width 96 and 3 heads.

    ``classes``: outputs of its head; 0 for none. The blocks are as many as those of DeiT, so that the block numbers of
    papers stand for what they stand for there.
    """
    import timm

    args = dict(img_size=IMAGE_SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    seen = dict(tag="vistok", input_size=(3, IMAGE_SIZE, IMAGE_SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    return timm.create_model(_ARCHITECTURE, pretrained=False, pretrained_cfg_overlay=seen, num_classes=classes, **args)


def save_vit(model: VisionTransformer, folder: str | Path, classes: Sequence[str] = ()) -> Path:
    """Write ``model`` in float16 as a timm folder; ``classes``: names of its outputs. Returns the folder.

    ``timm.create_model("local-dir:" + folder, pretrained=True)`` and ``load_vit(folder)`` read it.
    """
    from timm.models import save_for_hf

    encoder = model.patch_embed
    args = dict(
        img_size=encoder.img_size[0],
        patch_size=encoder.patch_size[0],
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        num_classes=model.num_classes,
    )
    told = {"label_names": list(classes)} if classes else {}
    path = Path(folder)
    slim = copy.deepcopy(model).half()
    save_for_hf(slim, path, model_config=told, model_args=args, safe_serialization=True)
    return path


def load_vit(name: str | Path = "vistok-vit", *, dtype: str = "auto", device: str | None = None) -> VisionTransformer:
    """The shipped vision transformer ``name``, or that of a timm folder, in evaluation mode.

    ``dtype``: "auto" is float32 on a CPU and float16 elsewhere; or a torch dtype's name. Only safetensors weights are
    read. Raises ModelNotFound.
    """
    import timm
    from safetensors.torch import load_file

    folder = Path(locate(name))
    if not holds_vit(folder):
        raise ModelNotFound(
            f"model: {name} is not a folder with a timm model (config.json that names its architecture, and "
            f"model.safetensors), nor one of {', '.join(shipped('vit'))}"
        )
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = ("float32" if place == "cpu" else "float16") if dtype == "auto" else dtype
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=False)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ModelNotFound(f"model: {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(place, getattr(torch, wanted)).eval()


def begun_as_classifier(classes: int) -> VisionTransformer:
    """The shipped vistok-vit with an untrained head of ``classes`` outputs, 0 for none, to be trained on."""
    model = load_vit("vistok-vit", device="cpu")
    model.reset_classifier(classes)
    return model


def holds_vit(folder: str | Path) -> bool:
    """Whether the folder holds a model in timm's format."""
    config = Path(folder) / "config.json"
    if not config.is_file() or not (Path(folder) / "model.safetensors").is_file():
        return False
    try:
        return "architecture" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False


def class_names(name: str | Path) -> list[str]:
    """Names of the outputs of a model, as its configuration gives them; [] where it gives none."""
    config = json.loads((Path(locate(name)) / "config.json").read_text(encoding="utf-8"))
    return list(config.get("label_names", []))


def to_pixels(images: NDArray[np.uint8] | Tensor, like: nn.Module | None = None) -> Tensor:
    """(B, 3, H, W) in -1 .. 1 from (B, H, W, 3) uint8; float32, or dtype and device of the model ``like``."""
    given = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
    if given.ndim != 4 or given.shape[3] != 3 or given.dtype != torch.uint8:
        raise ValueError(f"images: got {given.dtype} {tuple(given.shape)}, must be uint8 (B, H, W, 3)")
    weight = None if like is None else next(like.parameters())
    scaled = (given if weight is None else given.to(weight.device)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return scaled if weight is None else scaled.to(weight.dtype)


def patch_rows(model: Any, pixels: Tensor) -> Tensor:
    """(B, N, C) normalised last features of the patches, of those that are left where a method is in the model."""
    return model.forward_features(pixels)[:, model.num_prefix_tokens :]


def segment(model: Any, pixels: Tensor) -> Tensor:
    """(B, classes, H, W) logits: the head on every patch, bilinearly enlarged to the pictures' size.

    ``pixels``: (B, 3, H, W). Under ``vistok.apply`` every patch needs its row again (``restore="nearest"`` or "zeros").
    Raises ValueError where rows are missing.
    """
    rows = patch_rows(model, pixels)
    height, width = (side // patch for side, patch in zip(pixels.shape[2:], model.patch_embed.patch_size, strict=True))
    if rows.shape[1] != height * width:
        raise ValueError(
            f"rows: got {rows.shape[1]} of {height * width} patches, must be all: give vistok.apply restore='nearest'"
        )
    logits = model.head(model.fc_norm(rows)).transpose(1, 2).unflatten(2, (height, width))
    return nn.functional.interpolate(logits.float(), size=pixels.shape[2:], mode="bilinear", align_corners=False)


def describe(model: Any, pixels: Tensor, pooling: Pooling = "gem") -> Tensor:
    """(B, C) float32 descriptors of length 1: patches pooled by generalised mean ("gem", power 3 of what is above 0) or
    "mean", or the "class" token. Works on the patches that are left where a method is in the model."""
    if pooling not in ("gem", "mean", "class"):
        raise ValueError(f"pooling: got {pooling!r}, must be 'gem', 'mean' or 'class'")
    tokens = model.forward_features(pixels).float()
    rows = tokens[:, model.num_prefix_tokens :]
    if pooling == "class":
        pooled = tokens[:, 0]
    elif pooling == "mean":
        pooled = rows.mean(1)
    else:
        pooled = rows.clamp(min=1e-6).pow(GEM_POWER).mean(1).pow(1 / GEM_POWER)
    return nn.functional.normalize(pooled, dim=1)

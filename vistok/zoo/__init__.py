"""Small models that this project trained: their recipes, and their weights as ordinary Hugging Face folders.

``load("vistok-tiny")`` and ``load("llava-hf/llava-1.5-7b-hf")`` go the same way: ``AutoModelForImageTextToText``.
``load("vistok-vit")`` is a vision transformer of timm (``vistok.zoo.vit``), ``load("titok-tiny")`` a visual tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin, TorchAoConfig

MODELS, RECIPES = Path(__file__).parent / "models", Path(__file__).parent / "recipes"
DEFAULT = "vistok-tiny"


class ModelNotFound(LookupError):
    """A name that is neither a shipped model, nor a folder with a model, nor a reachable model of the hub."""


def shipped(kind: Literal["vlm", "vit", "tokenizer"] = "vlm") -> list[str]:
    """Names of the models inside the package: vision-language models, vision transformers, or visual tokenizers."""
    folders = (file.parent for file in MODELS.glob("*/config.json"))
    return sorted(folder.name for folder in folders if _kind(folder) == kind)


def _kind(folder: Path) -> str:
    if folder.joinpath("processor_config.json").exists():
        return "vlm"
    return "tokenizer" if "tokenizer" in json.loads(folder.joinpath("config.json").read_text("utf-8")) else "vit"


def locate(name: str | Path) -> str:
    """What ``from_pretrained`` takes for ``name``: a shipped model's folder, a folder as given, or a hub name.

    Raises ModelNotFound if ``name`` is a folder without a configuration or without safetensors weights, or if it can
    be neither a folder nor a hub name.
    """
    if str(name) in _everything():
        return str(MODELS / str(name))
    path = Path(name).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"model: {name} is not a model folder, it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise ModelNotFound(f"model: {name} has no weights (*.safetensors)")
        return str(path)
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return str(name)
    if (RECIPES / f"{str(name).replace('-', '_')}.py").is_file():
        raise ModelNotFound(f"model: {name} is not shipped; `vistok train {name}` makes it, then name its folder")
    known = ", ".join(_everything())
    raise ModelNotFound(f"model: {name} is neither a folder, a hub name (owner/name), nor one of {known}")


def _everything() -> list[str]:
    return [*shipped(), *shipped("vit"), *shipped("tokenizer")]


def load_vit(name: str | Path = "vistok-vit", *, dtype: str = "auto", device: str | None = None) -> Any:
    """The vision transformer ``name`` of the zoo, or of a timm folder; see ``vistok.zoo.vit.load_vit``."""
    from .vit import load_vit as load_it

    return load_it(name, dtype=dtype, device=device)


def load(
    name: str | Path = DEFAULT,
    *,
    dtype: str = "auto",
    device: str | None = None,
    weights: str | None = None,
) -> PreTrainedModel:
    """The model ``name`` in evaluation mode. ``dtype``: "auto" as saved, but float32 on a CPU; or a torch dtype's name.

    ``weights``: those of the linear layers in so many bits, by torchao ("int8": a scale a row; "int4": one for 32
    values, kept in bytes while it runs); activations stay in ``dtype``. Only safetensors weights are read and no code
    of the model's folder is run. A folder with a vision transformer of timm goes to ``load_vit``, one with a tokenizer
    to ``vistok.parts.tokenizer.load_tokenizer``. Raises ModelNotFound, and ValueError for other ``weights`` (these two
    take None).
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from vistok.parts.tokenizer import holds_tokenizer, load_tokenizer

    from .vit import holds_vit

    if holds_tokenizer(locate(name)):
        if weights is not None or dtype not in ("auto", "float32"):
            raise ValueError(
                f"dtype, weights: got {dtype!r} and {weights!r}, must be 'float32' and None for a tokenizer"
            )
        made: Any = load_tokenizer(locate(name))
        return made.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if holds_vit(locate(name)):
        if weights is not None:
            raise ValueError(f"weights: got {weights!r}, must be None for a vision transformer")
        return load_vit(name, dtype=dtype, device=device)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = "float32" if dtype == "auto" and place == "cpu" else dtype
    how = {} if weights is None else {"quantization_config": _quantized(weights)}
    try:
        model = AutoModelForImageTextToText.from_pretrained(locate(name), dtype=wanted, use_safetensors=True, **how)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"model: {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(place).eval()


def _quantized(weights: str) -> TorchAoConfig:
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    if weights not in ("int8", "int4"):
        raise ValueError(f"weights: got {weights!r}, must be 'int8', 'int4' or None")
    if weights == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    four: torch.dtype = torch.int4  # type: ignore[attr-defined]  # its stubs leave it out
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(32)))


def load_processor(name: str | Path = DEFAULT) -> ProcessorMixin:
    """The processor (tokenizer, picture preprocessing, chat template) of the model ``name``. Raises ModelNotFound."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"model: {name} has no usable processor: {str(error).splitlines()[0]}") from error


__all__ = ["DEFAULT", "MODELS", "ModelNotFound", "load", "load_processor", "load_vit", "locate", "shipped"]

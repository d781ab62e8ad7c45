"""A plugin of vLLM (entry point group "vllm.general_plugins") that serves LLaVA 1.5 with fewer visual tokens.

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"architectures": ["VistokLlavaForConditionalGeneration"],
        "vistok_method": "fastervlm", "vistok_keep": 64, "vistok_hyper": {"layer": -2}}'

NOT YET RUN INSIDE vLLM: nobody has started a server with it. It was written from the source of vLLM 0.33 and checks the
version. Its classes were built once on those of vLLM 0.33.0, on a CPU without the engine: placeholders were exact, and
the embeddings those of ``vistok.apply``. The tests repeat that on stand-ins.

vLLM reserves a picture's placeholders before it is encoded, and keeps what the encoder made of it for other requests.
So a method must keep a fixed count and see the picture alone: no question, no stage inside the language model. A
picture of any size becomes one square of N patches and gets exactly ``count(keep, N)`` placeholders. vLLM numbers a
prompt's tokens itself: those that stay close ranks, which is ``position="recompact"`` of ``vistok.apply``. Stock models
are not touched. Servers that share an encoder cache must have the same method, keep and hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vistok.host.hooks import Hooks
from vistok.host.hosts.base import UnsupportedModel
from vistok.host.hosts.llava import TOWERS
from vistok.host.keep import check_keep, count
from vistok.host.layout import Layout, plain
from vistok.host.reducer import Evidence, LayerSpec, Reducer
from vistok.host.session import DEFAULT_KEEP
from vistok.host.steps import needs_of
from vistok.host.taps import StackedTap, Tap
from vistok.host.vision import ATTENTION_FIELDS, LAYER_FIELDS, Probe, VisionRun, layers_of

ARCHITECTURE = "VistokLlavaForConditionalGeneration"
WRITTEN_FOR = "0.33"


@dataclass(frozen=True)
class Plan:
    """What is done to each picture."""

    reducer: Reducer
    keep: int
    """Placeholders and embeddings of a picture, whatever its size."""
    layout: Layout
    needs: Mapping[str, LayerSpec]
    depth: int
    """Layers of the vision encoder; vLLM makes those up to the one that feeds the projector."""
    class_token: bool


def plan_of(config: Any) -> Plan:
    """The plan in a ``LlavaConfig`` with vistok_method, vistok_keep (0.25) and vistok_hyper ({}).

    Raises UnsupportedModel for another model, and UnknownSystem or ValueError for what cannot be served.
    """
    from vistok import catalogue

    vision, feeds = config.vision_config, config.vision_feature_layer
    if config.model_type != "llava" or vision.model_type not in TOWERS:
        raise UnsupportedModel(
            f"{config.model_type} with a {vision.model_type} encoder: must be llava with one of {', '.join(TOWERS)}"
        )
    class_token, depth = vision.model_type == "clip_vision_model", vision.num_hidden_layers
    strategy = "default" if class_token else "full"
    if not isinstance(feeds, int) or config.vision_feature_select_strategy != strategy:
        raise UnsupportedModel(
            f"llava with vision_feature_layer={feeds!r} and vision_feature_select_strategy="
            f"{config.vision_feature_select_strategy!r}: must be one layer and {strategy!r}, so that tokens are patches"
        )
    name = getattr(config, "vistok_method", None)
    reducer = catalogue.create(name, **getattr(config, "vistok_hyper", {})) if isinstance(name, str) else None
    if not isinstance(reducer, Reducer):
        raise ValueError(f"vistok_method: got {name!r}, must be the name of a reducer")
    side = vision.image_size // vision.patch_size
    keep = count(check_keep(getattr(config, "vistok_keep", DEFAULT_KEEP)), side * side)

    needs, made = needs_of(reducer), feeds % depth if feeds < 0 else feeds - 1
    able = {"encoder_features", "project", *LAYER_FIELDS} - (set() if class_token else {"cls_logits"})
    if unable := set(needs) - able:
        raise ValueError(f"vistok_method: {name} needs {', '.join(sorted(unable))}; only the picture is known here")
    schedule = reducer.schedule(side * side, keep, config.text_config.num_hidden_layers)
    if reducer.one_at_a_time or reducer.layer_needs or schedule.layers or schedule.input != keep:
        raise ValueError(f"vistok_method: {name} must keep a fixed count, all of it before the language model")
    for field in set(needs) & set(LAYER_FIELDS):
        if (last := max(layers_of(needs[field], depth))) > made:
            raise ValueError(f"vistok_method: {name} needs {field} of layer {last}; vLLM makes layers 0..{made}")
    return Plan(reducer, keep, plain(side, side), needs, depth, class_token)


def reduce_pictures(
    plan: Plan, encoded: Tensor, fields: Mapping[str, Any], project: Callable[[Tensor], Tensor]
) -> Tensor:
    """(B, keep, D) embeddings of B pictures from the encoder's output (B, N, Dv) and ``fields`` of their Evidence."""
    features = project(encoded)
    asked = project if "project" in plan.needs else None
    reduction = plan.reducer.reduce(
        Evidence(features=features, grid=plan.layout.grid, project=asked, **fields), plan.keep
    )
    if reduction.tokens.shape[:2] != (len(encoded), plan.keep):
        raise ValueError(
            f"{type(plan.reducer).__name__}: made {tuple(reduction.tokens.shape[:2])} tokens for {len(encoded)} "
            f"pictures with {plan.keep} placeholders each"
        )
    tokens = project(reduction.tokens) if plan.reducer.space == "encoder" else reduction.tokens
    return tokens.to(features.dtype)


class Watch:
    """Sees what ``plan`` needs of vLLM's CLIP or SigLIP encoder whenever it runs."""

    def __init__(self, plan: Plan, tower: Any) -> None:
        self.plan, self.blocks = plan, tower.vision_model.encoder.layers
        if not set(plan.needs).isdisjoint(ATTENTION_FIELDS) and self.blocks[0].self_attn.tp_size != 1:
            raise ValueError("tensor parallelism cuts the vision encoder's heads: start with --mm-encoder-tp-mode data")
        self.probe = Probe([plan.needs], plan.depth)
        self.probe.install(Hooks(), self)

    def tap(self, layer: int) -> Tap:
        return StackedTap(self.blocks[layer].self_attn, self.plan.class_token)

    def patch_states(self, hidden: Tensor) -> Tensor:
        return hidden[:, int(self.plan.class_token) :].flatten(0, 1)

    def run(self, encode: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """What ``encode()`` returns, (B, N, Dv), and the fields of Evidence that were seen on the way."""
        self.probe.run = run = VisionRun()
        encoded = encode()
        run.features = encoded.flatten(0, 1)
        first = torch.arange(len(encoded), device=encoded.device) * encoded.shape[1]
        fields = self.probe.evidence(self.plan.needs, self.plan.layout, first)
        self.probe.run = None
        return encoded, fields


def register() -> None:
    """Tell vLLM of the architecture. Its class is made when a model asks for it."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:{ARCHITECTURE}")


def __getattr__(name: str) -> Any:
    if name != ARCHITECTURE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _model_class())


def _model_class() -> Any:
    """vLLM's LLaVA with a plan. Raises RuntimeError for a vLLM that this was not written for."""
    import vllm

    if vllm.__version__.split(".")[:2] != WRITTEN_FOR.split("."):
        raise RuntimeError(f"vllm: got {vllm.__version__}, {ARCHITECTURE} was written for {WRITTEN_FOR}")
    from vllm.model_executor.models import llava
    from vllm.multimodal import MULTIMODAL_REGISTRY

    class Info(llava.LlavaProcessingInfo):
        @cached_property
        def plan(self) -> Plan:
            return plan_of(self.get_hf_config())

        def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
            return self.plan.keep

    class Model(llava.LlavaForConditionalGeneration):
        supports_tower_connector_lora = False  # would count the tower's tokens by those that are left

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.watch = Watch(plan_of(self.config), self.vision_tower)

        def _process_image_input(self, image_input: Any) -> Any:
            if isinstance(image_input, llava.LlavaImageEmbeddingInputs):  # the user's own, with as many placeholders
                return super()._process_image_input(image_input)
            encoded, fields = self.watch.run(lambda: self._process_image_pixels(image_input))
            return reduce_pictures(self.watch.plan, encoded, fields, self.multi_modal_projector)

    Model.__name__, Model.__qualname__, Model.__module__ = ARCHITECTURE, ARCHITECTURE, __name__
    made: Any = MULTIMODAL_REGISTRY.register_processor(
        llava.LlavaMultiModalProcessor, info=Info, dummy_inputs=llava.LlavaDummyInputsBuilder
    )(Model)
    return made

"""What the host has to know of a family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vistok.core import flops
from vistok.host.cache import held
from vistok.host.hooks import Hooks
from vistok.host.layout import Kind, Layout
from vistok.host.reducer import Reducer
from vistok.host.stream import Stream
from vistok.host.taps import Tap
from vistok.host.vision import Probe, VisionRun


class UnsupportedModel(ValueError):
    """The model, or this configuration of it, cannot be served (yet); the message says what and why."""


class Host(ABC):
    """Where things are in one family of models. One small subclass a family; everything else is shared."""

    merge = 1
    """Encoder patches that one token of the language model is made of."""
    class_token = False
    """Whether the encoder's sequences begin with a class token."""
    windowed = False
    """Whether the adapter can serve a decoder with sliding windows."""
    own_masks = False
    """Whether the decoder's masks are more than causal; ``stream`` then makes them."""
    pixels_argument = "pixel_values"
    """The name of the encoder's first argument."""
    videos = False
    """Whether the adapter can serve videos."""
    sources: Mapping[int, int] = {}
    """For each decoder layer that reads the keys and values of an earlier one, which."""
    kind: Kind = "image"
    """What the vision encoder is given now."""
    clips: tuple[int, ...] = ()
    """The shape of the last videos that the model was given."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base: Any = model.model
        self.layers: nn.ModuleList = self.language_model.layers
        self.head: Any = model.get_output_embeddings()
        if len(devices := {str(p.device) for p in model.parameters()}) > 1:
            raise UnsupportedModel(
                f"{type(model).__name__} spread over {', '.join(sorted(devices))}: not supported yet; put it on one"
            )
        config = self.language_model.config
        kinds = getattr(config, "layer_types", None)
        # A configuration that does not name its layers' kinds (Mistral) has windows in all of them or in none.
        windows = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
        if windows and not self.windowed:
            raise UnsupportedModel(
                f"{type(model).__name__} with sliding-window layers in its language model: not supported yet: a window "
                "counts tokens that may have been dropped"
            )

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def language_model(self) -> Any:
        """The decoder, without its head."""
        return self.base.language_model

    @property
    def image_token(self) -> int:
        return self.model.config.image_token_id

    @property
    def video_token(self) -> int:
        return self.model.config.video_token_id

    def padding(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The padding mask (B, tokens seen and new) of a forward, or None; ``kwargs``: the decoder's arguments."""
        return kwargs.get("attention_mask")

    def stream(self, *args: Any) -> Stream:
        """What carries a sequence through the decoder; arguments as for ``Stream``."""
        return Stream(*args)

    def check_stage(self, method: Reducer, layer: int) -> None:
        """Raise ValueError if ``method`` cannot drop tokens before decoder layer ``layer``."""
        return None

    def check_return(self, method: Reducer, aside: int, layer: int) -> None:
        """Raise ValueError if ``method`` cannot bring tokens back before decoder layer ``layer`` that were set aside
        before layer ``aside``."""
        return None

    def layer_keys(self, number: int, width: int, given: Mapping[str, Any]) -> int:
        """How many keys ``width`` tokens of one row look at in decoder layer ``number`` (they themselves included),
        which is about to run with the keyword arguments ``given``."""
        return width + held(given.get("past_key_values"), number)

    def layer_flops(self, layer: Any, tokens: int, keys: int) -> int:
        """Floating-point operations of a decoder layer for ``tokens`` tokens of one row that look at ``keys`` (they
        themselves included)."""
        config = self.language_model.config
        return flops.transformer_layer(
            tokens,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            head_dim=layer.self_attn.head_dim,
            kv_heads=config.num_key_value_heads,
            gated=True,
            keys=keys,
        )

    # The vision encoder -------------------------------------------------------------------------------------------

    @property
    def tower(self) -> Any:
        """The vision encoder."""
        return self.base.vision_tower

    @property
    def towers(self) -> tuple[Any, ...]:
        """The vision encoders: more than one where videos have their own; ``tower`` is then that of ``kind``."""
        return (self.tower,)

    @property
    def feature_layer(self) -> int:
        """Which of the encoder's ``hidden_states`` feeds the projector; of several the deepest."""
        layer = getattr(self.model.config, "vision_feature_layer", -1)
        depth = len(self.blocks) + 1
        return max(i % depth for i in layer) if isinstance(layer, (list, tuple)) else layer

    @property
    def projector(self) -> Any:
        """What maps encoder features to tokens of the language model."""
        return self.base.multi_modal_projector

    @property
    def blocks(self) -> Any:
        """The layers of the vision encoder."""
        return self.tower.encoder.layers

    @abstractmethod
    def tap(self, layer: int) -> Tap:
        """How to get queries and keys of an encoder layer."""

    def check_needs(self, method: Reducer) -> None:
        """Raise ValueError if ``method`` needs what this model cannot give."""
        name = type(method).__name__
        if "cls_logits" in method.needs and not self.class_token:
            raise ValueError(
                f"{name} needs cls_logits, which {self.name} cannot give: its vision encoder "
                f"({type(self.tower).__name__}) has no class token"
            )
        how = method.layer_needs.get("llm_importance", (1, 0))
        if not isinstance(how, tuple) or how[0] <= 0 or how[1] < 0:
            raise ValueError(f"{name} needs llm_importance with {how!r}, must be (temperature above 0, iterations)")

    def watch(self, hooks: Hooks, probe: Probe) -> None:
        """Hook the encoder so that ``probe.run`` holds the last run, with what of it ``probe.asked`` names."""
        for tower in self.towers:
            hooks.before(tower, lambda module, args, kwargs: self._begin(probe, args, kwargs))

        def projecting(module: Any, args: Any, kwargs: Any) -> None:
            run = probe.run
            if run is None or run.rows:  # later calls are our own, see project()
                return
            run.rows = args[0].shape[:-1].numel()
            if "encoder_features" in probe.asked:
                run.features = self.patch_rows(args[0].detach(), run)

        hooks.before(self.projector, projecting)
        if self.videos:
            hooks.watch(self.base, "get_video_features", self._videos_begin, self._videos_end)

    def _begin(self, probe: Probe, args: Any, kwargs: Any) -> None:
        run = probe.begin(VisionRun(self.kind, self.call_of(args, kwargs)))
        if "patch_pixels" in probe.asked:
            run.pixels = self.patch_pixels(self.pixels(args, kwargs))

    def _videos_begin(self, *args: Any, **kwargs: Any) -> None:
        given = args[0] if args else kwargs.get("pixel_values_videos")
        self.kind, self.clips = "video", tuple(getattr(given, "shape", ()))

    def _videos_end(self) -> None:
        self.kind = "image"

    def pixels(self, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """The pictures that a call of the vision encoder was given."""
        return args[0] if args else kwargs[self.pixels_argument]

    def call_of(self, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What ``layouts`` has to know of a call of the vision encoder."""
        return {"units": self.pixels(args, kwargs).shape[0]}

    def patch_pixels(self, pixels: Tensor) -> Tensor:
        """(S, P) float32 grey values, flat over patches, each in raster order; ``pixels`` (units, channels, H, W)."""
        size = self.model.config.vision_config.patch_size
        h, w = (size, size) if isinstance(size, int) else size
        grey = pixels.detach().float().mean(1)
        return grey.unfold(1, h, h).unfold(2, w, w).flatten(3).flatten(0, 2)

    def patch_states(self, hidden: Tensor) -> Tensor:
        """(S, Dv) flat over patches, of an encoder layer's output (units, tokens, Dv); the class token left out."""
        return hidden[:, int(self.class_token) :].flatten(0, 1)

    def patch_rows(self, features: Tensor, run: VisionRun) -> Tensor:
        """(S, Dv) flat over patches, of what the projector was given."""
        return features.flatten(0, -2)

    def project(self, tokens: Tensor) -> Tensor:
        """(B, K, g * Dv) encoder-space tokens through the model's own projector: (B, K, D)."""
        return self.projector(tokens)

    @property
    def projecting(self) -> tuple[nn.Module, ...]:
        """The modules that ``project`` runs."""
        return (self.projector,)

    def project_exactly(self, tokens: Tensor) -> Tensor:
        """``project`` in the precision of ``tokens``, whatever the weights are kept in: what a method makes of small
        differences would be lost in the rounding of a model in half precision. Quantized weights stay as they are."""
        call = _Projection(self)
        if any(type(p.data) is not Tensor or not p.is_floating_point() for p in call.parameters()):
            return self.project(tokens.to(self.model.get_input_embeddings().weight.dtype)).to(tokens.dtype)
        exact = {name: p.to(tokens.dtype) for name, p in call.named_parameters() if p.dtype != tokens.dtype}
        return torch.func.functional_call(call, exact, (tokens,)) if exact else self.project(tokens)

    def spent(self, given: Mapping[str, Any], ids: Tensor) -> list[int]:
        """How much of the encoder's input each picture of the prompt ``ids`` (B, T) takes: crops or tiles where it has
        such, patches where pictures lie in one sequence. ``given``: the arguments of ``get_image_features``."""
        return [1] * len(next(value for value in given.values() if isinstance(value, Tensor)))

    @abstractmethod
    def layouts(self, run: VisionRun, visual: Tensor) -> list[Layout]:
        """The layout of each picture (or video) of the run, in the order of the prompt, whose placeholders for it are
        ``visual`` (B, T) bool."""

    @abstractmethod
    def vision_flops(self, run: VisionRun) -> int:
        """Floating-point operations of the encoder and the projector in a run (conventions of vistok.core.flops)."""


def square(tokens: int, what: str) -> tuple[int, int]:
    """(side, side) of a square of ``tokens``; UnsupportedModel naming ``what`` if it is none."""
    side = int(tokens**0.5)
    if side * side != tokens:
        raise UnsupportedModel(
            f"{what}: {tokens} patches make no square grid; pictures of other shapes are not supported"
        )
    return side, side


class _Projection(nn.Module):
    """``Host.project`` as a module, so that ``functional_call`` can lend it other weights."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.parts = nn.ModuleList(host.projecting)
        self.project = host.project

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(tokens)

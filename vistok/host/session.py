"""A method in a model, for as long as a ``with`` lasts; and what it did there."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal
from weakref import WeakKeyDictionary

from PIL import Image
from torch import nn

from vistok.host.attention import Attending, AttentionMethod, decoder_of, split_attention
from vistok.host.effort import Effort
from vistok.host.encoder import SUFFIX, in_encoder
from vistok.host.engine import Engine, Position
from vistok.host.hooks import Hooks
from vistok.host.hosts import UnsupportedModel, host_of
from vistok.host.keep import Budget, Keep, check_keep
from vistok.host.overlay import overlay
from vistok.host.pictures import Picture
from vistok.host.reducer import Reducer
from vistok.host.setting import read_setting
from vistok.host.vit.reducer import ViTReducer

_ACTIVE: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()

Method = str | Reducer | ViTReducer | AttentionMethod
DEFAULT_KEEP = 0.25


class Session:
    """Made by ``apply``. The method is in the model inside the ``with`` and gone after it, also after an exception.

    Everything it tells is of the last prompt with pictures and of what was generated from it since.
    """

    _attending: Attending | None = None

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Reducer],
        keep: Keep | Sequence[Keep],
        position: Position,
        budget: Budget = "per_image",
        reselect: bool = False,
        encoder: Sequence[ViTReducer] = (),
        attention: AttentionMethod | None = None,
    ) -> None:
        self.model = model
        self.methods: tuple[Any, ...] = (*encoder, *methods, *([] if attention is None else [attention]))
        self._host = host_of(model)
        if not methods and not encoder:
            methods = [Reducer()]  # never asked, since all tokens stay
        self._engine: Any = Engine(self._host, methods, keep, position, budget, reselect, encoder)
        if attention is not None:
            self._attending = self._attend(attention, position)
        self._log: Any = self._engine.log
        self._hooks = Hooks()

    def _attend(self, attention: AttentionMethod, position: Position) -> Attending:
        name = type(attention).__name__
        if any(isinstance(method, Effort) for method in self.methods):
            raise ValueError(f"method: got {name} and a method that has attention of its own, must be one of them")
        if self._host.own_masks:
            raise UnsupportedModel(f"{self._host.name} masks more than what is to come, with which {name} does not go")
        if attention.reads_positions and position == "recompact":
            raise ValueError(f"position: got 'recompact' with {name}, which moves tokens itself; must be 'keep'")
        return Attending(attention, self._host.language_model, lambda: self._engine.stream)

    def __enter__(self) -> Session:
        if self.model in _ACTIVE:
            raise RuntimeError(
                f"apply: this {type(self.model).__name__} already has a method in it; leave that `with` first, or give "
                "both methods to one apply as a list"
            )
        try:
            if self._attending is not None:
                self._attending.install(self._hooks)
            self._engine.install(self._hooks)
        except BaseException:
            self._hooks.remove()
            raise
        _ACTIVE[self.model] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.remove()
        self._engine.close()
        if self._attending is not None:
            self._attending.close()
        _ACTIVE.pop(self.model, None)

    @property
    def pictures(self) -> list[Picture]:
        """One record a picture, by row of the batch and order in the prompt."""
        return self._log.pictures

    @property
    def tokens_in(self) -> int:
        """Visual tokens of all pictures before the method."""
        return sum(picture.tokens_in for picture in self.pictures)

    @property
    def tokens_kept(self) -> int:
        """Visual tokens that the language model was given."""
        return sum(picture.tokens_kept for picture in self.pictures)

    @property
    def encoder_tokens(self) -> list[int]:
        """Tokens of a picture (a crop, a frame) that left each of the encoder's blocks, where a method acts there; []
        elsewhere."""
        return [] if self._engine.side is None else self._engine.side.tokens

    @property
    def flops(self) -> int:
        """Floating-point operations of encoder, projector, language model and head, from shapes (conventions of
        ``vistok.core.flops``), all rows of the batch; the selection's own are not counted."""
        return sum(self._log.flops.values())

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache after the last forward."""
        return self._log.kv_bytes

    @property
    def milliseconds(self) -> dict[str, float]:
        """{"vision", "select", "prefill", "decode"}: encoder and projector; evidence and methods; the language model
        on the prompt; and on the tokens after it."""
        return self._log.milliseconds

    def overlay(
        self,
        image: Image.Image,
        picture: int = 0,
        fit: Literal["stretch", "crop"] = "stretch",
        frame: int | None = None,
    ) -> Image.Image:
        """``image`` with the places of dropped tokens darkened and those of merged ones tinted, one tint for each.

        ``picture``: which of ``pictures`` it is. ``fit``: how the model's processor brought it to a square, by
        "stretch" (also right for pictures in crops and for dynamic resolution) or by centre "crop". ``frame``: for a
        video, which of its frames (``Picture.frames``) ``image`` is.
        """
        if not 0 <= picture < len(self.pictures):
            raise ValueError(f"picture: got {picture}, the last prompt had {len(self.pictures)} pictures")
        return overlay(image, self.pictures[picture], fit, frame)

    def report(self) -> dict[str, Any]:
        """All of it as plain numbers, strings and lists."""
        return {
            "model": type(self.model).__name__,
            "methods": [repr(method) for method in self.methods],
            "encoder_tokens": self.encoder_tokens,
            "tokens_in": self.tokens_in,
            "tokens_kept": self.tokens_kept,
            "flops": self.flops,
            "flops_by_stage": dict(self._log.flops),
            "kv_bytes": self.kv_bytes,
            "milliseconds": self.milliseconds,
            "pictures": [picture.report() for picture in self.pictures],
        }


class TextSession(Session):
    """A method of attention in a language model that sees no pictures. Of what happened it tells ``kv_bytes`` alone."""

    def __init__(self, model: nn.Module, attention: AttentionMethod) -> None:
        self.model = model
        self.methods = (attention,)
        self._engine = Attending(attention, decoder_of(model))
        self._log = self._engine.log
        self._hooks = Hooks()

    @property
    def encoder_tokens(self) -> list[int]:
        return []


def engine_in(model: nn.Module) -> Engine | None:
    """The hooks of the session whose method is in ``model`` now."""
    session = _ACTIVE.get(model)
    return None if session is None else session._engine


def apply(
    model: nn.Module,
    method: Method | Sequence[Method],
    keep: Keep | Sequence[Keep] | None = None,
    *,
    position: Position | None = None,
    budget: Budget = "per_image",
    reselect: bool = False,
    **hyper: Any,
) -> Session:
    """Put a token reducer into a vision-language model of ``transformers``, for the length of a ``with``.

        with vistok.apply(model, "fastervlm", keep=64) as session:
            output = model.generate(**inputs)
        print(session.tokens_kept, session.milliseconds)

    ``method``: the name of a system, a Reducer, or a list of them: each then works on what the one before it left; or
    the name of a JSON file that ``vistok auto`` wrote (it ends in ".json"), which also says how much to keep.
    ``keep`` (0.25): tokens left of each picture, as a count (int >= 1) or a share in (0, 1] (float); for staged methods
    the mean over the decoder's layers. With several methods it is what the last one leaves, and those before it keep
    equal shares of what they are given; or a list with one ``keep`` for each method. ``position``: "keep" leaves the
    tokens that stay at their original positions, "recompact" closes the gaps; None: as the method says, which is "keep"
    unless its paper closes them. A method that keeps the tokens and spends less on each (yopo) has no use for either.
    A method of the vit family acts inside the model's vision encoder (CLIP, SigLIP), named with "@encoder":
    ``["pitome@encoder", "holov"]``. The encoder runs on fewer tokens, and those that leave it go on to the next
    method. A single ``keep`` is then that of the methods after the encoder, and the method inside keeps what it does by
    default; a list has one each, as each counts.
    One method of the attend family may stand among them ("tokenselect"): it keeps all tokens and changes how the layers
    of the language model attend to them; ``keep`` is of the others. Alone it goes into any language model whose decoder
    attends causally without windows, with pictures or not. Attention then runs on SDPA, and ``flops`` count it as if it
    were dense.
    ``budget``: "per_image" takes ``keep`` of each picture; "shared" takes it of all pictures of a prompt together and
    splits it in proportion to their tokens. ``reselect``: a later turn on the same cache, of more than one token and
    without pictures, chooses again from all tokens of the pictures, for the new question: what the language model was
    given is kept on the side and read once more, the vision encoder does not run again. Without it the choice of the
    first turn stays. ``hyper``: hyper-parameters of a method given by name.

    A video (``pixel_values_videos``; Qwen-VL, LLaVA-NeXT-Video, LLaVA-OneVision, Video-LLaVA) counts as one picture:
    ``keep`` is of all its tokens, which lie frame after frame. A method that does not ask for whole pictures reduces
    each frame by itself with its share of ``keep``; others see all frames at once.

    A vision transformer (timm VisionTransformer and Eva; ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP of transformers)
    takes the methods of the vit family instead: see ``vistok.host.vit.session.apply_vit`` for its arguments.

    Logits and hidden states of a prompt are those of the tokens that are left. ``labels`` and models spread over
    several devices are not supported. A cache that was filled inside goes on working outside where no row is
    padded and all layers hold the same tokens, and raises RuntimeError elsewhere; inside a later ``with`` it always
    works.

    Raises ``UnsupportedModel`` for models it does not know, ``ValueError`` for wrong arguments (a ``keep`` beyond the
    picture's tokens shows when the picture comes) and ``RuntimeError`` on entering a model that has a method in it.
    """
    if isinstance(method, str) and method.endswith(".json"):
        setting = read_setting(method)
        method, keep = setting.create(), setting.keep if keep is None else keep
    methods = list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
    from vistok.host.vit.session import apply_vit, for_vit, vit_reducer

    if methods and for_vit(model, methods):
        if position is not None or budget != "per_image" or reselect:
            raise ValueError("position, budget, reselect: are for language models, not for a vision transformer")
        return apply_vit(model, methods, keep, **hyper)
    if not methods:
        raise ValueError("method: got an empty list, must be a name, a Reducer or a list of them")
    if hyper and (len(methods) > 1 or not isinstance(methods[0], str)):
        raise ValueError(
            f"{next(iter(hyper))}: hyper-parameters go with one method given by name; set them on the Reducer"
        )
    methods, attention = split_attention(methods, hyper)
    if attention is not None and getattr(getattr(model, "config", None), "mask_token_id", None) is not None:
        raise UnsupportedModel(f"{type(model).__name__}: {attention!r} needs a model that attends causally")
    if attention is not None and not methods:
        if keep is not None and not (isinstance(keep, float) and keep == 1):
            raise ValueError(f"keep: got {keep!r}, but {attention!r} keeps all tokens; must be None or 1.0")
        try:
            host_of(model)
        except UnsupportedModel:
            return TextSession(model, attention)
        return Session(model, (), 1.0, position or "keep", budget, reselect, attention=attention)
    if isinstance(keep, Sequence) and len(keep) != len(methods):
        raise ValueError(f"keep: got {len(keep)} values for {len(methods)} methods, must be one each or a single one")
    if position not in ("keep", "recompact", None):
        raise ValueError(f"position: got {position!r}, must be 'keep', 'recompact' or None")
    if budget not in ("per_image", "shared"):
        raise ValueError(f"budget: got {budget!r}, must be 'per_image' or 'shared'")
    inside = [in_encoder(m) for m in methods]
    alone = all(inside)
    given = list(keep) if isinstance(keep, Sequence) else [keep if alone or not i else None for i in inside]
    encoder = [
        vit_reducer(m.removesuffix(SUFFIX) if isinstance(m, str) else m, k, hyper)
        for m, k, i in zip(methods, given, inside, strict=True)
        if i
    ]
    reducers = [_reducer(m, hyper) for m, i in zip(methods, inside, strict=True) if not i]
    if isinstance(keep, Sequence):
        keep = [check_keep(k) for k, i in zip(keep, inside, strict=True) if not i]
    else:
        keep = 1.0 if alone else check_keep(DEFAULT_KEEP if keep is None else keep)
    if position is None:
        position = "recompact" if any(reducer.position == "recompact" for reducer in reducers) else "keep"
    return Session(model, reducers, keep, position, budget, reselect, encoder, attention)


def _reducer(method: Any, hyper: dict[str, Any]) -> Reducer:
    from vistok import catalogue

    made = catalogue.create(method, **hyper) if isinstance(method, str) else method
    if isinstance(made, ViTReducer):
        raise ValueError(
            f"method: got {method!r}, which is for vision transformers; inside the model's vision encoder it is "
            f"{method + SUFFIX!r}"
        )
    if not isinstance(made, Reducer):
        raise ValueError(f"method: got {method!r}, must be the name of a reducer, a Reducer or a list of them")
    return made

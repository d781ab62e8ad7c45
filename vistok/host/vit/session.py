"""A method in a vision transformer, for as long as a ``with`` lasts; and what it did there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vistok.host.hooks import Hooks
from vistok.host.keep import Keep
from vistok.host.session import Session
from vistok.host.vit.engine import Restore, TracedHooks, ViTEngine
from vistok.host.vit.models import is_vit, vit_of
from vistok.host.vit.reducer import ViTReducer
from vistok.host.vit.state import Fill, TokenState


class ViTSession(Session):
    """Made by ``vistok.apply``. The method is in the model inside the ``with`` and gone after it.

    What it tells is of the last forward pass, and RuntimeError where there was none. ``pictures`` are the rows of the
    batch; a picture's ``layers`` has the tokens left at each block at which a method acted, its ``keep`` the places at
    which the last block's tokens stand. ``flops`` are those of patch embedding and blocks, by the conventions of
    ``vistok.core.flops``; heads and the methods' own are not counted. ``milliseconds``: {"total": from the patch
    embedding to the last block, "select": evidence and methods}; not taken inside a compiled graph. There is no KV
    cache.

    A model may be trained inside, also with gradient checkpointing (each backward pass then inside the ``with`` too,
    and before the next forward pass). It may be compiled, before or inside; what is compiled inside is used again in a
    later session of the same method.
    """

    def __init__(self, model: nn.Module, methods: Sequence[ViTReducer], restore: Restore) -> None:
        self.model = model
        self.methods: tuple[Any, ...] = tuple(methods)
        self._engine: Any = ViTEngine(vit_of(model), methods, restore)
        self._log: Any = self._engine.log
        self._hooks: Hooks = TracedHooks()

    @property
    def states(self) -> list[TokenState]:
        """What entered the first block (states[0]) and left block l (states[l + 1]), without values (x has no rows)."""
        return self._log.states

    @property
    def tokens(self) -> list[int]:
        """Tokens of a picture that left each block, prefix tokens not counted."""
        return [state.num_slots for state in self.states[1:]]

    @property
    def plain_flops(self) -> int:
        """What ``flops`` would be if all patches had stayed and none had been added."""
        saved: int = self._log.saved
        return self.flops + saved

    @property
    def encoder_tokens(self) -> list[int]:
        return self.tokens

    @property
    def milliseconds(self) -> dict[str, float]:
        return self._log.milliseconds

    def restore(self, tokens: Tensor, fill: Fill = "zeros") -> Tensor:
        """``tokens`` (B, P + K, C) as the model leaves them, or (B, K, C) without prefix, with a row for each of the N
        patches: (B, P + N, C) or (B, N, C), raster order. What a dropped patch gets: see ``TokenState.unmerge``."""
        last = self.states[-1]
        if tokens.ndim != 3 or tokens.shape[1] not in (last.num_slots, last.prefix + last.num_slots):
            raise ValueError(
                f"tokens: got shape {tuple(tokens.shape)}, must be (B, {last.num_slots}, C), or with the "
                f"{last.prefix} prefix tokens (B, {last.prefix + last.num_slots}, C)"
            )
        whole = tokens.shape[1] == last.prefix + last.num_slots
        return last.restored(tokens, fill) if whole else last.unmerge(tokens, fill)


def for_vit(model: nn.Module, methods: Sequence[Any]) -> bool:
    """Whether ``apply`` should look at ``model`` as a vision transformer: it is one; or a method is for one, and it is
    no model that generates."""
    from vistok import catalogue

    def of_family(method: Any) -> bool:
        if not isinstance(method, str):
            return isinstance(method, ViTReducer)
        try:
            return catalogue.card(method).family == "vit"
        except catalogue.UnknownSystem:
            return False

    if is_vit(unwrapped(model)):
        return True
    return not hasattr(model, "generate") and any(of_family(method) for method in methods)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile`` returns."""
    return getattr(model, "_orig_mod", model)


def apply_vit(
    model: nn.Module,
    methods: Sequence[Any],
    keep: Keep | Sequence[Keep] | None = None,
    *,
    restore: Restore = False,
    **hyper: Any,
) -> ViTSession:
    """Put token reducers into a vision transformer of timm or transformers; ``vistok.apply`` calls it for these.

        with vistok.apply(vit, "evit", keep=0.7, layers=(3, 6, 9)) as session:
            logits = vit(pixels)
        print(session.tokens, session.flops)

    ``methods``: names of systems of the family, or ViTReducers; several must act at different blocks. ``keep``: that of
    a method given by name, as its paper counts (most: the share of the tokens that stay at each of its blocks); for
    several methods one each. ``restore``: give the model's dense output (``forward_features``, ``last_hidden_state``,
    timm's ``forward_intermediates``) a row for every patch again, dropped ones "zeros" or those of the "nearest" token
    that is left. Without it they have a row for each token that is left, so that a head which averages patches averages
    these alike; with it each merged token counts as often as the patches it stands for. ``hyper``: hyper-parameters of
    a method given by name.

    Raises ``UnsupportedModel``, ``ValueError`` for wrong arguments, ``RuntimeError`` on entering a model that has a
    method in it.
    """
    if restore not in (False, "zeros", "nearest"):
        raise ValueError(f"restore: got {restore!r}, must be False, 'zeros' or 'nearest'")
    if isinstance(keep, Sequence) and len(keep) != len(methods):
        raise ValueError(f"keep: got {len(keep)} values for {len(methods)} methods, must be one each")
    if not isinstance(keep, Sequence) and keep is not None and len(methods) > 1:
        raise ValueError(f"keep: got {keep!r} for {len(methods)} methods, must be a list with one each")
    if hyper and (len(methods) > 1 or not isinstance(methods[0], str)):
        raise ValueError(
            f"{next(iter(hyper))}: hyper-parameters go with one method given by name; set them on the ViTReducer"
        )
    keeps = [keep] * len(methods) if not isinstance(keep, Sequence) else list(keep)
    reducers = [vit_reducer(method, share, hyper) for method, share in zip(methods, keeps, strict=True)]
    return ViTSession(unwrapped(model), reducers, restore)


def vit_reducer(method: Any, keep: Keep | None, hyper: dict[str, Any]) -> ViTReducer:
    """The method as an object: made from its name, ``keep`` and ``hyper``, or as it was given. ValueError otherwise."""
    if isinstance(method, str):
        from vistok import catalogue

        made = catalogue.create(method, **({} if keep is None else {"keep": keep}), **hyper)
    elif keep is not None:
        raise ValueError(f"keep: got {keep!r}, but {method!r} was made with its own; give the method by name")
    else:
        made = method
    if not isinstance(made, ViTReducer) and hasattr(made, "build"):
        raise ValueError(
            f"method: got {method!r}, which has parameters to be trained: vistok.create({method!r}).build(...) makes a "
            f"model with it; see vistok show {method}"
        )
    if not isinstance(made, ViTReducer):
        raise ValueError(
            f"method: got {method!r}, must be the name of a system of the vit family, a ViTReducer or a list of them: "
            "it acts in a vision transformer"
        )
    return made

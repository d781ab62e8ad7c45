"""Methods in a vision transformer, by hooks on its blocks as they are.

How a block ``x = x + attention(norm1(x)); x = x + mlp(norm2(x))`` comes to have fewer tokens from its middle on:

* before ``norm2``, whose input is what attention left (B, T, C): the method runs, and the norm is given its T' tokens;
* after the last module of the MLP's branch, which leaves (B, T', C): that is taken away, and zeros (B, 1, C) go on, for
  the block to add to its T tokens;
* after the block: what it leaves is the method's tokens plus what was taken away, T' tokens.

Of the tokens that are gone the block computes no MLP, only that one addition; gradients flow as in a block written for
it. Steps without evidence (``TokenStep``) run before and after the block, on what it is given and what it leaves.
Nothing else in the model changes: no class, parameter or buffer, and of its attributes only timm's
``forward_intermediates`` is shadowed (see ``intermediates``). ``torch.compile`` traces through the hooks,
so that a model with a method in it still compiles to one graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from vistok.core import flops
from vistok.host.hooks import Hooks
from vistok.host.hosts.base import UnsupportedModel
from vistok.host.layout import plain
from vistok.host.pictures import Picture
from vistok.host.vit.intermediates import with_whole_maps
from vistok.host.vit.models import ViT
from vistok.host.vit.reducer import Stage, TokenStep, ViTEvidence, ViTReducer
from vistok.host.vit.state import Fill, TokenState

_TAKEN: WeakSet[nn.Module] = WeakSet()
"""Towers that have a method in them."""

Restore = Literal[False, "zeros", "nearest"]


class TracedHooks(Hooks):
    """Hooks that ``torch.compile`` traces; those after a module run before any that were there already.

    By default compiled code does not look whether hooks have come or gone since, and would go on without the method, or
    with another block's. So the first session of a process switches these guards on, for good, and has what was
    compiled before compiled anew.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch._dynamo import config

        if config.skip_nnmodule_hook_guards:
            config.skip_nnmodule_hook_guards = False
            torch.compiler.reset()

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self.undo(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        self.undo(module.register_forward_hook(hook, prepend=True, always_call=always).remove)


@dataclass
class Run:
    """One forward pass."""

    grid: tuple[int, int]
    left: dict[int, TokenState] = field(default_factory=dict)
    """What left each block, without values; -1: what the first was given, before any step."""
    entered: dict[int, TokenState] = field(default_factory=dict)
    """What each block works on, without values: what left the one before, or what the steps before it made of that."""
    worked: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Slots of each block's attention and of its MLP."""
    held: dict[str, Any] = field(default_factory=dict)
    """Of the block that is running: its queries, keys, angles, bias, the method's tokens and the MLP's output."""


class ViTLog:
    """What a session tells of the last forward pass; see ``ViTSession``."""

    kv_bytes = 0

    def __init__(self, vit: ViT) -> None:
        self.vit = vit
        self.run: Run | None = None
        self.spans: dict[str, list[tuple[Any, Any]]] = {"total": [], "select": []}
        self.start: Any = None
        self._cuda = next(vit.tower.parameters()).is_cuda

    @property
    def seen(self) -> Run:
        if self.run is None or len(self.run.left) <= len(self.vit.blocks):
            raise RuntimeError("session: no picture has gone through the model inside this `with`")
        return self.run

    @property
    def states(self) -> list[TokenState]:
        """What entered the first block and what left each, without values."""
        left = self.seen.left
        return [left[layer] for layer in range(-1, len(self.vit.blocks))]

    @property
    def pictures(self) -> list[Picture]:
        if self.run is None:
            return []
        states = self.states
        last, layout = states[-1], plain(*states[-1].grid)
        steps = enumerate(pairwise(states))
        layers = {layer: after.num_slots for layer, (before, after) in steps if after is not before}
        anchors, sources = last.anchor.cpu(), last.source.cpu()
        return [
            Picture(
                row=row,
                index=0,
                layout=layout,
                tokens_in=layout.num_tokens,
                tokens_kept=last.num_slots,
                keep=anchors[row][anchors[row] >= 0].sort().values,
                source=sources[row],
                layers=dict(layers),
            )
            for row in range(len(sources))
        ]

    @property
    def flops(self) -> dict[str, int]:
        if self.run is None:
            return {"patches": 0, "blocks": 0}
        states = self.states
        weights = [m.weight.numel() for m in self.vit.patches.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        return {
            "patches": len(states[0].source) * 2 * states[0].num_slots * sum(weights),
            "blocks": self._spent(self.seen.worked),
        }

    @property
    def saved(self) -> int:
        """What the blocks would have spent besides if all patches had stayed."""
        whole = self.states[0].num_slots
        return self._spent(dict.fromkeys(self.seen.worked, (whole, whole))) - self._spent(self.seen.worked)

    def _spent(self, worked: dict[int, tuple[int, int]]) -> int:
        """Floating-point operations of the blocks, whose attention and MLP had so many slots (``Run.worked``)."""
        first, spent = self.states[0], 0
        for layer, block in enumerate(self.vit.blocks):
            tokens, left = (slots + first.prefix for slots in worked[layer])
            spent += _linear(block.attention, tokens) + flops.attention(tokens, tokens, *_heads(block.attention))
            spent += _linear(block.mlp, left)
        return len(first.source) * spent

    @property
    def milliseconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        return {name: sum(_between(a, b) for a, b in spans) for name, spans in self.spans.items()}

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # read later: marking does not make the host wait for the device
        event.record()
        return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return (end - start) * 1e3
    spent: float = start.elapsed_time(end)
    return spent


def _linear(module: Any, tokens: int) -> int:
    """Operations of the linear layers in ``module`` on ``tokens`` tokens."""
    return sum(flops.linear(tokens, *m.weight.shape) for m in module.modules() if isinstance(m, nn.Linear))


def _heads(attention: Any) -> tuple[int, int]:
    """(heads, width of a head)."""
    heads: int = getattr(attention, "num_heads", 0) or attention.num_attention_heads
    return heads, attention.head_dim


class ViTEngine:
    """Puts ``methods`` into ``vit``; ``restore`` gives its last norm's output its full map back."""

    def __init__(self, vit: ViT, methods: Sequence[ViTReducer], restore: Restore) -> None:
        self.vit, self.restore = vit, restore
        self.depth = len(vit.blocks)
        self.at: dict[int, ViTReducer] = {}
        self.before: dict[int, list[TokenStep]] = {}
        self.after: dict[int, list[TokenStep]] = {}
        for step in (step for method in methods for step in method.steps):
            for layer in step.stages(self.depth):
                if isinstance(step, TokenStep):
                    (self.before if step.place == "before" else self.after).setdefault(layer, []).append(step)
                elif layer in self.at:
                    raise ValueError(
                        f"method: {type(self.at[layer]).__name__} and {type(step).__name__} both act at block "
                        f"{layer}; several methods must act at different blocks"
                    )
                else:
                    self.at[layer] = step
        self.proportional = any(method.proportional for method in methods)
        if self.proportional and vit.fused:
            raise _needs_a_mask(vit, "attention in proportion to size", ", or switch it off (proportional=False)")
        self.log = ViTLog(vit)

    def install(self, hooks: Hooks) -> None:
        if self.vit.tower in _TAKEN:
            raise RuntimeError(
                f"apply: this {type(self.vit.tower).__name__} already has a method in it; leave that `with` first, or "
                "give both methods to one apply as a list"
            )
        _TAKEN.add(self.vit.tower)
        hooks.undo(lambda: _TAKEN.discard(self.vit.tower))
        hooks.before(self.vit.patches, self._begins)
        if self.restore:  # put in first, it runs last: ``final`` may be the last block
            hooks.after(self.vit.final, partial(self._restores, self.restore))
        for layer, block in enumerate(self.vit.blocks):
            hooks.before(block.module, partial(self._enters, layer))
            if layer in self.at:
                hooks.after(block.query, partial(self._holds, "q"))
                hooks.after(block.key, partial(self._holds, "k"))
                hooks.after(block.value, partial(self._holds, "v"))
                if self.at[layer].place == "mid":
                    hooks.before(block.norm, partial(self._halfway, layer))
                    hooks.after(block.branch, self._takes)
            hooks.after(block.module, partial(self._leaves, layer))
        if call := getattr(self.vit.tower, "forward_intermediates", None):
            shadow = with_whole_maps(call, self.depth, lambda: self._run().left, self.restore or None)
            hooks.shadow(self.vit.tower, "forward_intermediates", shadow)

    def close(self) -> None:
        if self.log.run is not None:
            self.log.run.held.clear()

    # Hooks, in the order in which they run ----------------------------------------------------------------------------

    def _begins(self, module: Any, args: Any, kwargs: Any) -> None:
        self.log.run = Run(self.vit.grid(args[0]))
        if not torch.compiler.is_compiling():
            self.log.spans, self.log.start = {"total": [], "select": []}, self.log.mark()

    def _enters(self, layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        run = self._run()
        run.held.clear()
        x = args[0] if args else kwargs["hidden_states"]
        if layer == 0:
            run.left[-1] = TokenState.start(x, self.vit.prefix, run.grid).bare
        state = run.left[layer - 1]
        if layer in self.before:
            state = self._stepped(self.before[layer], layer, state, x)
            args, kwargs = ((state.x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state.x})
            state = state.bare
        run.entered[layer] = state
        if state.untouched and state.visible is None:
            if self.vit.rotary:
                run.held["angles"] = kwargs.get(self.vit.rotary)
            return (args, kwargs) if layer in self.before else None
        name = self.vit.mask
        given = kwargs.get(name, args[1] if len(args) > 1 else None)
        if given is not None:
            raise ValueError(f"{name}: a mask of the caller's cannot be followed once tokens are gone, leave it out")
        kwargs = dict(kwargs)
        bias = state.key_bias(x.dtype, self.proportional)
        if bias is not None:
            if self.vit.fused:
                raise _needs_a_mask(self.vit, "hiding tokens", "")
            run.held["bias"] = bias
            if len(args) > 1:
                args = (args[0], bias, *args[2:])
            else:
                kwargs[name] = bias
        if self.vit.rotary and kwargs.get(self.vit.rotary) is not None:
            kwargs[self.vit.rotary] = run.held["angles"] = _taken(kwargs[self.vit.rotary], state.anchor)
        return args, kwargs

    def _holds(self, name: str, module: Any, args: Any, output: Any) -> None:
        self._run().held[name] = output

    def _halfway(self, layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        run = self._run()
        state = self._reduced(layer, args[0])
        if state is None:
            return None
        run.held["state"] = state
        return (state.x, *args[1:]), kwargs

    def _takes(self, module: Any, args: Any, output: Any) -> Any:
        held = self._run().held
        if "state" not in held:  # the module also ends attention's branch, or nothing is to be done in this block
            return None
        held["mlp"] = output
        return output.new_zeros(len(output), 1, output.shape[2])

    def _leaves(self, layer: int, module: Any, args: Any, output: Any) -> Any:
        run = self._run()
        entered, state = run.entered[layer], run.held.get("state")
        run.worked[layer] = entered.num_slots, (state or entered).num_slots
        if state is not None:
            output = state.x + run.held["mlp"]
        elif layer in self.at and self.at[layer].place == "after":
            state = self._reduced(layer, output)
            output = output if state is None else state.x
        left = entered if state is None else state.bare
        if layer in self.after:
            state = self._stepped(self.after[layer], layer, left, output)
            left, output = state.bare, state.x
        run.left[layer] = left
        run.held.clear()
        if layer == self.depth - 1 and not torch.compiler.is_compiling():
            self.log.spans["total"] = [(self.log.start, self.log.mark())]
        return output

    def _restores(self, fill: Fill, module: Any, args: Any, output: Any) -> Any:
        *_, last = self._run().left.values()  # not always the last block's: timm may norm what leaves each of them
        return last.restored(output, fill)

    # What they share --------------------------------------------------------------------------------------------------

    def _run(self) -> Run:
        if self.log.run is None:
            raise RuntimeError("session: the blocks ran without the patch embedding; call the model on pixels")
        return self.log.run

    def _reduced(self, layer: int, x: Tensor) -> TokenState | None:
        """What the method of block ``layer`` makes of ``x`` (B, T, C); None where it has nothing to do."""
        run, method = self._run(), self.at[layer]
        before = run.entered[layer]
        stage = self._stage(layer)
        tokens = before.num_slots - before.held
        count = method.count(tokens, stage)
        if count == tokens:
            return None
        start = None if torch.compiler.is_compiling() else self.log.mark()
        evidence = self._evidence(layer, stage).withheld(before.held)
        state = method.reduce(replace(before, x=x).withheld, evidence, count).given_back(before.held)
        if start is not None:
            self.log.spans["select"].append((start, self.log.mark()))
        return state

    def _stepped(self, steps: Sequence[TokenStep], layer: int, state: TokenState, x: Tensor) -> TokenState:
        """What ``steps`` at block ``layer`` make of ``x`` (B, T, C), whose state is ``state``."""
        state = replace(state, x=x)
        for step in steps:
            state = step.act(state, self._stage(layer))
        return state

    def _stage(self, layer: int) -> Stage:
        return Stage(layer, self.depth, self._run().left[-1].num_slots)

    def _evidence(self, layer: int, stage: Stage) -> ViTEvidence:
        held, block = self._run().held, self.vit.blocks[layer]
        attention = block.attention
        q, k = (self.vit.heads(attention, held.pop(name)) for name in "qk")
        if held.get("angles") is not None:
            q, k = (self.vit.turn(attention, t, held["angles"]) for t in (q, k))
        scale = q.shape[-1] ** -0.5
        values = partial(block.values, held.pop("v"))
        return ViTEvidence(q, k, scale, self.vit.prefix, self.vit.class_token, stage, held.get("bias"), values)


def _needs_a_mask(vit: ViT, what: str, otherwise: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(vit.tower).__name__} with {vit.tower.config._attn_implementation}: {what} needs an additive mask; load "
        f"the model with attn_implementation='sdpa'{otherwise}"
    )


def _taken(angles: Any, anchor: Tensor) -> Any:
    """Rotary angles of the slots: rows ``anchor`` (B, K) of ``angles``, which are sines and cosines side by side, (N,
    D), (H, N, D) or (B, 1, N, D), or the pair (cosines, sines). (B, H or 1, K, D). A slot without a place, such as an
    added token, is not turned, as the prefix is not: sine 0, cosine 1."""
    if isinstance(angles, tuple):
        cosines, sines = angles
        return _rows(cosines, anchor, cosines.new_ones(())), _rows(sines, anchor, sines.new_zeros(()))
    half = angles.shape[-1] // 2
    return _rows(angles, anchor, torch.cat([angles.new_zeros(half), angles.new_ones(half)]))


def _rows(angles: Tensor, anchor: Tensor, none: Tensor) -> Tensor:
    """Rows ``anchor`` (B, K) of ``angles`` (..., N, D) by picture and head, ``none`` (D,) or () where it is -1."""
    heads = angles.shape[-3] if angles.ndim > 2 else 1
    full = angles.expand(len(anchor), heads, *angles.shape[-2:])
    index = anchor.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, full.shape[-1])
    return torch.where((anchor < 0)[:, None, :, None], none, full.gather(2, index))

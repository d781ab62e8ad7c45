"""Methods in a vision transformer, by hooks on its blocks as they are.

How a block ``x = x + attention(norm1(x)); x = x + mlp(norm2(x))`` comes to have fewer tokens from its middle on:

* before ``norm2``, whose input is what attention left (B, T, C): the method runs, and the norm is given its T' tokens;
* after the last module of the MLP's branch, which leaves (B, T', C): that is taken away, and zeros (B, 1, C) go on, for
  the block to add to its T tokens;
* after the block: what it leaves is the method's tokens plus what was taken away, T' tokens.

Of the tokens that are gone the block computes no MLP, only that one addition; gradients flow as in a block written for
it. Nothing else in the model changes: no class, attribute, parameter or buffer. ``torch.compile`` traces through the
hooks, so that a model with a method in it still compiles to one graph.
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
from vistok.host.vit.models import ViT
from vistok.host.vit.reducer import Stage, ViTEvidence, ViTReducer
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
    """What left each block, without values; -1: what entered the first."""
    held: dict[str, Any] = field(default_factory=dict)
    """Of the block that is running: its queries, keys, angles, bias, the method's tokens and the MLP's output."""


class ViTLog:
    """What a session tells of the last forward pass; see ``ViTSession``."""

    kv_bytes = 0

    def __init__(self, vit: ViT, after_layers: frozenset[int]) -> None:
        self.vit = vit
        self.after_layers = after_layers
        """Blocks at whose end a method acts, so that their MLPs run on all that they are given."""
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
        batch, prefix = len(states[0].source), states[0].prefix
        spent = 0
        for layer, block in enumerate(self.vit.blocks):
            tokens, left = states[layer].num_slots + prefix, states[layer + 1].num_slots + prefix
            spent += _linear(block.attention, tokens) + flops.attention(tokens, tokens, *_heads(block.attention))
            spent += _linear(block.mlp, tokens if layer in self.after_layers else left)
        weights = [m.weight.numel() for m in self.vit.patches.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        return {"patches": batch * 2 * states[0].num_slots * sum(weights), "blocks": batch * spent}

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
        for method in methods:
            for layer in method.stages(self.depth):
                if layer in self.at:
                    raise ValueError(
                        f"method: {type(self.at[layer]).__name__} and {type(method).__name__} both act at block "
                        f"{layer}; several methods must act at different blocks"
                    )
                self.at[layer] = method
        self.proportional = any(method.proportional for method in methods)
        if self.proportional and vit.fused:
            raise UnsupportedModel(
                f"{type(vit.tower).__name__} with {vit.tower.config._attn_implementation}: attention in proportion to "
                "size needs an additive mask; load the model with attn_implementation='sdpa', or switch it off "
                "(proportional=False)"
            )
        self.log = ViTLog(vit, frozenset(layer for layer, method in self.at.items() if method.place == "after"))

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
                if self.at[layer].place == "mid":
                    hooks.before(block.norm, partial(self._halfway, layer))
                    hooks.after(block.branch, self._takes)
            hooks.after(block.module, partial(self._leaves, layer))

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
        if state.num_slots == state.source.shape[1] and not state.merged:
            if self.vit.rotary:
                run.held["angles"] = kwargs.get(self.vit.rotary)
            return None
        name = self.vit.mask
        given = kwargs.get(name, args[1] if len(args) > 1 else None)
        if given is not None:
            raise ValueError(f"{name}: a mask of the caller's cannot be followed once tokens are gone, leave it out")
        kwargs = dict(kwargs)
        if self.proportional:
            bias = state.key_bias(x.dtype)
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
        state: TokenState | None = run.held.get("state")
        if state is not None:
            output = state.x + run.held["mlp"]
        elif layer in self.log.after_layers and (state := self._reduced(layer, output)) is not None:
            output = state.x
        run.left[layer] = run.left[layer - 1] if state is None else state.bare
        run.held.clear()
        if layer == self.depth - 1 and not torch.compiler.is_compiling():
            self.log.spans["total"] = [(self.log.start, self.log.mark())]
        return output

    def _restores(self, fill: Fill, module: Any, args: Any, output: Any) -> Any:
        return self._run().left[self.depth - 1].restored(output, fill)

    # What they share --------------------------------------------------------------------------------------------------

    def _run(self) -> Run:
        if self.log.run is None:
            raise RuntimeError("session: the blocks ran without the patch embedding; call the model on pixels")
        return self.log.run

    def _reduced(self, layer: int, x: Tensor) -> TokenState | None:
        """What the method of block ``layer`` makes of ``x`` (B, T, C); None where it has nothing to do."""
        run, method = self._run(), self.at[layer]
        before = run.left[layer - 1]
        stage = Stage(layer, self.depth, before.source.shape[1])
        tokens = before.num_slots
        count = method.count(tokens, stage)
        if count == tokens:
            return None
        start = None if torch.compiler.is_compiling() else self.log.mark()
        state = method.reduce(replace(before, x=x), self._evidence(layer, stage), count)
        if start is not None:
            self.log.spans["select"].append((start, self.log.mark()))
        return state

    def _evidence(self, layer: int, stage: Stage) -> ViTEvidence:
        held, attention = self._run().held, self.vit.blocks[layer].attention
        q, k = (self.vit.heads(attention, held.pop(name)) for name in "qk")
        if held.get("angles") is not None:
            q, k = (self.vit.turn(attention, t, held["angles"]) for t in (q, k))
        scale = q.shape[-1] ** -0.5
        return ViTEvidence(q, k, scale, self.vit.prefix, self.vit.class_token, stage, held.get("bias"))


def _taken(angles: Any, anchor: Tensor) -> Any:
    """Rotary angles of the slots: rows ``anchor`` (B, K) of ``angles``, which are (N, D), (H, N, D), (B, 1, N, D) or a
    pair of such. (B, H or 1, K, D); a slot without a place gets the first patch's."""
    if isinstance(angles, tuple):
        return tuple(_taken(part, anchor) for part in angles)
    heads = angles.shape[-3] if angles.ndim > 2 else 1
    full = angles.expand(len(anchor), heads, *angles.shape[-2:])
    index = anchor.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, full.shape[-1])
    return full.gather(2, index)

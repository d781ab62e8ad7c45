"""Forwards of a prefix model: a prompt in blocks and an answer to it, each seeing itself and what comes before.

Both really get shorter where a method drops visual tokens, and in layers that visual tokens bypass.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vistok.core import flops
from vistok.core.attention import attention_rows
from vistok.core.visibility import block_visibility
from vistok.host.hooks import Hooks
from vistok.host.hosts import Host
from vistok.host.llm import LayerView
from vistok.host.pictures import Group
from vistok.host.reducer import Reducer
from vistok.host.rows import pack, places, take
from vistok.host.steps import Steps

PICTURE, QUESTION = 0, 1
"""Blocks of the prompt, in the order in which they are read; the answer comes after them."""


@dataclass
class Columns:
    """The columns of a prompt that go into a forward, T' of T."""

    embeds: Tensor
    """(B, T', D)"""
    positions: Tensor
    """(B, T') or (3, B, T')"""
    block: Tensor
    """(B, T') int64, -1 for padding"""
    visual: Tensor
    """(B, T') bool"""
    index: Tensor
    """(B, T') int64: which columns of the whole prompt they are, -1 for padding"""

    @property
    def real(self) -> Tensor:
        return self.block >= 0

    def take(self, local: Tensor, embeds: Tensor | None = None) -> Columns:
        """Its columns ``local`` (B, T''), -1 is padding; of ``embeds`` (B, T', D) if they are others by now."""
        gone = local < 0
        return Columns(
            take(self.embeds if embeds is None else embeds, local),
            take(self.positions, local, -1),
            take(self.block, local).masked_fill(gone, -1),
            take(self.visual, local),
            take(self.index, local).masked_fill(gone, -1),
        )


@dataclass
class Pruning:
    """A method that has reduced a prompt of ``width`` columns to ``prompt``, and may go on inside."""

    steps: Steps
    method: Reducer
    groups: list[Group]
    prompt: Columns
    words: Tensor
    width: int


class Flow:
    """Forwards of a prompt and answers to it, with what is dropped and bypassed on the way."""

    def __init__(
        self,
        host: Host,
        prompt: Columns,
        later: Tensor,
        skipped: frozenset[int],
        *,
        cache: bool,
        trace: bool,
        pruning: Pruning | None = None,
    ) -> None:
        """``later`` (..., B, A): the position ids of the answer; ``skipped``: the layers that visual tokens bypass;
        ``cache``: run the prompt once."""
        self.host, self.keeps = host, cache
        self.later, self.skipped, self.trace, self.pruning = later, skipped, trace, pruning
        self.prompt = prompt if pruning is None else pruning.prompt
        self.stages = set() if pruning is None else pruning.steps.stages(pruning.groups)
        self.cache = DynamicCache()
        self.held: list[tuple[Tensor, Tensor]] = []
        """Keys and values of the prompt, by layer."""
        self.columns: list[Columns] = []
        """Which columns of the prompt each layer runs on, and so holds keys of."""

    @property
    def visual(self) -> float:
        """Visual tokens, mean over rows and layers."""
        return sum(float(now.visual.sum()) for now in self.columns) / len(self.columns) / len(self.prompt.block)

    def forward(self, answer: Tensor) -> Tensor:
        """(B, A, V) logits of the answer whose embeddings are ``answer`` (B, A, D)."""
        self.flops = 0
        self.shares: list[Tensor] = []
        if not self.held or not self.keeps:
            self._read()
        hidden = self._run(self._before_answer, None, answer, self._mask(self.columns[0]), self.later)
        for layer, (keys, values) in zip(self.cache.layers, self.held, strict=True):
            layer.keys, layer.values = keys, values
        head = self.host.head
        self.flops += len(answer) * flops.linear(answer.shape[1], *reversed(head.weight.shape))
        return head(hidden)

    def _run(self, before: Any, after: Any, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        hooks = Hooks()
        for number, layer in enumerate(self.host.layers):
            hooks.before(layer, partial(before, number))
            if after is not None:
                hooks.after(layer, after)
        try:
            return self.host.language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        finally:
            hooks.remove()

    # The prompt -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Run the prompt and hold its keys and values."""
        self.cache = DynamicCache(config=self.host.language_model.config)
        self.groups = [] if self.pruning is None else [copy(one) for one in self.pruning.groups]
        self.now, self.columns = self.prompt, []
        self.aside: tuple[Tensor, Tensor] | None = None
        self.fed: dict[str, Any] | None = None
        mask = block_visibility(self.prompt.block)[:, None]
        self._run(self._before_prompt, self._after_prompt, self.prompt.embeds, mask, self.prompt.positions)
        self.held = [(layer.keys, layer.values) for layer in self.cache.layers]

    def _feed(self, now: Columns) -> dict[str, Any]:
        """What a layer is given for the columns ``now``."""
        rotary = self.host.language_model.rotary_emb(now.embeds, now.positions)
        mask = block_visibility(now.block)[:, None]
        return {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}

    def _before_prompt(self, number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden: Tensor = args[0]
        kwargs = kwargs if self.fed is None else kwargs | self.fed
        if number in self.stages:
            hidden = self._reduce_at(number, layer, hidden, kwargs)
            kwargs = kwargs if self.fed is None else kwargs | self.fed
        now = self.now
        if number in self.skipped and bool(now.visual.any()):
            local = pack(~now.visual, now.real)
            self.aside = hidden, local
            now = now.take(local, hidden)
            hidden, kwargs = now.embeds, kwargs | self._feed(now)
        self.columns.append(now)
        self._count(layer, hidden, hidden.shape[1])
        return (hidden, *args[1:]), kwargs

    def _after_prompt(self, layer: Any, args: Any, output: Any) -> Any:
        if self.aside is None:
            return None
        (whole, local), self.aside = self.aside, None
        made: Tensor = output[0] if isinstance(output, tuple) else output
        back = places(local, whole.shape[1])
        made = torch.where(back[..., None] < 0, whole, take(made, back))
        return (made, *output[1:]) if isinstance(output, tuple) else made

    def _reduce_at(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The method's stage before decoder layer ``number``. The last token that it sees is the prompt's."""
        pruning, now = self.pruning, self.now
        if pruning is None:
            return hidden
        steps, needs = pruning.steps, pruning.method.layer_needs
        values_now, alive = hidden.clone(), torch.ones_like(now.visual)
        view = LayerView(layer, hidden, now.real, kwargs, None, own_mask=True) if needs else None
        now_at = places(now.index, pruning.width)
        for one in self.groups:
            if number not in one.schedules[0].layers or not one.count:
                continue
            fields = {} if view is None else view.fields(needs, one, now_at, pruning.words)
            result = steps.at_layer(0, number, one, hidden, now.index, pruning.width, fields)
            if result is not None:
                before, after, values = result
                rows = one.rows[:, None]
                alive[rows, before] = False
                alive[rows, after] = True
                values_now[rows, after] = values
        if not bool(alive.all()):
            self.now = now.take(pack(alive, now.real), values_now)
            self.fed = self._feed(self.now)
            hidden = self.now.embeds
        return hidden

    # The answer -----------------------------------------------------------------------------------------------------

    def _mask(self, now: Columns) -> Tensor:
        """(B, 1, A, T' + A): an answer sees all but padding."""
        length = self.later.shape[-1]
        real = torch.cat([now.real, now.real.new_ones(len(now.real), length)], 1)
        return real[:, None, None].expand(-1, -1, length, -1)

    def _before_answer(self, number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden: Tensor = args[0]
        now = self.columns[number]
        kwargs = kwargs | {"attention_mask": self._mask(now)}
        self._count(layer, hidden, now.block.shape[1] + hidden.shape[1])
        if self.trace:
            self.shares.append(self._share(number, layer, hidden, now, kwargs))
        return args, kwargs

    # What is measured -----------------------------------------------------------------------------------------------

    def _count(self, layer: Any, hidden: Tensor, keys: int) -> None:
        self.flops += len(hidden) * self.host.layer_flops(layer, hidden.shape[1], keys)

    def _share(self, number: int, layer: Any, hidden: Tensor, now: Columns, kwargs: dict[str, Any]) -> Tensor:
        """(B, 3): where the attention of the answer's tokens goes, mean over heads and tokens."""
        batch, length = hidden.shape[:2]
        real = now.real.new_ones(batch, length)
        view = LayerView(layer, hidden, real, kwargs, (self.held[number][0], now.real), own_mask=True)
        rows, columns = (torch.arange(n, device=hidden.device) for n in (batch, length))
        weights = attention_rows(**view.inputs(rows, columns.expand(batch, -1))).mean((1, 2))
        prompt, answer = weights[:, :-length], weights[:, -length:].sum(1)
        image = (prompt * now.visual).sum(1)
        return torch.stack([image, prompt.sum(1) - image, answer], 1)

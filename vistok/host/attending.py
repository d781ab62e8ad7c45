"""Where the attention of an answer goes: what each visual token gets of it in each decoder layer.

    with vistok.apply(model, "fastv", keep=0.5) as session, AnswerAttention(session) as attention:
        model.generate(**inputs)
    attention.rows                  # (layers, answer's tokens, visual tokens)

The model runs with the attention it has (SDPA, FlashAttention); the one row that is wanted a layer and step is worked
out beside it from the layer's own norm, projections and rotary embedding (``vistok.host.llm``).
"""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vistok.core.attention import attention_rows
from vistok.host.attention import AttentionMethod
from vistok.host.cache import ReducedLayer
from vistok.host.effort import Effort
from vistok.host.hooks import Hooks
from vistok.host.llm import LayerView
from vistok.host.session import Session


class AnswerAttention:
    """Watches a session, which must have been entered, while it answers one prompt with one picture.

    Raises ValueError for a method under which a layer's attention is another (``Effort``, ``AttentionMethod``) and for
    a decoder that does not attend by queries and keys in all layers; and, as the model runs, for a batch and for
    several pictures.
    """

    def __init__(self, session: Session) -> None:
        if any(isinstance(method, (Effort, AttentionMethod)) for method in session.methods):
            raise ValueError("session: its method changes how layers attend, so that their attention cannot be read")
        if not all(hasattr(getattr(layer, "self_attn", None), "q_proj") for layer in session._engine.host.layers):
            raise ValueError(f"session: not every layer of {session._engine.host.name} attends by queries and keys")
        self._engine = session._engine
        self._hooks = Hooks()
        self._rows: list[list[Tensor]] = []
        self._tokens: list[Tensor] = []
        self._columns: list[Tensor] = []
        self._count = 0

    def __enter__(self) -> AnswerAttention:
        self._rows = [[] for _ in self._engine.host.layers]
        self._tokens, self._columns = [], []
        for number, layer in enumerate(self._engine.host.layers):
            self._hooks.before(layer, partial(self._before_layer, number))  # after the engine's own
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.remove()

    @property
    def rows(self) -> Tensor:
        """(L, A, N) float32 on the CPU: the attention, mean over heads, by which each of the A tokens was chosen. The
        first was chosen at the prompt's last token, each later one at the token before it. NaN where a visual token is
        not there any more. A row over all N and the text is 1."""
        if not self._rows or not self._rows[0]:
            raise RuntimeError("rows: no prompt has been answered yet")
        steps = min(len(rows) for rows in self._rows)  # an answer that was stopped may be one short in later layers
        return torch.stack([torch.stack(rows[:steps]) for rows in self._rows])

    @property
    def tokens(self) -> list[Tensor]:
        """For each layer which visual tokens (K,) int64 it was given, ascending."""
        return self._tokens

    def _before_layer(self, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0]
        if hidden.shape[0] != 1:
            raise ValueError(f"inputs: got {hidden.shape[0]} rows, must be one")
        if self._engine.groups:
            self._read(number)
        past, columns = self._keys(number, hidden, kwargs)
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        view = LayerView(layer, hidden, real, kwargs, past, self._engine.host.own_masks)
        last = torch.tensor([hidden.shape[1] - 1], device=hidden.device)
        weights = attention_rows(**view.inputs(torch.zeros_like(last), last[None]))[0, :, 0].mean(0)

        # Which key stands for each token: those of a method that lets keys go after the prompt are not there any more.
        is_its = self._columns[number][:, None] == columns
        here = is_its.any(1)
        row = torch.full((self._count,), torch.nan)
        row[self._tokens[number][here.cpu()]] = weights[is_its.int().argmax(1)[here]].float().cpu()
        self._rows[number].append(row)

    def _read(self, number: int) -> None:
        """The prompt is being read: which visual tokens this layer is given, and their columns in the prompt."""
        groups = self._engine.groups
        if len(groups) != 1 or len(groups[0].places) != 1:
            raise ValueError("inputs: must hold one picture")
        if number == 0:
            self._rows = [[] for _ in self._rows]
            self._tokens, self._columns = [], []
            self._count = groups[0].layout.num_tokens
        self._tokens.append(groups[0].positions[0].cpu())
        self._columns.append(groups[0].columns[0])

    def _keys(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
        """The keys of earlier calls and that they are real, if any; and the column of the prompt of each key (K,) that
        the layer looks at, -1 for those that came after the prompt."""
        stream, width, device = self._engine.stream, hidden.shape[1], hidden.device
        if self._engine.groups:
            return None, torch.arange(width, device=device) if stream is None else stream.index[0]
        layer = kwargs["past_key_values"].layers[number]
        if isinstance(layer, ReducedLayer):
            keys, columns = layer.held_keys, layer.all_columns(1, device)[0]
        else:
            keys, columns = layer.keys, torch.arange(layer.keys.shape[2], device=device)
        real = torch.ones(1, keys.shape[2], dtype=torch.bool, device=device)
        return (keys, real), torch.cat([columns, columns.new_full((width,), -1)])

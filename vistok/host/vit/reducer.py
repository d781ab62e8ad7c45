"""What a method for vision transformers is: how many tokens stay at which block, and which.

    score -> budget -> combine -> restore

``budget`` is ``ViTReducer.stages`` and ``count``, known before the first picture comes; ``score`` is read from
``Evidence``; ``combine`` is ``reduce``, a pure function from a TokenState to a smaller one; ``restore`` is the state's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vistok.core.attention import attention_marginals, attention_rows
from vistok.host.keep import Keep, check_keep
from vistok.host.vit.state import TokenState


@dataclass(frozen=True)
class Stage:
    """Where in the model a method is about to act."""

    layer: int
    """The block, from 0."""
    depth: int
    """How many blocks there are."""
    patches: int
    """N, the patches that went in."""


@dataclass(frozen=True, eq=False)
class ViTEvidence:
    """Queries and keys of a block's attention, as the attention used them. Only what a method asks for is computed
    from them, in float32 at least; gradients flow through it. T = P + K tokens, prefix first."""

    q: Tensor
    """(B, H, T, d), normed and turned by the model's rotary embedding where it has them."""
    k: Tensor
    """(B, Hk, T, d), Hk dividing H."""
    scale: float
    prefix: int
    """P: class token (first, if there is one), distillation token, registers."""
    class_token: bool
    stage: Stage
    bias: Tensor | None = None
    """(B, 1, 1, T) added to the products, where slots attend in proportion to their size."""

    @property
    def class_row(self) -> Tensor:
        """(B, H, K): what the class token attends to; softmax over all T tokens, prefix columns left out.

        Costs O(T). Without a class token: the attention that each slot receives, mean over queries, by head.
        """
        if self.class_token:
            return attention_rows(self.q[:, :, :1], self.k, self.scale, self.bias)[:, :, 0, self.prefix :]
        b, h = self.q.shape[:2]
        q, k = (t.flatten(0, 1)[:, None] for t in (self.q, self.k.repeat_interleave(h // self.k.shape[1], 1)))
        bias = None if self.bias is None else self.bias.repeat_interleave(h, 0)
        return attention_marginals(q, k, self.scale, mask=bias)[0].view(b, h, -1)[:, :, self.prefix :]

    @property
    def received(self) -> Tensor:
        """(B, K): attention that each slot receives, mean over heads and all T queries; made in blocks of queries."""
        return attention_marginals(self.q, self.k, self.scale, mask=self.bias)[0][:, self.prefix :]

    @property
    def attention(self) -> Tensor:
        """(B, H, T, T): the whole map. Only for methods that are defined on it."""
        return attention_rows(self.q, self.k, self.scale, self.bias)

    @property
    def keys(self) -> Tensor:
        """(B, T, d): keys of all tokens, prefix too, mean over the heads."""
        return self.k.mean(1)


class ViTReducer:
    """Base of the family. A system is a frozen dataclass of its hyper-parameters that writes ``count`` and ``reduce``.

    * ``place``: "mid" if it acts between a block's attention and its MLP, "after" if on what the block leaves.
    * ``extra``: slots that ``reduce`` leaves besides the ``count`` (a token that the others are fused into).
    * ``proportional``: True if merged slots are to attend in proportion to their size (``TokenState.key_bias``).
    """

    place: ClassVar[Literal["mid", "after"]] = "mid"

    @property
    def extra(self) -> int:
        return 0

    @property
    def proportional(self) -> bool:
        return False

    def stages(self, depth: int) -> Sequence[int]:
        """The blocks (0..depth-1) at which it acts: all, unless overridden. ValueError if it cannot at this depth."""
        return range(depth)

    def count(self, tokens: int, stage: Stage) -> int:
        """Slots that stay of ``tokens``, 1..tokens; ``tokens`` itself for nothing to be done here."""
        raise TypeError(f"{type(self).__name__} must define count()")

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        """``state`` with ``count`` (+ ``extra``) slots, 0 < count < K. Rows of the batch do not see one another."""
        raise TypeError(f"{type(self).__name__} must define reduce()")

    def plan(self, patches: int, depth: int) -> list[int]:
        """Slots that leave each of ``depth`` blocks when ``patches`` go in, prefix tokens not counted."""
        now, out, stages = patches, [], set(self.stages(depth))
        for layer in range(depth):
            if layer in stages and (count := self.count(now, Stage(layer, depth, patches))) != now:
                now = count + self.extra
            out.append(now)
        return out


class KeepRate(ViTReducer):
    """Base of methods that keep the same share of the slots at each of a few blocks: fields ``keep`` and ``layers``.

    A share in (0, 1] leaves ceil(keep * K) of K slots (EViT's rounding); a count >= 1 leaves so many.
    """

    keep: Keep
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))
        layers = tuple(self.layers)
        if not all(isinstance(layer, int) and layer >= 0 for layer in layers) or len({*layers}) < len(layers):
            raise ValueError(f"layers: got {self.layers}, must be different block numbers from 0")
        object.__setattr__(self, "layers", layers)

    def stages(self, depth: int) -> Sequence[int]:
        if any(layer >= depth for layer in self.layers):
            raise ValueError(f"layers: got {max(self.layers)}, but the model has the blocks 0..{depth - 1}")
        return sorted(self.layers)

    def count(self, tokens: int, stage: Stage) -> int:
        if isinstance(self.keep, int):
            return min(self.keep, tokens)
        return max(1, math.ceil(self.keep * tokens))

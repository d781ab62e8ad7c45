"""What a method for vision transformers is: how many tokens stay at which block, and which.

    score -> budget -> combine -> restore

``budget`` is ``ViTReducer.stages`` and ``count``, known before the first picture comes; ``score`` is read from
``Evidence``; ``combine`` is ``reduce``, a pure function from a TokenState to a smaller one; ``restore`` is the state's.

A method may also add tokens, or look at what passes: ``TokenStep``, a pure function from TokenState to TokenState
before or after blocks. A method made of several parts, such as one around another, names them as its ``steps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vistok.core.attention import attention_marginals, attention_rows
from vistok.host.keep import Keep, check_keep
from vistok.host.keep import count as tokens_of
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

    def by_equal_steps(self, keep: Keep, tokens: int) -> int:
        """How many of ``tokens`` slots stay if every block takes as many, for ``keep`` (of N) to be left by the last.

        No block takes more than half.
        """
        fewer = (self.patches - tokens_of(keep, self.patches)) * (self.layer + 1) // self.depth
        return max(min(tokens, self.patches - fewer), tokens - tokens // 2)


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
    read_values: Callable[[], Tensor] | None = None
    """What leaves ``values``."""

    def withheld(self, held: int) -> ViTEvidence:
        """The evidence to go with ``TokenState.withheld``: the last ``held`` tokens are at the end of the prefix."""
        if not held:
            return self

        def turned(rows: Tensor, dim: int) -> Tensor:
            first, free, last = rows.split([self.prefix, rows.shape[dim] - self.prefix - held, held], dim)
            return torch.cat([first, last, free], dim)

        return replace(
            self,
            q=turned(self.q, 2),
            k=turned(self.k, 2),
            prefix=self.prefix + held,
            bias=None if self.bias is None else turned(self.bias, 3),
            read_values=lambda: turned(self.values, 2),
        )

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
    def values(self) -> Tensor:
        """(B, Hk, T, d): the attention's values."""
        if self.read_values is None:
            raise RuntimeError("values: this evidence was made without them; give read_values=lambda: values")
        return self.read_values()

    @property
    def keys(self) -> Tensor:
        """(B, T, d): keys of all tokens, prefix too, mean over the heads."""
        return self.k.mean(1)


class TokenStep:
    """Base of what needs no evidence: ``act`` before or after each block of ``stages``. It may add tokens
    (``TokenState.add``), put values aside for a later block, or change values; it removes none."""

    place: ClassVar[Literal["before", "after"]] = "after"

    @property
    def held(self) -> bool:
        """Whether what it adds is withheld from reducers."""
        return False

    def stages(self, depth: int) -> Sequence[int]:
        """The blocks (0..depth-1) at which it acts."""
        raise TypeError(f"{type(self).__name__} must define stages()")

    def adds(self, stage: Stage) -> int:
        """How many tokens it adds there."""
        return 0

    def act(self, state: TokenState, stage: Stage) -> TokenState:
        """``state`` with ``adds`` more slots. Rows of the batch do not see one another."""
        raise TypeError(f"{type(self).__name__} must define act()")


@dataclass(frozen=True, eq=False)
class AddTokens(TokenStep):
    """The same tokens for every picture, from block ``layer`` on."""

    place = "before"

    tokens: Tensor
    """(1, M, C), or one row a picture (B, M, C)."""
    layer: int = 0
    hold: bool = True
    """Whether they are withheld from reducers, so that they are there to the end; they are ranked as patches are
    otherwise."""

    @property
    def held(self) -> bool:
        return self.hold

    def stages(self, depth: int) -> Sequence[int]:
        if self.layer not in range(depth):
            raise ValueError(f"layer: got {self.layer}, but the model has the blocks 0..{depth - 1}")
        return (self.layer,)

    def adds(self, stage: Stage) -> int:
        return self.tokens.shape[1]

    def act(self, state: TokenState, stage: Stage) -> TokenState:
        return state.add(self.tokens.expand(len(state.x), -1, -1), self.hold)


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

    @property
    def steps(self) -> Sequence[ViTReducer | TokenStep]:
        """What acts: the method itself, unless it is made of others (then ``stages``, ``count`` and ``reduce`` are
        theirs). At one place of a block steps act in this order."""
        return (self,)

    def plan(self, patches: int, depth: int) -> list[int]:
        """Slots that leave each of ``depth`` blocks when ``patches`` go in, prefix tokens not counted."""
        free, held, out = patches, 0, []
        for layer in range(depth):
            stage = Stage(layer, depth, patches)
            steps = [step for step in self.steps if layer in step.stages(depth)]
            for step in sorted(steps, key=lambda step: _ORDER[step.place, isinstance(step, TokenStep)]):
                if isinstance(step, ViTReducer):
                    count = step.count(free, stage)
                    free = free if count == free else count + step.extra
                elif step.held:
                    held += step.adds(stage)
                else:
                    free += step.adds(stage)
            out.append(free + held)
        return out


_ORDER = {("before", True): 0, ("mid", False): 1, ("after", False): 1, ("after", True): 2}
"""In a block, by place and whether it is a TokenStep."""


class KeepRate(ViTReducer):
    """Base of methods that keep the same share of the slots at each of a few blocks: fields ``keep`` and ``layers``.

    A share in (0, 1] leaves ceil(keep * K) of K slots (EViT's rounding); a count >= 1 leaves so many. Without
    ``layers`` the blocks are those after a quarter, a half and three quarters of the depth: 3, 6, 9 of 12, as in EViT
    and DynamicViT.
    """

    keep: Keep
    layers: tuple[int, ...] | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))
        if self.layers is None:
            return
        layers = tuple(self.layers)
        if not all(isinstance(layer, int) and layer >= 0 for layer in layers) or len({*layers}) < len(layers):
            raise ValueError(f"layers: got {self.layers}, must be different block numbers from 0")
        object.__setattr__(self, "layers", layers)

    def stages(self, depth: int) -> Sequence[int]:
        layers = {depth * quarter // 4 for quarter in (1, 2, 3)} if self.layers is None else self.layers
        if any(layer >= depth for layer in layers):
            raise ValueError(f"layers: got {max(layers)}, but the model has the blocks 0..{depth - 1}")
        return sorted(layers)

    def count(self, tokens: int, stage: Stage) -> int:
        if isinstance(self.keep, int):
            return min(self.keep, tokens)
        return max(1, math.ceil(self.keep * tokens))

"""Which tokens see which. All masks are bool, True where a query (row) sees a key (column).

A float mask of 0 and 1 is added to the logits by scaled_dot_product_attention and masks nothing: never make one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def block_visibility(block: Tensor, segment: Tensor | None = None) -> Tensor:
    """(B, L, L) bool, True where a query (row) sees a key (column): its own block in both directions, and all before.

    ``block`` (B, L) int64: 0, 1, ... in the order in which they are read, -1 for padding, which sees padding only (so
    that no row of a softmax is empty) and is seen by nothing else. ``segment`` (B, L) int64: tokens of different
    segments do not see each other, but all see those of segment 0.
    """
    query, key = block[:, :, None], block[:, None, :]
    sees = ((key >= 0) & (key <= query)) | (key == query)
    if segment is None:
        return sees
    return sees & ((segment[:, :, None] == segment[:, None, :]) | (segment == 0)[:, None, :])


@dataclass(frozen=True)
class Segment:
    """A stretch of a sequence and what it sees."""

    name: str
    length: int
    inside: Literal["full", "causal"] = "full"
    """How its tokens see one another."""
    sees: tuple[str, ...] = ()
    """The other segments that all its tokens see whole, wherever they stand."""


def visibility(segments: Sequence[Segment], device: torch.device | str = "cpu") -> Tensor:
    """(L, L) bool for ``segments`` one after another. Raises ValueError for two of one name, or an unknown one."""
    names = [segment.name for segment in segments]
    if len(set(names)) < len(names):
        raise ValueError(f"segments: got the names {', '.join(names)}, must differ")
    for segment in segments:
        if unknown := set(segment.sees) - set(names):
            raise ValueError(f"segments: {segment.name} sees {', '.join(sorted(unknown))}, must be one of {names}")
    rows = []
    for query in segments:
        cells = []
        for key in segments:
            cell = torch.full((query.length, key.length), key.name in query.sees, device=device)
            if key is query:
                cell = torch.ones_like(cell).tril() if query.inside == "causal" else torch.ones_like(cell)
            cells.append(cell)
        rows.append(torch.cat(cells, 1))
    return torch.cat(rows)


def causal(n: int) -> Tensor:
    """(n, n): each sees itself and what comes before."""
    return visibility([Segment("tokens", n, "causal")])


def prefix_causal(prefix: int, n: int) -> Tensor:
    """(prefix + n, prefix + n): the first tokens see one another only, the others all of them and are causal.

    FlexTok: patches, then registers. COMiT: offset, patches and the message read, then the message written.
    """
    return visibility([Segment("prefix", prefix), Segment("tokens", n, "causal", ("prefix",))])


def scale_causal(lengths: Sequence[int]) -> Tensor:
    """(L, L) for scales of so many tokens, coarse to fine: each sees its own scale and the coarser ones."""
    names = [str(i) for i in range(len(lengths))]
    return visibility([Segment(names[i], n, "full", tuple(names[:i])) for i, n in enumerate(lengths)])


def message_causal(seen: int, message: int) -> Tensor:
    """COMiT's intended mask: all see the first ``seen`` tokens; only the message written sees itself, causally."""
    return prefix_causal(seen, message)


def carriers_first(carriers: int, patches: int, patches_inside: Literal["causal", "full"] = "causal") -> Tensor:
    """Hita: carriers are causal; patches see them all and are causal, or see one another (Hita-U's mask tokens)."""
    return visibility(
        [Segment("carriers", carriers, "causal"), Segment("patches", patches, patches_inside, ("carriers",))]
    )


def shifted_readout(x: Tensor, carriers: int, shift: int) -> Tensor:
    """(B, patches, D): of ``x`` (B, carriers + patches, D) the places ``shift`` before the patches'.

    Output slot i is read at place carriers - shift + i, so that of a causal sequence it depends on patches up to
    i - shift only (Hita); the last ``shift`` patches are read nowhere. 0: the patches' own places.
    """
    if not 0 <= shift <= carriers:
        raise ValueError(f"shift: got {shift}, must be between 0 and the {carriers} carriers")
    return x[:, carriers - shift : x.shape[1] - shift]


def with_padding(visible: Tensor, mask: Tensor) -> Tensor:
    """(B, 1, L, L) for attention over heads: ``visible`` (L, L) where the key is real by ``mask`` (B, L) bool.

    A padded query sees itself, so that no row of a softmax is empty.
    """
    alone = torch.eye(len(visible), dtype=torch.bool, device=visible.device) & ~mask[:, :, None]
    return ((visible & mask[:, None]) | alone)[:, None]

"""Less work for visual tokens inside a decoder layer: a window to look through, fewer heads, fewer hidden units.

All that is left out is really left out, where papers often mask it: window attention gathers, tile by tile, the keys
that some query of the tile can see; a head or a unit that does not count is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

Weights = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out,) or None of a linear layer."""
SIDE = 8
"""Side of a tile of queries: larger ones gather fewer keys twice, and look at more that no query may see."""


# The window -----------------------------------------------------------------------------------------------------------


def local_mask(grid: tuple[int, int], window: int) -> Tensor:
    """(N, N) bool: whether two tokens of an (h, w) grid are less than ``window`` / 2 rows and columns apart.

    Raises ValueError unless ``window`` is odd and positive.
    """
    half = half_of(window)
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1]).repeat(grid[0])
    far = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    return far <= half


def half_of(window: int) -> int:
    """How many tokens a window reaches to each side. Raises ValueError unless ``window`` is odd and positive."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window: got {window}, must be odd and at least 1")
    return (window - 1) // 2


@dataclass(frozen=True, eq=False)
class Tiles:
    """The cells of one or more grids (numbered grid after grid, in raster order) in tiles of queries, and the cells
    whose keys some query of a tile can see."""

    cells: int
    queries: Tensor
    """(t, q) int64 cells; ``cells`` where a tile has fewer."""
    keys: Tensor
    """(t, k) int64 cells; ``cells`` where a tile has fewer."""
    near: Tensor
    """(t, q, k) bool: whether the key is in the query's window."""

    def pairs(self, others: int = 0) -> int:
        """Products of a query and a key that are computed for one picture and head; each query also sees ``others``."""
        return self.queries.numel() * (self.keys.shape[1] + others)

    def to(self, device: torch.device) -> Tiles:
        return Tiles(self.cells, self.queries.to(device), self.keys.to(device), self.near.to(device))


@lru_cache(maxsize=64)
def tiles(grids: tuple[tuple[int, int], ...], window: int, side: int = SIDE) -> Tiles:
    """Tiles of about ``side`` by ``side`` queries, equal within a grid as far as its sides allow."""
    half, first, found = half_of(window), 0, []
    for h, w in grids:
        for top, bottom in _parts(h, side):
            for left, right in _parts(w, side):
                rows, columns = torch.arange(top, bottom), torch.arange(left, right)
                above, beside = max(0, top - half), max(0, left - half)
                key_rows = torch.arange(above, min(h, bottom + half))
                key_columns = torch.arange(beside, min(w, right + half))
                queries, keys = torch.cartesian_prod(rows, columns), torch.cartesian_prod(key_rows, key_columns)
                near = (queries[:, None] - keys).abs().amax(2) <= half
                found.append((*(first + at[:, 0] * w + at[:, 1] for at in (queries, keys)), near))
        first += h * w
    most = [max(len(tile[i]) for tile in found) for i in (0, 1)]
    all_queries, all_keys = (torch.full((len(found), count), first) for count in most)
    all_near = torch.zeros(len(found), *most, dtype=torch.bool)
    for i, (queries, keys, near) in enumerate(found):
        all_queries[i, : len(queries)], all_keys[i, : len(keys)] = queries, keys
        all_near[i, : len(queries), : len(keys)] = near
    return Tiles(first, all_queries, all_keys, all_near)


def _parts(length: int, side: int) -> list[tuple[int, int]]:
    """``length`` in equal parts of at most ``side``, the last ones one shorter where it does not divide."""
    count = math.ceil(length / side)
    ends = [math.ceil(length * i / count) for i in range(count + 1)]
    return list(pairwise(ends))


# Attention ------------------------------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    unseen: Tensor | None = None,
) -> Tensor:
    """(B, H, Q, d): attention of ``q`` (B, H, Q, d) to ``k`` and ``v`` (B, Hk, M, d), Hk dividing H, fused.

    ``mask`` as in ``scaled_dot_product_attention``. ``unseen`` (B, H, M) bool: weights that are set to zero after the
    softmax, without making the others larger (so their values are set to zero before).
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if unseen is not None:
        v = v.masked_fill(unseen[..., None], 0)
    out: Tensor = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Tiles,
    cells: Tensor,
    columns: Tensor,
    others: Tensor,
    *,
    rows: Tensor | None = None,
    key_heads: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    sees: Tensor | None = None,
) -> Tensor:
    """(G, H, N, d): attention of the N visual tokens of G pictures to their neighbours, and to some other keys.

    ``q`` (G, H, N, d) their queries; ``k``, ``v`` (B, Hk, M, d) keys and values, of which a picture sees those of its
    row ``rows`` (G,) int64 (None: G = B), and a head those of ``key_heads`` (H,) int64 (None: Hk divides H).
    ``cells`` (G, N) int64: each token's cell of ``window``; ``columns`` (G, N) int64: its place among the keys. A token
    sees the tokens in its window, with ``causal`` only those up to its own place, and of the keys ``others`` (G, P; -1
    is padding) those before it. ``sees`` (H,) bool: heads whose weights to visual keys count, see ``attend``.
    """
    g, heads, n, d = q.shape
    own = torch.arange(g, device=q.device)[:, None, None]
    rows = own if rows is None else rows[:, None, None]
    slot = torch.full((g, window.cells + 1), -1, device=q.device)
    slot.scatter_(1, cells, torch.arange(n, device=q.device).expand(g, -1))
    slot[:, window.cells] = -1
    queries, keys = slot[:, window.queries], slot[:, window.keys]
    place = torch.cat([columns, columns.new_zeros(g, 1)], 1)  # where the slot -1 looks
    query_at, key_at = place[own, queries], place[own, keys]

    near = window.near & (keys >= 0)[:, :, None]
    if causal:
        near &= key_at[:, :, None] <= query_at[..., None]
    before = (others >= 0)[:, None, None] & (others[:, None, None] < query_at[..., None])
    mask = torch.cat([near, before], 3)
    mask[..., :1] |= (queries < 0)[..., None]  # whoever is not there sees something, lest it see nothing: NaN

    tiles_, width = queries.shape[1], keys.shape[2] + others.shape[1]
    at = torch.cat([key_at, others.clamp(min=0)[:, None].expand(-1, tiles_, -1)], 2)
    near_k, near_v = (x.transpose(1, 2)[rows, at].flatten(0, 1).transpose(1, 2) for x in (k, v))
    if key_heads is not None:
        near_k, near_v = near_k[:, key_heads], near_v[:, key_heads]
    unseen = None
    if sees is not None:
        visual = torch.arange(width, device=q.device) < keys.shape[2]
        unseen = (~sees[:, None] & visual)[None]
    found = attend(
        q.transpose(1, 2)[own, queries.clamp(min=0)].flatten(0, 1).transpose(1, 2),
        near_k,
        near_v,
        mask.flatten(0, 1)[:, None],
        scale,
        unseen,
    )
    out = q.new_zeros(g, n + 1, heads, d)  # the slot -1 is the row behind the last
    out[own, queries] = found.transpose(1, 2).reshape(g, tiles_, -1, heads, d)
    return out[:, :n].transpose(1, 2)


# Heads ----------------------------------------------------------------------------------------------------------------


def head_ratio(attention: Tensor, visual: Tensor, queries: Tensor | None = None) -> Tensor:
    """(B, H): attention mass on visual keys over that on all others.

    ``attention`` (B, H, Q, M) after the softmax; ``visual`` (B, M) bool; ``queries`` (B, Q) bool, which count (None:
    all). Infinite where nothing goes to the others.
    """
    weights = attention if queries is None else attention * queries[:, None, :, None]
    mass = weights.sum(2)
    on = (mass * visual[:, None]).sum(2)
    return on / (mass.sum(2) - on)


def active_heads(ratios: Tensor, threshold: float, votes: float = 0.4, always: int = 2) -> Tensor:
    """(L, H) bool: heads whose ratio (``head_ratio``) is above ``threshold`` in more than a share ``votes`` of samples.

    ``ratios`` (S, L, H) of S samples. All heads of the first ``always`` layers are active.
    """
    active = (ratios > threshold).double().mean(0) > votes
    active[:always] = True
    return active


# Units ----------------------------------------------------------------------------------------------------------------


def gated_mlp(
    x: Tensor, gate: Weights, up: Weights, down: Weights, activation: Callable[[Tensor], Tensor], units: int
) -> Tensor:
    """(..., D): down(activation(gate(x)) * up(x)) with the first ``units`` of the hidden units only."""
    hidden = activation(_rows(x, gate, units)) * _rows(x, up, units)
    return linear(hidden, down[0][:, :units], down[1])


def _rows(x: Tensor, weights: Weights, units: int) -> Tensor:
    weight, bias = weights
    return linear(x, weight[:units], None if bias is None else bias[:units])


# Counting -------------------------------------------------------------------------------------------------------------


def layer_flops(
    tokens: int,
    text_pairs: int,
    visual_pairs: Sequence[tuple[int, int]],
    units: Sequence[tuple[int, int]],
    width: int,
    heads: int,
    key_heads: int,
    head_dim: int,
) -> int:
    """Floating-point operations of one gated decoder layer on ``tokens`` tokens; conventions of ``core.flops``.

    ``text_pairs``: products of a query and a key for each head, of the tokens that see all keys; ``visual_pairs``:
    (products, heads) of those in windows; ``units``: (tokens, hidden units), how many tokens use how many.
    """
    projections = 2 * tokens * width * (2 * heads + 2 * key_heads) * head_dim
    pairs = text_pairs * heads + sum(count * of for count, of in visual_pairs)
    return projections + 4 * pairs * head_dim + sum(6 * n * width * hidden for n, hidden in units)

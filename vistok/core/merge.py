"""Where the other tokens end: every merge returns ``Merged`` and conserves mass (but ``fold_contextual`` and
``soft_matching_rounds``).

Mass: the sum over slots of ``size * tokens`` equals the sum of ``size * x`` over the input tokens that were not
dropped, and ``size`` adds up alike. ``soft_matching``, ``bipartite_soft_matching``: ToMe (Bolya et al., arXiv
2210.09461). ``soft_matching_rounds``: AIM (arXiv 2412.03248).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.core.position import rest
from vistok.core.stages import raster_slots
from vistok.core.tensors import flat_rows, ranking, take, unit, upcast


@dataclass(frozen=True)
class Merged:
    """K slots that N tokens were merged into."""

    tokens: Tensor
    """(B, K, D) values, in the dtype of the input."""
    source: Tensor
    """(B, N) int64: the slot that each input token ended in, -1 where it was dropped."""
    size: Tensor
    """(B, K): the summed size of the tokens in a slot (their number, where the input had no sizes)."""
    anchor: Tensor
    """(B, K) int64: the position (0..N-1) at which a slot stands; -1 for an empty slot."""


def size_weighted_mean(
    x: Tensor, source: Tensor, slots: int, size: Tensor | None = None, anchor: Tensor | None = None
) -> Merged:
    """Mean of the tokens of ``x`` (B, N, D) in each slot, weighted by ``size`` (B, N), by default 1.

    ``source`` (B, N) int64 names the slot (0..slots-1) of each token, -1 to drop it. Empty slots are 0 with size 0. A
    token alone in its slot keeps its value bit for bit. ``anchor`` (B, slots): see ``Merged``; by default each slot's
    first token.
    """
    b, n, d = x.shape
    wide = upcast(x)
    weight = wide.new_ones(b, n) if size is None else size.to(wide.dtype)
    at = torch.where(source < 0, slots, source)  # one more slot takes what is dropped
    total = weight.new_zeros(b, slots + 1).scatter_add(1, at, weight)
    share = torch.where(weight > 0, weight / total.gather(1, at), 0)
    rows = flat_rows(at, slots + 1).flatten()
    tokens = wide.new_zeros(b * (slots + 1), d).index_add(0, rows, (wide * share[..., None]).flatten(0, 1))
    tokens = tokens.view(b, slots + 1, d)
    if anchor is None:
        index = torch.arange(n, device=x.device).expand(b, n)
        anchor = index.new_full((b, slots + 1), n).scatter_reduce(1, at, index, "amin")[:, :slots]
        anchor = torch.where(anchor == n, -1, anchor)
    return Merged(tokens[:, :slots].to(x.dtype), source, total[:, :slots], anchor)


def unmerge(tokens: Tensor, source: Tensor) -> Tensor:
    """(B, N, D): every input token's slot value, from slots (B, K, D) and ``source`` (B, N); 0 where dropped."""
    values = take(tokens, source.clamp_min(0))
    return values.masked_fill((source < 0).unsqueeze(-1), 0)


def nearest_slot(metric: Tensor, anchors: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) int64: for each token the slot of the anchor it is most similar to (cosine), ties to the lower slot.

    ``anchors`` (B, K) int64 are distinct positions into ``metric`` (B, N, d); each is in its own slot. Tokens that
    ``mask`` (B, N) marks False are dropped (-1).
    """
    b, k = anchors.shape
    if not k:
        raise ValueError("anchors: got none, at least one is needed")
    rows = unit(metric)
    slot = torch.bmm(rows, take(rows, anchors).transpose(1, 2)).argmax(2)
    if mask is not None:
        slot = torch.where(mask, slot, -1)
    return slot.scatter(1, anchors, torch.arange(k, device=slot.device).expand(b, k))


def nearest_anchor(
    x: Tensor, anchors: Tensor, *, metric: Tensor | None = None, size: Tensor | None = None, mask: Tensor | None = None
) -> Merged:
    """Each token of ``x`` (B, N, D) joins its nearest of ``anchors`` (B, K); slots are size-weighted means.

    ``metric`` (B, N, d), by default ``x``, is what nearness (cosine) is measured on. ``mask`` as in ``nearest_slot``.
    """
    source = nearest_slot(x if metric is None else metric, anchors, mask)
    return size_weighted_mean(x, source, anchors.shape[1], size, anchors)


def dominant_contextual(
    x: Tensor, score: Tensor, metric: Tensor, dominant: int, contextual: int, average: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of ``x`` (B, N, D): the ``dominant`` best by ``score`` (B, N) in raster order, then ``contextual`` anchors.

    ``dominant_and_spread`` chooses them, ``fold_contextual`` gives their values by ``metric`` (B, N, d). Returns the
    slots' positions (B, K) int64, values (B, K, D) and the slot (B, N) of each token, -1 where it was dropped.
    ValueError unless ``dominant + contextual`` is between 0 and N.
    """
    picks = dominant_and_spread(score, dominant, contextual)
    return picks, *fold_contextual(x, metric, picks, contextual, average)


def dominant_and_spread(score: Tensor, dominant: int, contextual: int) -> Tensor:
    """(B, K): the ``dominant`` best by ``score`` (B, N) in raster order, then ``contextual`` at a uniform stride of the
    rest. ValueError unless they add up to between 0 and N."""
    n = score.shape[1]
    if dominant < 0 or contextual < 0 or dominant + contextual > n:
        raise ValueError(f"dominant, contextual: got {dominant}, {contextual}, must add up to at most the {n} tokens")
    best = ranking(score)[:, :dominant].sort(1).values
    if not contextual:
        return best
    others = rest(best, n)
    return torch.cat([best, others[:, :: max(1, others.shape[1] // contextual)][:, :contextual]], 1)


def fold_contextual(
    x: Tensor, metric: Tensor, picks: Tensor, contextual: int, average: bool = False
) -> tuple[Tensor, Tensor]:
    """Values (B, K, D) of the slots ``picks`` (B, K), the last ``contextual`` of which take in what was not picked.

    ``metric`` (B, N, d) decides by cosine which of these anchors each left-over token of ``x`` (B, N, D) joins; without
    anchors it is dropped. An anchor's value is its own plus the mean of those that joined it (VisionZip arXiv
    2412.04467), or with ``average`` the mean of all of them. The other values are those of ``x``, bit for bit. Also
    returns the slot (B, N) of each token, -1 where it was dropped.
    """
    b, n, _ = x.shape
    dominant = picks.shape[1] - contextual
    best, anchors = picks[:, :dominant], picks[:, dominant:]
    place = torch.arange(dominant, device=x.device).expand(b, dominant)
    if not contextual:
        return take(x, best), best.new_full((b, n), -1).scatter(1, best, place)
    left = torch.ones(b, n, dtype=torch.bool, device=x.device).scatter(1, best, False)
    group = nearest_slot(metric, anchors, left)
    if average:
        folded = size_weighted_mean(x, group, contextual).tokens
    else:
        folded = take(x, anchors) + size_weighted_mean(x, group.scatter(1, anchors, -1), contextual).tokens
    source = torch.where(group < 0, -1, group + dominant).scatter(1, best, place)
    return torch.cat([take(x, best), folded], 1), source


def soft_matching(metric: Tensor, r: int, *, protected: int = 0, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which ``r`` of N tokens are to merge: those at even positions most similar to one at an odd position.

    ``metric`` (B, N, d) is compared by cosine; no gradient flows through it. Returns (B, E) int64, the even tokens by
    falling similarity, the first ``r`` of which merge, and (B, r), the odd token that each of these is most similar to.
    Ties go to the lower index. The first ``protected`` tokens are left out, and those that ``mask`` (B, N) marks False
    are in no pair. ValueError where fewer than ``r`` even tokens are free.
    """
    b, n, _ = metric.shape
    first, other = protected + protected % 2, protected | 1  # the first even and the first odd one that are free
    if mask is None:  # known from the shapes: no wait for a device, no break in a compiled graph
        most = len(range(first, n, 2)) if n > other else 0
    else:
        free, partners = mask[:, first::2], mask[:, other::2]
        most = int(torch.where(partners.any(1), free.sum(1), 0).min()) if b else n
    if not 0 <= r <= most:
        raise ValueError(f"r: got {r}, must be between 0 and {most}, the even-placed tokens free to merge")
    rows = unit(metric.detach())
    similarity = torch.bmm(rows[:, first::2], rows[:, other::2].transpose(1, 2))
    if mask is not None:
        similarity = similarity.masked_fill(~(free[:, :, None] & partners[:, None]), -torch.inf)
    best = similarity.amax(2) if n > other else similarity.new_zeros(similarity.shape[:2])
    ranked = best.sort(dim=1, descending=True, stable=True).indices
    # A row's maximum costs a fraction of where it is: that is looked for in the rows that merge only.
    into = take(similarity, ranked[:, :r]).argmax(2) if r else ranked[:, :0]
    return ranked * 2 + first, into * 2 + other


def merge_pairs(
    x: Tensor, gone: Tensor, into: Tensor, size: Tensor | None = None, anchor: Tensor | None = None
) -> Merged:
    """Tokens ``gone`` (B, r) of ``x`` (B, N, D) merge into the tokens ``into`` (B, r): N - r size-weighted means.

    ``gone`` are distinct, and none of ``into`` is among them. ``size`` (B, N), by default 1. ``anchor`` (B, N - r): the
    tokens that stay in the order of the slots, by default raster. A token that nothing merges into, or only what equals
    it, keeps its value bit for bit. Does what ``size_weighted_mean`` does, but all that does not merge is only copied.
    """
    b, n, _ = x.shape
    anchor = rest(gone, n) if anchor is None else anchor
    k = anchor.shape[1]
    slots = torch.arange(k, device=x.device).expand(b, k)
    source = slots.new_empty(b, n).scatter_(1, anchor, slots)
    slot = source.gather(1, into)
    source.scatter_(1, gone, slot)
    tokens = upcast(take(x, anchor))
    weight = tokens.new_ones(b, n) if size is None else size.to(tokens.dtype)
    more = take(weight, gone)
    total = take(weight, anchor).scatter_add(1, slot, more)
    share = more / total.gather(1, slot).clamp_min(torch.finfo(total.dtype).tiny)
    moved = (upcast(take(x, gone)) - upcast(take(x, into))) * share[..., None]
    tokens.flatten(0, 1).index_add_(0, flat_rows(slot, k).flatten(), moved.flatten(0, 1))  # mean = x + sum of w (y - x)
    return Merged(tokens.to(x.dtype), source, total, anchor)


def bipartite_soft_matching(
    x: Tensor,
    r: int,
    *,
    metric: Tensor | None = None,
    size: Tensor | None = None,
    protected: int = 0,
    mask: Tensor | None = None,
    order: Literal["raster", "author"] = "raster",
) -> Merged:
    """Merge ``r`` tokens of ``x`` (B, N, D) away: ``soft_matching``, then ``merge_pairs``.

    N - r slots, size-weighted means, each anchored at its odd or unmerged token. ``metric`` (B, N, d), by default
    ``x``, is compared (ToMe: the keys' head mean). ``protected``, ``mask``: tokens that neither merge nor are merged
    into (class token). Slots in raster order, or in the author's: unmerged even tokens (by falling similarity;
    ascending if some are protected), then the odd ones. Spread the slots back with ``unmerge(tokens, source)``.
    """
    b, n, _ = x.shape
    if order not in ("raster", "author"):
        raise ValueError(f"order: got {order!r}, must be 'raster' or 'author'")
    even, into = soft_matching(x if metric is None else metric, r, protected=protected, mask=mask)
    gone, stay = even[:, :r], even[:, r:]
    if order == "raster":
        return merge_pairs(x, gone, into, size)
    if protected:
        stay = 2 * rest(gone // 2, n - n // 2)
    odd = torch.arange(1, n, 2, device=x.device).expand(b, n // 2)
    return merge_pairs(x, gone, into, size, torch.cat([stay, odd], 1))


def soft_matching_rounds(
    x: Tensor, keep: int, order: Literal["raster", "author"] = "raster"
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds of ``bipartite_soft_matching`` on ``x`` (B, N, D) until ``keep`` slots are left: anchor, tokens, source.

    Every round halves the tokens, the last merges as many as are still too many. Each takes the slots as the one before
    left them, in the author's order, and knows nothing of their sizes: a destination becomes the plain mean of what is
    merged into it, so mass is not conserved over several rounds. Rounds are computed at least in float32.

    Returns ``anchor`` (B, keep) int64, the token at which each slot stands, ``tokens`` (B, keep, D) and ``source``
    (B, N) int64, the slot of each token; slots in raster order of their anchors, or in the author's.
    """
    b, n, _ = x.shape
    if not 1 <= keep <= n:
        raise ValueError(f"keep: got {keep}, must be between 1 and the {n} tokens of a picture")
    if order not in ("raster", "author"):
        raise ValueError(f"order: got {order!r}, must be 'raster' or 'author'")
    tokens = upcast(x)
    anchor = source = torch.arange(n, device=x.device).expand(b, n)
    while (left := tokens.shape[1]) > keep:
        merged = bipartite_soft_matching(tokens, min(left // 2, left - keep), order="author")
        tokens, anchor, source = merged.tokens, take(anchor, merged.anchor), take(merged.source, source)
    tokens = tokens.to(x.dtype)
    return raster_slots(anchor, tokens, source) if order == "raster" else (anchor, tokens, source)


def knn_weighted(
    x: Tensor,
    centres: Tensor,
    affinity: Tensor,
    neighbours: int,
    weight: Tensor | None = None,
    normalise: bool = True,
) -> Merged:
    """Each centre takes in the ``neighbours`` non-centre tokens of largest affinity, with their weights.

    ``centres`` (B, C) distinct positions into ``x`` (B, N, D); ``affinity`` (B, C, N); ``weight`` (B, N) >= 0, by
    default 1, a centre's own weight in its slot is 1. ``c' = (x_c + sum w_j x_j) / (1 + sum w_j)``, or without the
    division if not ``normalise``. A token may enter several slots; ``source`` names the one of largest affinity, -1 if
    it entered none. ``size`` is a slot's summed weight, so size * tokens (tokens alone, if not normalised) adds up to
    all that went in.
    """
    b, n, _ = x.shape
    c = centres.shape[1]
    wide = upcast(x)
    is_centre = torch.zeros(b, n, dtype=torch.bool, device=x.device).scatter(1, centres, True)
    affinity = upcast(affinity).masked_fill(is_centre[:, None], -torch.inf)
    near = affinity.sort(dim=2, descending=True, stable=True).indices[:, :, : max(min(neighbours, n - c), 0)]
    share = wide.new_ones(b, n) if weight is None else weight.to(wide.dtype)
    entered = torch.zeros(b, c, n, dtype=torch.bool, device=x.device).scatter(2, near, True)
    mixing = torch.where(entered, share[:, None], 0).scatter(2, centres[:, :, None], 1)
    size = mixing.sum(2)
    tokens = torch.bmm(mixing, wide)
    if normalise:
        tokens = tokens / size[..., None]
    source = torch.full((b, n), -1, dtype=torch.int64, device=x.device)
    if c:
        best = affinity.masked_fill(~entered, -torch.inf).argmax(1)
        source = torch.where(entered.any(1), best, source)
        source = source.scatter(1, centres, torch.arange(c, device=x.device).expand(b, c))
    return Merged(tokens.to(x.dtype), source, size, centres)


def window_mean(x: Tensor, grid: tuple[int, int], cells: tuple[int, int], size: Tensor | None = None) -> Merged:
    """Average pooling of ``x`` (B, h * w, D) on its ``grid`` (h, w) to ``cells`` (rows, columns) without overlap.

    Sides that the cells do not divide are cut as evenly as possible. Slots in raster order of the cells, each anchored
    at its middle token (of an even side, the one before the middle).
    """
    h, w = grid
    rows, columns = cells
    if h * w != x.shape[1]:
        raise ValueError(f"grid: got {h} x {w}, which has not the {x.shape[1]} tokens of x")
    if not (1 <= rows <= h and 1 <= columns <= w):
        raise ValueError(f"cells: got {rows} x {columns}, must be between 1 x 1 and the grid's {h} x {w}")
    up = torch.arange(h, device=x.device) * rows // h
    across = torch.arange(w, device=x.device) * columns // w
    source = (up[:, None] * columns + across[None]).flatten().expand(len(x), -1)
    anchor = (_middle(h, rows, x.device)[:, None] * w + _middle(w, columns, x.device)[None]).flatten()
    return size_weighted_mean(x, source, rows * columns, size, anchor.expand(len(x), -1))


def _middle(side: int, cells: int, device: torch.device) -> Tensor:
    """(cells,) the middle of each of ``cells`` stretches of ``side``, cut where ``i * cells // side`` steps."""
    cuts = -(-torch.arange(cells + 1, device=device) * side // cells)  # ceil
    return (cuts[:-1] + cuts[1:] - 1) // 2

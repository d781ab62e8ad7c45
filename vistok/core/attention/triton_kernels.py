"""Triton kernels of sparse attention: over lists of tiles, forward and backward, and over lists of keys.

A tile is a run of queries or keys in the order in which they are given. Between a tile of queries and one of keys a
query sees a key if on each axis ``low[query] <= place[key] <= high[query]``. Sums are in float32; products of float32
are not rounded (no TF32). Imported only where it is asked for: Triton comes with PyTorch for CUDA. Without a GPU they
run under ``TRITON_INTERPRET=1``, which is how they are tested; they have not run on one, nor been timed.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _dot(a, b, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The product in float32. ``WIDEN``: for the interpreter, which multiplies bfloat16 by their bits."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rows(ptr, base, rows, columns, real, width):  # type: ignore[no-untyped-def]
    """(rows, columns) of a matrix of ``width`` columns that starts at row ``base``; 0 where not ``real`` or beyond."""
    at = (base + rows)[:, None] * width + columns[None, :]
    return tl.load(ptr + at, real[:, None] & (columns < width)[None, :], 0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _seen(low_ptr, high_ptr, place_ptr, rows, keys, real, real_keys, num_rows, num_keys, AXES: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, keys) bool."""
    seen = real[:, None] & real_keys[None, :]
    for axis in tl.static_range(AXES):
        low = tl.load(low_ptr + axis * num_rows + rows, real, 0)
        high = tl.load(high_ptr + axis * num_rows + rows, real, -1)
        place = tl.load(place_ptr + axis * num_keys + keys, real_keys, -1)
        seen = seen & (place[None, :] >= low[:, None]) & (place[None, :] <= high[:, None])
    return seen


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def forward(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    low_ptr,
    high_ptr,
    place_ptr,
    count_ptr,
    list_ptr,
    per_picture,
    per_head,
    longest,
    heads,
    group,
    num_rows,
    num_keys,
    width,
    width_v,
    scale,
    AXES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of queries of one head: output and log-sum-exp."""
    tile, both = tl.program_id(0), tl.program_id(1).to(tl.int64)
    picture, head = both // heads, both % heads
    shared = (picture * (heads // group) + head // group) * num_keys
    rows = tile * M + tl.arange(0, M)
    real = rows < num_rows
    columns, columns_v = tl.arange(0, D), tl.arange(0, DV)
    q = _rows(q_ptr, both * num_rows, rows, columns, real, width)
    which = picture * per_picture + head * per_head + tile
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, DV), tl.float32)
    for i in range(tl.load(count_ptr + which)):
        keys = tl.load(list_ptr + which * longest + i) * N + tl.arange(0, N)
        real_keys = keys < num_keys
        k = _rows(k_ptr, shared, keys, columns, real_keys, width)
        v = _rows(v_ptr, shared, keys, columns_v, real_keys, width_v)
        seen = _seen(low_ptr, high_ptr, place_ptr, rows, keys, real, real_keys, num_rows, num_keys, AXES)
        logits = _dot(q, tl.trans(k), WIDEN) * scale
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        weights = tl.exp(logits - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(weights, 1)
        out = out * fade[:, None] + _dot(weights.to(v.dtype), v, WIDEN)
        top = new
    nothing = total == 0.0
    out = out / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), top + tl.log(tl.where(nothing, 1.0, total)))
    at = (both * num_rows + rows)[:, None] * width_v + columns_v[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), real[:, None] & (columns_v < width_v)[None, :])
    tl.store(lse_ptr + both * num_rows + rows, lse, real)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _slopes(q, k, v, above, lse, delta, seen, scale, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights (M, N) of a pair of tiles, made again from the log-sum-exp, and the slope of the loss by its logits."""
    logits = _dot(q, tl.trans(k), WIDEN) * scale
    weights = tl.where(seen, tl.exp(logits - lse[:, None]), 0.0)
    slopes = weights * (_dot(above, tl.trans(v), WIDEN) - delta[:, None])
    return weights, slopes


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def backward_queries(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    above_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    low_ptr,
    high_ptr,
    place_ptr,
    count_ptr,
    list_ptr,
    per_picture,
    per_head,
    longest,
    heads,
    group,
    num_rows,
    num_keys,
    width,
    width_v,
    scale,
    AXES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of queries of one head: the gradient of its queries, float32. ``above``: that of the output."""
    tile, both = tl.program_id(0), tl.program_id(1).to(tl.int64)
    picture, head = both // heads, both % heads
    shared = (picture * (heads // group) + head // group) * num_keys
    rows = tile * M + tl.arange(0, M)
    real = rows < num_rows
    columns, columns_v = tl.arange(0, D), tl.arange(0, DV)
    q = _rows(q_ptr, both * num_rows, rows, columns, real, width)
    above = _rows(above_ptr, both * num_rows, rows, columns_v, real, width_v)
    lse = tl.load(lse_ptr + both * num_rows + rows, real, 0.0)
    delta = tl.load(delta_ptr + both * num_rows + rows, real, 0.0)
    which = picture * per_picture + head * per_head + tile
    dq = tl.zeros((M, D), tl.float32)
    for i in range(tl.load(count_ptr + which)):
        keys = tl.load(list_ptr + which * longest + i) * N + tl.arange(0, N)
        real_keys = keys < num_keys
        k = _rows(k_ptr, shared, keys, columns, real_keys, width)
        v = _rows(v_ptr, shared, keys, columns_v, real_keys, width_v)
        seen = _seen(low_ptr, high_ptr, place_ptr, rows, keys, real, real_keys, num_rows, num_keys, AXES)
        _, slopes = _slopes(q, k, v, above, lse, delta, seen, scale, WIDEN)
        dq += _dot(slopes.to(k.dtype), k, WIDEN)
    at = (both * num_rows + rows)[:, None] * width + columns[None, :]
    tl.store(dq_ptr + at, dq * scale, real[:, None] & (columns < width)[None, :])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def backward_keys(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    above_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    low_ptr,
    high_ptr,
    place_ptr,
    count_ptr,
    list_ptr,
    per_picture,
    per_head,
    longest,
    heads,
    group,
    num_rows,
    num_keys,
    width,
    width_v,
    scale,
    AXES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of keys of one key head: the gradients of its keys and values, float32, over all heads that share it.
    The lists are of tiles of queries."""
    tile, both = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    picture, kv_head = both // kv_heads, both % kv_heads
    keys = tile * N + tl.arange(0, N)
    real_keys = keys < num_keys
    columns, columns_v = tl.arange(0, D), tl.arange(0, DV)
    k = _rows(k_ptr, both * num_keys, keys, columns, real_keys, width)
    v = _rows(v_ptr, both * num_keys, keys, columns_v, real_keys, width_v)
    dk = tl.zeros((N, D), tl.float32)
    dv = tl.zeros((N, DV), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        own = (picture * heads + head) * num_rows
        which = picture * per_picture + head * per_head + tile
        for i in range(tl.load(count_ptr + which)):
            rows = tl.load(list_ptr + which * longest + i) * M + tl.arange(0, M)
            real = rows < num_rows
            q = _rows(q_ptr, own, rows, columns, real, width)
            above = _rows(above_ptr, own, rows, columns_v, real, width_v)
            lse = tl.load(lse_ptr + own + rows, real, 0.0)
            delta = tl.load(delta_ptr + own + rows, real, 0.0)
            seen = _seen(low_ptr, high_ptr, place_ptr, rows, keys, real, real_keys, num_rows, num_keys, AXES)
            weights, slopes = _slopes(q, k, v, above, lse, delta, seen, scale, WIDEN)
            dv += _dot(tl.trans(weights).to(above.dtype), above, WIDEN)
            dk += _dot(tl.trans(slopes).to(q.dtype), q, WIDEN)
    at = (both * num_keys + keys)[:, None] * width + columns[None, :]
    tl.store(dk_ptr + at, dk * scale, real_keys[:, None] & (columns < width)[None, :])
    at = (both * num_keys + keys)[:, None] * width_v + columns_v[None, :]
    tl.store(dv_ptr + at, dv, real_keys[:, None] & (columns_v < width_v)[None, :])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def decode(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    index_ptr,
    per_picture,
    per_head,
    per_query,
    listed,
    last,
    heads,
    group,
    num_rows,
    num_keys,
    width,
    width_v,
    scale,
    N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """One query of one head over the keys of its list, gathered. ``last``: of causal lists the last key that query 0
    sees, else all; -1 in a list is no key."""
    row, both = tl.program_id(0), tl.program_id(1).to(tl.int64)
    picture, head = both // heads, both % heads
    shared = (picture * (heads // group) + head // group) * num_keys
    columns, columns_v = tl.arange(0, D), tl.arange(0, DV)
    q = tl.load(q_ptr + (both * num_rows + row) * width + columns, columns < width, 0.0).to(tl.float32)
    first = picture * per_picture + head * per_head + row.to(tl.int64) * per_query
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    out = tl.zeros((DV,), tl.float32)
    for start in range(0, listed, N):
        slots = start + tl.arange(0, N)
        keys = tl.load(index_ptr + first + slots, slots < listed, -1)
        seen = (keys >= 0) & (keys <= last + row)
        k = _rows(k_ptr, shared, keys, columns, seen, width).to(tl.float32)
        v = _rows(v_ptr, shared, keys, columns_v, seen, width_v).to(tl.float32)
        logits = tl.where(seen, tl.sum(k * q[None, :], 1) * scale, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp(logits - base)
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(weights, 0)
        out = out * fade + tl.sum(weights[:, None] * v, 0)
        top = new
    nothing = total == 0.0
    out = out / tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("-inf"), top + tl.log(tl.where(nothing, 1.0, total)))
    tl.store(
        out_ptr + (both * num_rows + row) * width_v + columns_v,
        out.to(out_ptr.dtype.element_ty),
        columns_v < width_v,
    )
    tl.store(lse_ptr + both * num_rows + row + tl.arange(0, 1), lse)

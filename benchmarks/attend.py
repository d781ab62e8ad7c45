"""The executors of ``vistok.core.attention`` against dense attention, by number of tokens and density, and NATTEN.

Run: ``python -m benchmarks.attend [--tokens 1024 4096 16384] [--densities 0.01 0.05 0.1 0.5] [--axes 2] [--json]``.
Patterns are neighbourhoods on a square grid (``--axes 1``: on a line). All runs of a case are taken in turn, medians of
ratios to dense fused attention. ``bound``: the simulator's for tiles of keys as large as the executor's tiles of
queries, ``reached``: the share of it. ``strict``: the share of the bound with keys counted one by one, which is what
the executor computes and no more. ``backward``: of the tiles, over their forward pass. NATTEN is
measured where it can be imported, with its own choice of backend. The last lines are exponents of time in the number
of tokens at a window of 13 x 13 (169 on a line). Goals on a CPU: from 4,096 tokens on, at densities up to 10%, 0.7 of
the bound and twice NATTEN's speed; backward at most 3 times forward.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import in_turn, machine, ratio
from vistok.core.attention import GridWindow, attend, choose, simulate

GATHER_PAIRS = 2**21
"""Above so many pairs a head, going key by key takes seconds and is left out."""

COLUMNS = (
    *("tokens", "kernel", "density", "tile", "dense_ms", "tiles_ms", "gather_ms", "natten_ms"),
    *("gain", "bound", "reached", "strict", "backward", "auto"),
)


def grid_of(tokens: int, axes: int) -> tuple[int, ...]:
    """A line, or the square nearest to ``tokens``."""
    side = round(math.sqrt(tokens))
    return (tokens,) if axes == 1 else (side, side)


def window_of(shape: tuple[int, ...], density: float) -> GridWindow:
    """The even window of about ``density``, at least two keys wide."""
    share = density ** (1 / len(shape))
    return GridWindow(shape, tuple(max(2, round(n * share)) for n in shape))


def natten_call(shape: tuple[int, ...], pattern: GridWindow) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    """NATTEN's operator on (B, H, N, d), or None where it is not installed."""
    try:
        import natten  # type: ignore[import-not-found]
    except ImportError:
        return None
    operator = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(shape)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (t.transpose(1, 2).unflatten(1, shape) for t in (q, k, v))
        return operator(q, k, v, kernel_size=pattern.kernel)

    return run


def case(pattern: GridWindow, options: argparse.Namespace) -> dict[str, Any]:
    """One row: milliseconds, gains over dense and what the bound promises."""
    n = pattern.dense_shape[2]
    shape = (1, options.heads, n, options.dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v, slope = (torch.randn(shape, generator=generator).to(options.device) for _ in range(4))
    given = [t.clone().requires_grad_() for t in (q, k, v)]

    def trained() -> None:
        torch.autograd.grad(attend(*given, pattern, executor="tiles"), given, slope)

    runs: dict[str, Callable[[], object]] = {
        "dense": lambda: scaled_dot_product_attention(q, k, v),
        "tiles": lambda: attend(q, k, v, pattern, executor="tiles"),
        "both ways": trained,
    }
    if pattern.pairs <= GATHER_PAIRS:
        runs["gather"] = lambda: attend(q, k, v, pattern, executor="gather")
    theirs = natten_call(pattern.shape, pattern)
    if theirs is not None and n <= options.natten_tokens:
        runs["natten"] = lambda: theirs(q, k, v)
    taken = in_turn(runs, options.repeats, options.device)
    size = pattern.best_size()
    bound, strict = simulate(pattern, size, size).bound, simulate(pattern, size, 1).bound
    gain = ratio(taken["dense"], taken["tiles"])
    row = {
        "tokens": n,
        "kernel": "x".join(map(str, pattern.kernel)),
        "density": pattern.density,
        "tile": "x".join(map(str, size)),
        **{f"{name}_ms": statistics.median(times) for name, times in taken.items()},
        "gain": gain,
        "bound": bound,
        "reached": gain / bound,
        "strict": gain / strict,
        "backward": ratio(taken["both ways"], taken["tiles"]) - 1,
        "auto": choose(q, pattern).executor,
    }
    if "natten" in taken:
        row["over_natten"] = ratio(taken["natten"], taken["tiles"])
    return row


def exponents(options: argparse.Namespace) -> dict[str, float]:
    """Of time in the number of tokens, least squares on logarithms, at a window that stays the same."""
    taken: dict[str, list[float]] = {"dense": [], "tiles": []}
    for tokens in options.tokens:
        shape = grid_of(tokens, options.axes)
        row = case(GridWindow(shape, 13 if len(shape) == 2 else 169), options)
        for name, times in taken.items():
            times.append(math.log(row[f"{name}_ms"]))
    return {name: _slope([math.log(n) for n in options.tokens], times) for name, times in taken.items()}


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"{text:>10}"


def _slope(x: list[float], y: list[float]) -> float:
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.25, 0.5])
    parser.add_argument("--axes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--natten-tokens", type=int, default=4096, help="NATTEN is not measured above so many tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.device)
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in where.items()))
        print("".join(f"{name.removesuffix('_ms'):>10}" for name in COLUMNS))
    for tokens in options.tokens:
        for density in options.densities:
            row = case(window_of(grid_of(tokens, options.axes), density), options)
            print(json.dumps(row | where) if options.json else "".join(map(_cell, map(row.get, COLUMNS))), flush=True)
    if len(options.tokens) > 1:
        found = exponents(options)
        print(json.dumps({"exponents": found} | where) if options.json else f"exponents in tokens: {found}")


if __name__ == "__main__":
    main()

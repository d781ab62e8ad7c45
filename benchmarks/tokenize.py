"""Visual tokenizers against what people use today, in one run.

The nearest code of many vectors: ``vistok.parts.quantize.VectorQuantizer`` and, where it is installed (``pip install
vistok[peers]``), ``VectorQuantize`` of vector-quantize-pytorch on the same table, both in evaluation, in turns. Told:
milliseconds, peak bytes beyond what was held, and whether the ids are equal; where they are not, whose code is nearer
in float64. Goals at N = 65,536, K = 16,384, D = 64: at most half the time and a tenth of the memory, equal ids. The
peer holds several N x K tables: 12 GB and more.

The wrapping of a tokenizer: pictures a second of ``decode(encode(x))`` of TiTok-S at 128 px over those of its networks,
look-up and nothing else. Goal: 0.97 at least.

python -m benchmarks.tokenize [--shape 65536 16384 64] [--repeats 3] [--device cuda] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import in_turn, machine, ratio
from vistok.bench.resources import peak_bytes
from vistok.core.quantize import nearest_code
from vistok.parts.quantize import VectorQuantizer
from vistok.tokenize.titok import TiTok

GOAL_TIME, GOAL_MEMORY, GOAL_WRAPPING = 0.5, 0.1, 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(65536, 16384, 64), metavar=("N", "K", "D"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    found = lookup(*options.shape, options.repeats, options.device) | wrapping(options.repeats, options.device)
    if options.json:
        print(json.dumps({**found, **machine(options.device)}))
        return
    print(", ".join(f"{key} {value}" for key, value in machine(options.device).items()))
    for key, value in found.items():
        print(f"{key:28} {f'{value:,.3f}'.rstrip('0').rstrip('.') if isinstance(value, float) else value}")


def lookup(n: int, k: int, d: int, repeats: int, device: str) -> dict[str, Any]:
    """Figures of the look-up of ``n`` vectors in ``k`` codes of ``d`` channels, ours alone without the peer."""
    torch.manual_seed(0)
    z = torch.randn(1, n, d, device=device)
    ours = VectorQuantizer(k, d).to(device).eval()
    runs: dict[str, Any] = {"ours": lambda: ours(z).ids}
    theirs = peer(ours.codebook.data)
    if theirs is not None:
        runs["peer"] = lambda: theirs(z)[1]
    taken = in_turn(runs, repeats, device)
    found: dict[str, Any] = {"N K D": (n, k, d)}
    for name, run in runs.items():
        found[f"{name} ms"] = statistics.median(taken[name])
        found[f"{name} peak MB"] = (peak_bytes(torch.device(device), run) or 0) / 1e6
    if "peer" not in runs:
        return found | {"peer": "vector-quantize-pytorch is not installed"}
    mine, other = ours(z).ids, theirs(z)[1]
    differ = (mine != other).nonzero(as_tuple=True)
    nearer = [closer(z[differ], ours.codebook.data, one[differ]) for one in (mine, other)]
    time = ratio(taken["ours"], taken["peer"])
    memory = found["ours peak MB"] / found["peer peak MB"]
    return found | {
        "time, ours over peer": time,
        "memory, ours over peer": memory,
        "ids that differ": len(differ[0]),
        "of these ours is nearest": nearer[0],
        "of these the peer's is": nearer[1],
        "goals hold": time <= GOAL_TIME and memory <= GOAL_MEMORY and nearer[0] == len(differ[0]),
    }


def wrapping(repeats: int, device: str, batch: int = 8, size: int = 128) -> dict[str, Any]:
    """What checks, formats and clamping cost beside the networks."""
    model = TiTok("S", 32, size).build().to(device).eval()
    x = torch.rand(batch, 3, size, size, device=device)
    table = model.bottleneck.table()

    def bare() -> Tensor:
        z = model.bottleneck.unit(model.encoder(x))
        return model.head(model.decoder(table[nearest_code(z, table)]))

    taken = in_turn({"wrapped": lambda: model.decode(model.encode(x)), "bare": bare}, 3 * repeats, device, warm=2)
    speed = ratio(taken["bare"], taken["wrapped"])
    return {
        "wrapped pictures/s": 1000 * batch / statistics.median(taken["wrapped"]),
        "bare pictures/s": 1000 * batch / statistics.median(taken["bare"]),
        "speed, wrapped over bare": speed,
        "goal of wrapping holds": speed >= GOAL_WRAPPING,
    }


def peer(table: Tensor) -> Any:
    """VectorQuantize of vector-quantize-pytorch with ``table``, in evaluation; None where it is not installed."""
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return None
    made = VectorQuantize(dim=table.shape[1], codebook_size=table.shape[0], kmeans_init=False).to(table.device).eval()
    made._codebook.embed.copy_(table[None])
    return made


def closer(z: Tensor, table: Tensor, ids: Tensor) -> int:
    """For how many of ``z`` (M, D) the code of ``ids`` (M,) is the nearest in float64, ties to the lower row."""
    exact = table.double()
    nearest = [int((row.double() - exact).square().sum(1).argmin()) for row in z]
    return sum(a == b for a, b in zip(nearest, ids.tolist(), strict=True))


if __name__ == "__main__":
    main()

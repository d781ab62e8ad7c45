"""The greedy selections of ``vistok.core`` beside a plain loop: one picture at a time, every value anew at every step.

Run: ``python -m benchmarks.core_select [--threads 2] [--repeats 9] [--json]``. Prints the median and the least
milliseconds of each, in one run and in turns, whether both picked the same tokens, and what they ran on. The target is
30 ms at B = 8, N = 576, D = 1024, K = 64 on two cores; with other work on the machine two threads wait for each other,
which is why the load stands there too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common import in_turn, machine
from vistok.core.score import cosine
from vistok.core.select import facility_location, farthest_points, greedy_dpp, greedy_dpp_features, max_sum

TARGET_MS = 30.0


def loop_farthest(x: Tensor, k: int) -> Tensor:
    picks = [int(x.norm(dim=1).argmax())]
    nearest = torch.full((len(x),), torch.inf)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, (x - x[picks[-1]]).square().sum(1))
        nearest[picks[-1]] = -torch.inf
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


def loop_max_sum(x: Tensor, k: int) -> Tensor:
    picks = [int(x.norm(dim=1).argmax())]
    x = normalize(x, dim=1)
    total = torch.zeros(len(x))
    for _ in range(k - 1):
        total += x @ x[picks[-1]]
        total[picks[-1]] = torch.inf
        picks.append(int(total.argmin()))
    return torch.tensor(picks)


def loop_facility(matrix: Tensor, k: int) -> Tensor:
    picks: list[int] = []
    best = torch.zeros(len(matrix))
    for _ in range(k):
        gain = (matrix - best[:, None]).clamp_min(0).sum(0)
        gain[picks] = -torch.inf
        picks.append(int(gain.argmax()))
        best = torch.maximum(best, matrix[:, picks[-1]])
    return torch.tensor(picks)


def loop_dpp(kernel: Tensor, k: int) -> Tensor:
    factor = torch.zeros(k, len(kernel))
    volume = kernel.diagonal().clone()
    picks: list[int] = []
    for step in range(k):
        pick = int(volume.argmax())
        picks.append(pick)
        row = (kernel[pick] - factor[:step, pick] @ factor[:step]) / volume[pick].sqrt()
        factor[step] = row
        volume -= row.square()
        volume[picks] = -torch.inf
    return torch.tensor(picks)


def loop_dpp_features(x: Tensor, k: int) -> Tensor:
    x = normalize(x, dim=1)
    kernel = x @ x.T
    kernel.fill_diagonal_(1)
    return loop_dpp(kernel, k)


def pictures(b: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Features without any structure, and some that repeat about 40 things as the patches of a picture do."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(b, n, d, generator=generator)
    things = torch.randn(b, 40, d, generator=generator)
    which = torch.randint(0, 40, (b, n), generator=generator)
    return plain, things.gather(1, which[..., None].expand(-1, -1, d)) + 0.5 * plain


def coverage(x: Tensor) -> Tensor:
    """MMTok's kernel of the picture with itself."""
    return torch.softmax(cosine(x) / 0.2, -1) / x.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 576, 1024, 64), metavar=("B", "N", "D", "K"))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    b, n, d, k = options.shape
    noise, things = pictures(b, n, d)
    kernel = cosine(noise)
    cases: list[tuple[str, Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor], Tensor]] = [
        ("max-min, Euclidean", farthest_points, loop_farthest, noise),
        ("max-sum", max_sum, loop_max_sum, noise),
        ("facility location, unstructured matrix", facility_location, loop_facility, coverage(noise)),
        ("facility location, clustered matrix", facility_location, loop_facility, coverage(things)),
        ("DPP, from features", greedy_dpp_features, loop_dpp_features, noise),
        ("DPP, from a kernel", greedy_dpp, loop_dpp, kernel),
    ]
    where = {**machine(), "shape": dict(zip("BNDK", options.shape, strict=True))}
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in where.items()))
        heads = f"{'ours':>8}{'least':>8}{'loop':>9}{'least':>8}{'times':>7}  same  under {TARGET_MS:.0f}"
        print(f"{'milliseconds':40}{heads}")
    for name, ours, loop, x in cases:

        def plain(loop: Callable[[Tensor, int], Tensor] = loop, x: Tensor = x) -> Tensor:
            return torch.stack([loop(row, k) for row in x])

        same = (ours(x, k) == plain()).double().mean().item()
        taken = in_turn({"ours": lambda ours=ours, x=x: ours(x, k), "loop": plain}, options.repeats, warm=2)  # type: ignore[misc]
        mine, theirs = taken["ours"], taken["loop"]
        median, other = statistics.median(mine), statistics.median(theirs)
        if options.json:
            row = {
                "selection": name,
                "ms": median,
                "ms_least": min(mine),
                "loop_ms": other,
                "loop_ms_least": min(theirs),
            }
            print(json.dumps({**row, "same_picks": same, "under_target": median < TARGET_MS, **where}))
        else:
            print(
                f"{name:40}{median:8.1f}{min(mine):8.1f}{other:9.1f}{min(theirs):8.1f}{other / median:7.1f}"
                f"  {same:4.0%}  {'yes' if median < TARGET_MS else 'no'}"
            )


if __name__ == "__main__":
    main()

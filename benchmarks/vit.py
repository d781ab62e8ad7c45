"""What fewer tokens buy in a vision transformer: time against the model as it is and against what operations promise.

timm's own VisionTransformer with random weights, 12 blocks, patches of 16 px, fused attention on. In one process all
ways run in turn (A B C A B C), the first round is not counted, ratios are medians of rounds. "bound" is operations of
the plain model over those with the method (patch embedding and blocks, by shapes); "of bound" is the speed-up over it.
"block" is what evidence, matching and merging take at a stage, as a share of a plain block. Two peers: ToMe's matching
and merging as published, in plain products, argsort and scatter, once in our host (fused attention and a mask row) and
once with attention written out, as its released patch runs it.

python -m benchmarks.vit [--batch 1 32] [--tokens 196 576 1369] [--width 384 768] [--methods a,b] [--repeats 5]
                         [--device cuda] [--compile] [--json] [--markdown docs/results/vit-speed.md]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import vistok
from benchmarks.common import in_turn, machine_line, ratio
from vistok.bench.resources import peak_bytes
from vistok.host.vit import TokenState, ViTEvidence, ViTReducer
from vistok.vit.tome import ToMe

DEPTH, PATCH = 12, 16
KEEP = 0.7
"""Of methods with stages at blocks 3, 6 and 9, which leaves 34% of the patches; the others leave as many at the end."""
METHODS = ("random-drop", "topk", "evit", "ats", "tome", "pitome")
PUBLISHED, WRITTEN_OUT = "ToMe as published", "ToMe as published, attention written out"
GOAL_BOUND, GOAL_BLOCK, FROM = 0.9, 0.03, 576
MOST = 1.2e12
"""Operations of a plain pass above which a cell is left out on a CPU, unless it is asked for."""


@dataclass(frozen=True)
class PublishedToMe(ToMe):
    """ToMe's counts, its matching and merging in the steps in which the paper's appendix writes them."""

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        p, b = state.prefix, len(state.x)
        r = state.num_slots - count
        metric = evidence.keys
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        scores[:, 0] = -math.inf
        best, into = scores.max(-1)
        edges = best.argsort(dim=-1, descending=True)[..., None]
        merged, unmerged = edges[:, :r], edges[:, r:].sort(1).values
        target = into[..., None].gather(1, merged)
        size = torch.nn.functional.pad(state.size, (p, 0), value=1.0)[..., None]

        def merge(x: Tensor) -> Tensor:
            even, odd, width = x[:, ::2], x[:, 1::2], x.shape[2]
            moved = even.gather(1, merged.expand(-1, -1, width))
            odd = odd.scatter_reduce(1, target.expand(-1, -1, width), moved, reduce="sum")
            return torch.cat([even.gather(1, unmerged.expand(-1, -1, width)), odd], 1)

        sizes = merge(size)
        values = merge(state.x * size) / sizes
        places = torch.arange(metric.shape[1], device=metric.device).expand(b, -1)
        kept = torch.cat([places[:, ::2].gather(1, unmerged[..., 0]), places[:, 1::2]], 1)
        slot = torch.full_like(places, -1).scatter(
            1, kept, torch.arange(kept.shape[1], device=kept.device).expand(b, -1)
        )
        gone = slot.gather(1, places[:, 1::2].gather(1, target[..., 0]))
        slot = slot.scatter(1, places[:, ::2].gather(1, merged[..., 0]), gone)
        return state.regroup(values[:, p:], slot[:, p:] - p, kept[:, p:] - p)


def build(tokens: int, width: int, device: str) -> Any:
    """timm's VisionTransformer with random weights; ``tokens``: a square number of patches."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise SystemExit(f"--tokens: got {tokens}, must be square numbers")
    torch.manual_seed(0)
    shape = {
        "img_size": side * PATCH,
        "patch_size": PATCH,
        "embed_dim": width,
        "depth": DEPTH,
        "num_heads": width // 64,
    }
    return timm.create_model("vit_small_patch16_224", pretrained=False, **shape).to(device).eval()


def methods_of(names: list[str], tokens: int) -> dict[str, ViTReducer]:
    """The methods by name, all to leave the same share at the end."""
    left = vistok.create("topk", keep=KEEP).plan(tokens, DEPTH)[-1]
    made = {name: vistok.create(name, keep=KEEP if staged(name) else left) for name in names}
    return {**made, PUBLISHED: PublishedToMe(keep=left), WRITTEN_OUT: PublishedToMe(keep=left)}


def staged(name: str) -> bool:
    """Whether the method acts at three blocks, and its ``keep`` is the share that stays at each."""
    return len(list(vistok.create(name).stages(DEPTH))) == 3


@contextmanager
def written_out(model: Any, wanted: bool) -> Iterator[None]:
    """timm's attention without the fused kernel, if ``wanted``."""
    blocks = [block.attn for block in model.blocks]
    before = [attention.fused_attn for attention in blocks]
    try:
        for attention in blocks:
            attention.fused_attn = attention.fused_attn and not wanted
        yield
    finally:
        for attention, fused in zip(blocks, before, strict=True):
            attention.fused_attn = fused


def cell(
    batch: int, tokens: int, width: int, names: list[str], repeats: int, device: str, compiled: bool
) -> Iterator[dict[str, Any]]:
    """One row a method for a batch of pictures of ``tokens`` patches in a model of ``width``."""
    model = build(tokens, width, device)
    side = math.isqrt(tokens) * PATCH
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    methods = methods_of(names, tokens)
    told: dict[str, Any] = {}
    select: dict[str, list[float]] = {name: [] for name in methods}

    def plain() -> None:
        model(pixels)

    def reduced(name: str) -> Callable[[], None]:
        def run() -> None:
            with written_out(model, name == WRITTEN_OUT), vistok.apply(model, methods[name]) as session:
                model(pixels)
            told[name] = session
            select[name].append(session.milliseconds["select"])

        return run

    runs: dict[str, Callable[[], None]] = {"plain": plain, **{name: reduced(name) for name in methods}}
    with torch.inference_mode():
        times = in_turn(runs, repeats, device)
        memory = {name: peak_bytes(torch.device(device), run) or 0 for name, run in runs.items()}
        gains = compiled_gain(model, pixels, methods, repeats, device) if compiled else {}
    block = sorted(times["plain"])[len(times["plain"]) // 2] / DEPTH
    for name, method in methods.items():
        session = told[name]
        stages = sum(count != before for before, count in itertools.pairwise([tokens, *session.tokens]))
        speedup = ratio(times["plain"], times[name])
        whole = session.plain_flops
        spent = sorted(select[name][-repeats:])[repeats // 2] / max(stages, 1)
        yield {
            "batch": batch,
            "tokens": tokens,
            "width": width,
            "method": name,
            "left": session.tokens[-1],
            "stages": len(list(method.stages(DEPTH))),
            "plain_ms": round(block * DEPTH, 2),
            "speedup": round(speedup, 3),
            "bound": round(whole / session.flops, 3),
            "of_bound": round(speedup * session.flops / whole, 3),
            "block": round(spent / block, 4),
            "plain_mib": round(memory["plain"] / 2**20),
            "mib": round(memory[name] / 2**20),
            **({"compiled": gains[name]} if name in gains else {}),
        }


def compiled_gain(
    model: Any, pixels: Tensor, methods: dict[str, ViTReducer], repeats: int, device: str
) -> dict[str, float]:
    """Speed-up of each method over the plain model where both are compiled."""
    runs: dict[str, Callable[[], object]] = {}
    sessions = {}
    plain = torch.compile(model, dynamic=False)
    plain(pixels)
    gains = {}
    for name, method in methods.items():
        if name in (PUBLISHED, WRITTEN_OUT):
            continue
        sessions[name] = vistok.apply(model, method)

        def run(name: str = name) -> None:
            with sessions[name]:
                plain(pixels)

        runs = {"plain": lambda: plain(pixels), name: run}
        times = in_turn(runs, repeats, device, warm=2)
        gains[name] = round(ratio(times["plain"], times[name]), 3)
    return gains


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What became of the goals, for the systems (the peers have none)."""
    ours = [row for row in rows if row["method"] not in (PUBLISHED, WRITTEN_OUT)]
    large = [row for row in ours if row["tokens"] >= FROM]
    merging = [row for row in ours if row["method"] in ("tome", "pitome")]
    alone = [row for row in ours if row["batch"] == 1]
    goals = {
        f"speed-up at least {GOAL_BOUND} of the bound from {FROM} patches on": [
            r for r in large if r["of_bound"] < GOAL_BOUND
        ],
        f"matching and merging under {GOAL_BLOCK:.0%} of a block": [r for r in merging if r["block"] >= GOAL_BLOCK],
        "never slower than the plain model at batch 1": [r for r in alone if r["speedup"] < 1],
    }
    return [
        f"{goal}: {'met' if not missed else 'MISSED by ' + ', '.join(map(_named, missed))}"
        for goal, missed in goals.items()
    ]


def _named(row: dict[str, Any]) -> str:
    return f"{row['method']} ({row['batch']} x {row['tokens']}, width {row['width']})"


def markdown(rows: list[dict[str, Any]], left_out: list[str], device: str) -> str:
    """The page of results."""
    lines = [
        "# Speed of reduced vision transformers",
        "",
        "`python -m benchmarks.vit --markdown docs/results/vit-speed.md` makes this page; its module says how it is "
        f"measured. {machine_line(device)}.",
        "",
        *[f"- {verdict}" for verdict in verdicts(rows)],
        *([f"- Not run on this machine: {', '.join(left_out)}."] if left_out else []),
        "",
    ]
    for key, group in itertools.groupby(rows, lambda row: (row["batch"], row["tokens"], row["width"])):
        some = list(group)
        compiled = "compiled" in some[0]
        lines += [
            f"## {key[0]} x {key[1]} patches, width {key[2]}",
            "",
            f"The plain model: {some[0]['plain_ms']:.1f} ms, {some[0]['plain_mib']} MiB beyond what was held.",
            "",
            "| method | left | speed-up | bound | of bound | a stage, of a block | MiB |"
            + (" compiled |" if compiled else ""),
            "|---|---:|---:|---:|---:|---:|---:|" + ("---:|" if compiled else ""),
        ]
        lines += [
            f"| {r['method']} | {r['left']} | {r['speedup']:.2f} | {r['bound']:.2f} | {r['of_bound']:.2f} | "
            f"{r['block']:.1%} | {r['mib']} |" + (f" {r.get('compiled', '')} |" if compiled else "")
            for r in some
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 576, 1369])
    parser.add_argument("--width", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--most", type=float, default=MOST, help="operations of a plain pass, on a CPU")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    names = given.methods.split(",")
    rows: list[dict[str, Any]] = []
    left_out = []
    for batch, tokens, width in itertools.product(given.batch, given.tokens, given.width):
        operations = batch * DEPTH * (24 * tokens * width**2 + 4 * tokens**2 * width)
        if given.device == "cpu" and operations > given.most:
            left_out.append(f"{batch} x {tokens}, width {width}")
            continue
        for row in cell(batch, tokens, width, names, given.repeats, given.device, given.compile):
            rows.append(row)
            if not given.json:
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if given.json:
        print(json.dumps({"machine": machine_line(given.device), "rows": rows, "left_out": left_out}, indent=1))
    else:
        print(*verdicts(rows), *(f"not run: {cell_}" for cell_ in left_out), machine_line(given.device), sep="\n")
    if given.markdown:
        given.markdown.write_text(markdown(rows, left_out, given.device), encoding="utf-8")


if __name__ == "__main__":
    main()

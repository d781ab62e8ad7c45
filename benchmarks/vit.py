"""What fewer tokens buy in a vision transformer: time against the model as it is and against what is promised.

timm's own VisionTransformer with random weights, 12 blocks, patches of 16 px, fused attention on. In one process all
ways run in turn (A B C A B C), the first round is not counted, ratios are medians of rounds. Two bounds: "by
operations", those of the plain model over those with the method (patch embedding and blocks, by shapes); and
"measured", the plain model's time over that of its own blocks, which are given as many tokens as the method leaves
them, by slicing. The second knows what kernels do at fewer tokens, and is itself no goal. "a stage" is what evidence,
matching and merging take where the method acts, as a share of a plain block; of the merging ones also what of it goes
into the evidence (mean keys), the matching and the merging of values, timed apart. Of fused attention by itself: what
it takes with the log of the sizes as a mask row, as a whole map, and as one more channel of queries and keys (which
then need copies, and values of the same width), over what it takes without.

Two peers: ToMe's matching and merging as published, in plain products, argsort and scatter, once in our host (fused
attention and a mask row) and once with attention written out, as its released patch runs it.

``--save`` keeps the rows of each cell in a JSON file, so that a run goes on where another ended and several runs make
one page. ``--clock cpu`` counts the process's CPU time: for one thread on a machine that others use too.

python -m benchmarks.vit [--batch 1 32] [--tokens 196 576 1369] [--width 384 768] [--methods a,b] [--repeats 5]
                         [--device cuda] [--clock cpu] [--compile topk,tome] [--save docs/results/vit-speed.json]
                         [--markdown docs/results/vit-speed.md]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

import vistok
from benchmarks.common import in_turn, machine_line, ratio
from vistok.bench.resources import peak_bytes
from vistok.core import merge
from vistok.host.vit import TokenState, ViTEvidence, ViTReducer, state
from vistok.host.vit.engine import ViTLog
from vistok.vit import pitome, tome
from vistok.vit.tome import ToMe

DEPTH, PATCH = 12, 16
KEEP = 0.7
"""Of methods with stages at blocks 3, 6 and 9, which leaves 34% of the patches; the others leave as many at the end."""
MERGING = ("tome", "pitome")
METHODS = ("random-drop", "topk", "evit", "ats", "tome", "pitome")
PUBLISHED, WRITTEN_OUT = "ToMe as published", "ToMe as published, attention written out"
GOAL_BOUND, GOAL_BLOCK, FROM = 0.9, 0.03, 576
MOST = 3.5e11
"""Operations of a plain pass above which a cell is left out on a CPU, unless ``--most`` says so."""
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
CELL = ("batch", "tokens", "width")


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
        size = pad(state.size, (p, 0), value=1.0)[..., None]

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


def at_counts(model: Any, pixels: Tensor, counts: Sequence[int]) -> None:
    """The plain model, whose block l is left the first ``counts[l]`` patches after its attention."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    for block, count in zip(model.blocks, counts, strict=True):
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x = x[:, : model.num_prefix_tokens + count]
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    model.forward_head(model.norm(x))


@contextmanager
def parts(taken: dict[str, float], clock: Callable[[], float]) -> Iterator[None]:
    """Adds to ``taken`` the milliseconds that evidence, matching and merging take of merging methods' stages."""

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            made = work(*args, **kwargs)
            taken[name] += 1e3 * (clock() - start)
            return made

        return run

    matching, merging = timed("matching", merge.soft_matching), timed("merging", merge.merge_pairs)
    with (
        patch.object(ViTEvidence, "keys", property(timed("evidence", ViTEvidence.keys.fget))),  # type: ignore[attr-defined]
        patch.object(pitome, "energy", timed("matching", pitome.energy)),
        patch.object(pitome, "soft_matching", matching),
        patch.object(tome, "soft_matching", matching),
        patch.object(state, "merge_pairs", merging),
    ):
        yield


def attention_costs(
    batch: int, tokens: int, width: int, repeats: int, device: str, clock: Callable[[], float]
) -> dict[str, float]:
    """Time of fused attention that counts keys in proportion to their size, by how it is told, over attention alone."""
    t, rng = tokens + 1, torch.Generator().manual_seed(0)
    q, k, v = torch.randn(batch, t, 3, width // 64, 64, generator=rng).to(device).permute(2, 0, 3, 1, 4)
    row = torch.randint(1, 5, (batch, 1, 1, t), generator=rng).to(device).log()
    whole = row.expand(batch, width // 64, t, t).contiguous()

    def channel() -> None:  # kernels want widths that 8 divides
        one, log = q.new_ones(*q.shape[:3], 1), (8 * row).mT.expand(*k.shape[:3], 1)
        with_one, with_log = pad(torch.cat([q, one], 3), (0, 7)), pad(torch.cat([k, log], 3), (0, 7))
        scaled_dot_product_attention(with_one, with_log, pad(v, (0, 8)), scale=1 / 8)[..., :64]

    runs: dict[str, Callable[[], object]] = {
        "alone": lambda: scaled_dot_product_attention(q, k, v),
        "mask row": lambda: scaled_dot_product_attention(q, k, v, attn_mask=row),
        "whole map": lambda: scaled_dot_product_attention(q, k, v, attn_mask=whole),
        "channel": channel,
    }
    times = in_turn(runs, 4 * repeats, device, clock=clock)
    return {name: round(ratio(times[name], times["alone"]), 3) for name in runs if name != "alone"}


def cell(
    batch: int, tokens: int, width: int, names: list[str], repeats: int, device: str, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """One row a method for a batch of pictures of ``tokens`` patches in a model of ``width``."""
    model = build(tokens, width, device)
    pixels = pixels_for(batch, tokens, device)
    methods = methods_of(names, tokens)
    told: dict[str, Any] = {}
    select: dict[str, list[float]] = {name: [] for name in methods}

    def reduced(name: str) -> Callable[[], None]:
        def run() -> None:
            with written_out(model, name == WRITTEN_OUT), vistok.apply(model, methods[name]) as session:
                model(pixels)
            told[name] = session
            select[name].append(session.milliseconds["select"])

        return run

    passes: dict[str, Callable[[], object]] = {"plain": lambda: model(pixels), **{m: reduced(m) for m in methods}}
    split: dict[str, dict[str, float]] = {}
    with torch.inference_mode(), patch.object(ViTLog, "mark", _mark(device, clock)):
        for name in methods:
            passes[name]()
        counts = {name: tuple(told[name].tokens) for name in methods}
        sliced = {f"{c}": lambda c=c: at_counts(model, pixels, c) for c in set(counts.values())}
        times = in_turn(passes | sliced, repeats, device, clock=clock)
        attention = attention_costs(batch, tokens, width, repeats, device, clock)
        memory = {name: peak_bytes(torch.device(device), run) or 0 for name, run in passes.items()}
        for name in set(methods) & set(MERGING) if device == "cpu" else ():
            rounds = []
            for _ in range(repeats):
                taken: dict[str, float] = defaultdict(float)
                with parts(taken, clock):
                    passes[name]()
                rounds.append(taken)
            split[name] = {part: statistics.median(r[part] for r in rounds) for part in rounds[0]}
    block = statistics.median(times["plain"]) / DEPTH
    for name in methods:
        session = told[name]
        stages = sum(count != before for before, count in itertools.pairwise([tokens, *session.tokens]))
        speedup, whole = ratio(times["plain"], times[name]), session.plain_flops
        spent = statistics.median(select[name][2 : 2 + repeats]) / max(stages, 1)
        yield {
            "batch": batch,
            "tokens": tokens,
            "width": width,
            "method": name,
            "left": session.tokens[-1],
            "plain_ms": round(block * DEPTH, 2),
            "speedup": round(speedup, 3),
            "bound": round(whole / session.flops, 3),
            "of_bound": round(speedup * session.flops / whole, 3),
            "measured": round(ratio(times["plain"], times[f"{counts[name]}"]), 3),
            "of_measured": round(ratio(times[f"{counts[name]}"], times[name]), 3),
            "block": round(spent / block, 4),
            "parts": {part: round(ms / stages / block, 4) for part, ms in split.get(name, {}).items()},
            "attention": attention,
            "plain_mib": round(memory["plain"] / 2**20),
            "mib": round(memory[name] / 2**20),
            "machine": machine_line(device),
        }


def pixels_for(batch: int, tokens: int, device: str) -> Tensor:
    """Pictures of so many patches."""
    side = math.isqrt(tokens) * PATCH
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)


def _mark(device: str, clock: Callable[[], float]) -> Callable[[ViTLog], Any]:
    """Sessions read the same clock; a GPU's have events."""
    return ViTLog.mark if device.startswith("cuda") else lambda log: clock()


def compiled_gains(
    batch: int, tokens: int, width: int, names: list[str], repeats: int, device: str, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """One row a method: what ``torch.compile`` makes of the plain model and of the model with the method in it."""
    model, pixels = build(tokens, width, device), pixels_for(batch, tokens, device)
    for name in names:
        torch.compiler.reset()
        method = methods_of([name], tokens)[name]
        compiled = torch.compile(model, dynamic=False)
        with torch.inference_mode():
            start = time.perf_counter()
            with vistok.apply(model, method):
                compiled(pixels)
            seconds = time.perf_counter() - start

            def run(way: Any, method: ViTReducer = method) -> None:
                with vistok.apply(model, method):
                    way(pixels)

            runs: dict[str, Callable[[], object]] = {
                "plain": lambda: model(pixels),
                "plain compiled": lambda way=compiled: way(pixels),
                "reduced": lambda: run(model),
                "reduced compiled": lambda way=compiled: run(way),
            }
            times = in_turn(runs, repeats, device, warm=2, clock=clock)
        yield {
            "batch": batch,
            "tokens": tokens,
            "width": width,
            "method": name,
            "seconds": round(seconds),
            "plain": round(ratio(times["plain"], times["plain compiled"]), 3),
            "reduced": round(ratio(times["reduced"], times["reduced compiled"]), 3),
            "speedup": round(ratio(times["plain compiled"], times["reduced compiled"]), 3),
            "machine": machine_line(device),
        }


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What became of the goals, for the systems (the peers have none)."""
    ours = [row for row in rows if row["method"] not in (PUBLISHED, WRITTEN_OUT)]
    large = [row for row in ours if row["tokens"] >= FROM]
    merging = [row for row in ours if row["method"] in MERGING]
    alone = [row for row in ours if row["batch"] == 1]
    goals = {
        f"speed-up at least {GOAL_BOUND} of the bound by operations from {FROM} patches on": (
            large,
            [row for row in large if row["of_bound"] < GOAL_BOUND],
        ),
        f"a stage of merging (evidence, matching, merging) under {GOAL_BLOCK:.0%} of a block": (
            merging,
            [row for row in merging if row["block"] >= GOAL_BLOCK],
        ),
        "never slower than the plain model at batch 1": (alone, [row for row in alone if row["speedup"] < 1]),
    }
    return [f"{goal}: {_verdict(*counted)}" for goal, counted in goals.items()]


def _verdict(rows: list[dict[str, Any]], missed: list[dict[str, Any]]) -> str:
    if not rows:
        return "not measured"
    if not missed:
        return f"met in all {len(rows)} rows"
    return f"MISSED in {len(missed)} of {len(rows)} rows, by {', '.join(map(_named, missed))}"


def _named(row: dict[str, Any]) -> str:
    return f"{row['method']} ({row['batch']} x {row['tokens']}, width {row['width']})"


def markdown(saved: dict[str, Any]) -> str:
    """The page of results."""
    rows, left_out = saved["rows"], saved["left_out"]
    lines = [
        "# Speed of reduced vision transformers",
        "",
        "`python -m benchmarks.vit --save docs/results/vit-speed.json --markdown docs/results/vit-speed.md` makes this "
        f"page and goes on where the rows end; its module says how it is measured. {saved['how']}",
        "",
        *[f"- {verdict}" for verdict in verdicts(rows)],
        *([f"- Not run on this machine: {', '.join(left_out)}."] if left_out else []),
        "",
    ]
    for key, group in itertools.groupby(rows, lambda row: tuple(row[name] for name in CELL)):
        some = list(group)
        lines += [
            f"## {key[0]} x {key[1]} patches, width {key[2]}",
            "",
            f"The plain model: {some[0]['plain_ms']:.1f} ms, {some[0]['plain_mib']} MiB beyond what was held. "
            f"{some[0]['machine']}. Fused attention over itself without sizes: "
            f"{', '.join(f'{name} {cost:.2f}' for name, cost in some[0]['attention'].items())}.",
            "",
            "| method | left | speed-up | bound by operations | of it | bound measured | of it | a stage, of a block "
            "(evidence + matching + merging) | MiB |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['method']} | {r['left']} | {r['speedup']:.2f} | {r['bound']:.2f} | {r['of_bound']:.2f} | "
            f"{r['measured']:.2f} | {r['of_measured']:.2f} | {r['block']:.1%}{_split(r['parts'])} | {r['mib']} |"
            for r in some
        ]
        lines.append("")
    if saved["compiled"]:
        lines += [
            "## Compiled",
            "",
            "What `torch.compile` (default mode) makes of the plain model and of the model with the method in it, each "
            "over itself uncompiled, and the speed-up of the method where both are compiled. How long the first call "
            "takes depends on which kernels an earlier run has left in the cache.",
            "",
            "| cell | method | compiled in | plain faster by | reduced faster by | speed-up, both compiled |",
            "|---|---|---:|---:|---:|---:|",
            *[
                f"| {r['batch']} x {r['tokens']}, width {r['width']} | {r['method']} | {r['seconds']} s | "
                f"{r['plain']:.2f} | {r['reduced']:.2f} | {r['speedup']:.2f} |"
                for r in saved["compiled"]
            ],
            "",
        ]
    return "\n".join(lines)


def _split(parts: dict[str, float]) -> str:
    return f" ({' + '.join(f'{share:.1%}' for share in parts.values())})" if parts else ""


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 576, 1369])
    parser.add_argument("--width", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--most", type=float, default=MOST, help="operations of a plain pass, on a CPU")
    parser.add_argument("--compile", help="methods, by comma: what torch.compile makes of these, instead of the rows")
    parser.add_argument("--save", type=Path, help="JSON file of rows, to go on with and to add to")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    if given.save and given.save.exists():
        saved = json.loads(given.save.read_text(encoding="utf-8"))
    else:
        saved = {"rows": [], "compiled": [], "left_out": [], "how": ""}
    clock = CLOCKS[given.clock]
    saved["how"] = (
        f"{given.repeats} rounds, {'CPU time of the process' if given.clock == 'cpu' else 'wall time'}; each table "
        "says what it ran on, and under what load."
    )
    kind, work = ("compiled", compiled_gains) if given.compile else ("rows", cell)
    together = [[name] for name in given.compile.split(",")] if given.compile else [given.methods.split(",")]
    for batch, tokens, width, names in itertools.product(given.batch, given.tokens, given.width, together):
        operations = batch * DEPTH * (24 * tokens * width**2 + 4 * tokens**2 * width)
        name = f"{batch} x {tokens}, width {width}"
        if (batch, tokens, width, names[0]) in [(*(row[key] for key in CELL), row["method"]) for row in saved[kind]]:
            continue
        if given.device == "cpu" and operations > given.most:
            saved["left_out"] = [*dict.fromkeys([*saved["left_out"], name])]
            continue
        saved["left_out"] = [other for other in saved["left_out"] if other != name]
        for row in work(batch, tokens, width, names, given.repeats, given.device, clock):
            saved[kind].append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        saved[kind].sort(key=lambda row: [row[key] for key in CELL])
        if given.save:
            write(given.save, json.dumps(saved, indent=1))
    if given.save:
        write(given.save, json.dumps(saved, indent=1))
    print(*verdicts(saved["rows"]), *(f"not run: {name}" for name in saved["left_out"]), sep="\n")
    if given.markdown:
        write(given.markdown, markdown(saved))


if __name__ == "__main__":
    main()

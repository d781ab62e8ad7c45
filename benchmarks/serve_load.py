"""Many clients at once against ``vistok serve``: is any answer wrong or lost, how long does it take, does pruning pay.

A server in a process of its own, on this machine. Every client has its own picture of the world, asks one of its
questions, waits for the answer, checks it against what the model says when it is asked directly (with the same method,
not through the server), and asks the next; every other client reads its answer as a stream. So an answer that went to
the wrong client shows. The dense model and the method are measured in turn, each for as long. Times are what clients
saw; the clients share the machine with the server.

python -m benchmarks.serve_load [--clients 200] [--seconds 60] [--method holov] [--keep 0.25] [--model vistok-tiny]
                                [--max-batch 16] [--cache-mb 1024 0] [--json] [--markdown docs/results/serve.md]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

import vistok
from benchmarks.common import machine_line
from vistok.serve.client import data_url, message
from vistok.world import sample
from vistok.zoo import load, load_processor
from vistok.zoo.asking import ask

DENSE = "dense"


@dataclass
class Seen:
    """What the clients of one run saw."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    took: float = 0.0

    def row(self, way: str, cache_mb: int, clients: int) -> dict[str, Any]:
        done = sorted(self.seconds)
        return {
            "way": way,
            "cache_mb": cache_mb,
            "clients": clients,
            "answers": len(done),
            "wrong": self.wrong,
            "lost": len(self.lost),
            "why": sorted(set(self.lost))[:3],
            "per_second": len(done) / self.took,
            "p50_s": statistics.median(done),
            "p99_s": done[min(len(done) - 1, int(0.99 * len(done)))],
            "first_p50_s": statistics.median(self.first) if self.first else None,
        }


@contextmanager
def server(model: str, max_batch: int, cache_mb: int) -> Iterator[tuple[str, int]]:
    """URL and process number of a server that is ready."""
    options = ["--port", "0", "--max-batch", str(max_batch), "--cache-mb", str(cache_mb), "--max-wait-ms", "10"]
    command = [sys.executable, "-m", "vistok", "serve", model, "--queue", "512", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = next(found[1] for line in process.stderr if (found := re.search(r"at (http://\S+)/v1", line)))
            while httpx.get(f"{url}/readyz").status_code != 200:
                time.sleep(0.1)
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def questions(model: str, clients: int, method: str | None, keep: float) -> list[list[tuple[bytes, str]]]:
    """For each client its requests, as JSON, with the answers that the model gives when it is asked directly."""
    pictures = list(sample("scenes", clients, seed=11, size=112, split="test"))
    asked = [(number, question.text) for number, picture in enumerate(pictures) for question in picture.questions]
    images = [Image.fromarray(picture.image) for picture in pictures]
    loaded, processor = load(model), load_processor(model)
    with vistok.apply(loaded, method, keep=keep) if method else nullcontext():
        known = ask(loaded, processor, [images[number] for number, _ in asked], [text for _, text in asked])
    urls = [data_url(image) for image in images]
    made: list[list[tuple[bytes, str]]] = [[] for _ in pictures]
    for (number, text), answer in zip(asked, known, strict=True):
        vistok_options = {"method": method, "keep": keep} if method else {}
        value = {"model": model, "messages": [message(text, urls[number])], "max_tokens": 16, "vistok": vistok_options}
        made[number].append((json.dumps(value | {"stream": number % 2 == 1}).encode(), answer))
    return made


async def run(url: str, asked: list[list[tuple[bytes, str]]], seconds: float) -> Seen:
    """Let all clients ask for so long, each over a connection of its own."""
    seen, encryption = Seen(), ssl.create_default_context()  # one for all: it takes long to make and is not used
    start = time.perf_counter()

    async def alone(number: int, mine: list[tuple[bytes, str]]) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, verify=encryption) as http:
            await client(http, number, mine, start + seconds, seen)

    await asyncio.gather(*(alone(number, mine) for number, mine in enumerate(asked)))
    seen.took = time.perf_counter() - start
    return seen


async def client(
    http: httpx.AsyncClient, number: int, asked: list[tuple[bytes, str]], until: float, seen: Seen
) -> None:
    """One client: question after question until the time is over."""
    turn = 0
    while (start := time.perf_counter()) < until:
        body, known = asked[turn % len(asked)]
        turn += 1
        said: list[str] = []
        try:
            headers = {"content-type": "application/json"}
            async with http.stream("POST", "/v1/chat/completions", content=body, headers=headers) as answer:
                if answer.status_code != 200:
                    raise httpx.HTTPError(f"status {answer.status_code}")
                if number % 2 == 0:
                    said.append(json.loads(await answer.aread())["choices"][0]["message"]["content"])
                else:
                    done = False
                    async for line in answer.aiter_lines():
                        if line == "data: [DONE]":
                            done = True
                        elif line.startswith("data: "):
                            if not said:
                                seen.first.append(time.perf_counter() - start)
                            said.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
                    if not done:
                        raise httpx.HTTPError("a stream without an end")
        except (httpx.HTTPError, ValueError, LookupError) as error:
            seen.lost.append(f"{type(error).__name__}: {error}"[:100])
            continue
        seen.seconds.append(time.perf_counter() - start)
        seen.wrong += "".join(said) != known


def peak_mb(process: int) -> float:
    """The most memory that a process has held."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """The page of results."""
    lines = [
        "# The server under load",
        "",
        f"`python -m benchmarks.serve_load` makes this page: {arguments.clients} clients at once, each way for "
        f"{arguments.seconds:.0f} s, batches of {arguments.max_batch}, `{arguments.model}`. Every client asks about "
        "its own picture and checks the answer against what the model says when it is asked directly: "
        '"wrong" counts those that differ, "lost" those that did not come. The clients run on the same machine.',
        "",
        "| encoder cache | way | answers | wrong | lost | answers/s | median, s | p99, s | first token, median, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cache = f"{row['cache_mb']} MB" if row["cache_mb"] else "none"
        lines.append(
            f"| {cache} | {row['way']} | {row['answers']} | {row['wrong']} | {row['lost']} | {row['per_second']:.1f} "
            f"| {row['p50_s']:.2f} | {row['p99_s']:.2f} | {row['first_p50_s']:.2f} |"
        )
    peaks = ", ".join(sorted({f"{row['server_peak_mb']:.0f} MB" for row in rows}))
    return "\n".join([*lines, "", f"Most memory of the server: {peaks}. {machine_line()}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--method", default="holov")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--model", default="vistok-tiny")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--cache-mb", type=int, nargs="+", default=[1024, 0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    ways = {DENSE: None, f"{arguments.method} {arguments.keep:g}": arguments.method}
    asked = {way: questions(arguments.model, arguments.clients, method, arguments.keep) for way, method in ways.items()}
    rows = []
    for cache_mb in arguments.cache_mb:
        with server(arguments.model, arguments.max_batch, cache_mb) as (url, process):
            for way in ways:
                asyncio.run(run(url, asked[way][:8], 2))  # warm
            for way in ways:
                seen = asyncio.run(run(url, asked[way], arguments.seconds))
                row = seen.row(way, cache_mb, arguments.clients) | {"server_peak_mb": peak_mb(process)}
                rows.append(row)
                print(json.dumps(row) if arguments.json else row, flush=True)
    if arguments.markdown:
        arguments.markdown.write_text(table(rows, arguments))


if __name__ == "__main__":
    main()

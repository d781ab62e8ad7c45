"""Throughput with requests in flight: dynamic batching on the embedded model, with and without fewer tokens.

Clients send a picture and a question, wait for the answer, and send the next. One worker takes all that waits (up to
the largest batch), answers it in one ``generate``, and goes on: what a serving engine does, without its network. The
dense model and every method are measured in turn in one process, on the same questions; requests a second, medians.
One published engine lost half of its throughput here when pruning was on; ours must never fall below dense.

python -m benchmarks.reduce_concurrency [--methods fastervlm,holov] [--keep 0.25] [--in-flight 1 4 16]
                                        [--requests 48] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import torch

import vistok
from benchmarks.common import machine, machine_line
from vistok.bench.measure import Case, cases_of
from vistok.world import sample
from vistok.zoo import DEFAULT, load, load_processor
from vistok.zoo.asking import ask

MOST = 16
METHODS = "random,fastervlm,holov,mmtok,visiondrop"

Request = tuple[Case, "Future[str]"]


def serve(model: Any, processor: Any, waiting: queue.SimpleQueue[Request | None]) -> None:
    """Answer what waits, batch after batch, until None comes."""
    while (first := waiting.get()) is not None:
        batch = [first]
        while len(batch) < MOST and not waiting.empty():
            request = waiting.get()
            if request is None:
                waiting.put(None)
                break
            batch.append(request)
        pictures, questions = [case.picture for case, _ in batch], [case.question for case, _ in batch]
        answers = ask(model, processor, pictures, questions, batch_size=MOST, max_new_tokens=8)
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)


def requests_per_second(model: Any, processor: Any, cases: list[Case], in_flight: int) -> float:
    """Closed loop: ``in_flight`` clients share ``cases``, each waits for its answer before it sends the next."""
    waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
    todo = iter(cases)
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                case = next(todo, None)
            if case is None:
                return
            future: Future[str] = Future()
            waiting.put((case, future))
            future.result()

    clients = [threading.Thread(target=client) for _ in range(in_flight)]
    start = time.perf_counter()
    for thread in clients:
        thread.start()

    def end() -> None:
        for thread in clients:
            thread.join()
        waiting.put(None)

    ends = threading.Thread(target=end)
    ends.start()
    serve(model, processor, waiting)
    ends.join()
    return len(cases) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    model, processor = load(options.model), load_processor(options.model)
    cases = cases_of(list(sample("all", options.requests, split="test", questions=1)))
    methods = ["dense", *options.methods.split(",")]
    for in_flight in options.in_flight:
        rates: dict[str, list[float]] = {name: [] for name in methods}
        for number in range(options.rounds + 1):
            for name in methods:
                with nullcontext() if name == "dense" else vistok.apply(model, name, keep=options.keep):
                    rate = requests_per_second(model, processor, cases, in_flight)
                if number:  # the first round warms up
                    rates[name].append(rate)
        for name in methods:
            pairs = [a / b for a, b in zip(rates[name], rates["dense"], strict=True)]
            row = {
                "method": name,
                "keep": 1.0 if name == "dense" else options.keep,
                "in_flight": in_flight,
                "requests_per_second": round(statistics.median(rates[name]), 2),
                "over_dense": round(statistics.median(pairs), 3),
            }
            if options.json:
                print(json.dumps({**row, **machine()}), flush=True)
            else:
                verdict = "" if name == "dense" else "  ok" if row["over_dense"] >= 1 else "  BELOW DENSE"
                print(
                    f"{in_flight:3} in flight  {name:20} {row['requests_per_second']:8.2f} requests/s  "
                    f"{row['over_dense']:5.2f} x dense{verdict}",
                    flush=True,
                )
    if not options.json:
        print(f"keep {options.keep}; {len(cases)} requests a round; {machine_line()}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

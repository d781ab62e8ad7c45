"""A driver of its own process, to be killed: python -m tests.engine.driver FOLDER [options]. Prints its outcomes."""

from __future__ import annotations

import argparse
import json
import os
import signal
from functools import partial
from pathlib import Path

from tests.engine.work import jobs, note_setup, until, write, written
from vistok.engine import LocalEngine, RayEngine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ray", help="address")
    parser.add_argument("--meet", action="store_true", help="wait for the file go before the first cell")
    parser.add_argument("--leave", action="store_true", help="end after one outcome with the iterator still open")
    options = parser.parse_args()
    folder = options.folder
    engine = RayEngine(options.ray, options.workers) if options.ray else LocalEngine(options.workers)
    if options.meet:
        (folder / f"here-{os.getpid()}").touch()
        until((folder / "go").exists)
    outcomes = engine.map(
        jobs(options.cells),
        partial(write, folder, options.seconds),
        setup=partial(note_setup, folder),
        folder=folder,
        done=partial(written, folder),
    )
    for outcome in outcomes:
        print(json.dumps([outcome.key, outcome.status]), flush=True)
        if options.leave:
            globals()["kept"] = outcomes
            return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    main()

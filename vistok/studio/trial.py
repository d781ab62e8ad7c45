"""``vistok try`` in a process of its own: what it prints, as it prints it, and its end when nobody listens any more."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from vistok import catalogue
from vistok.studio.html import render

TICK = 0.5
"""Seconds after which is told that it still runs, also where nothing was printed."""
PAUSE = 0.1
"""Seconds that lie at least between two that tell of output."""
ROOM = 20_000
"""Characters of the output that are kept, the last ones."""
WIDTH = 110
"""Columns of the output."""


@dataclass(frozen=True)
class Progress:
    """How far a trial is. ``code``: its exit status, None while it runs."""

    output: str
    seconds: float
    code: int | None = None


def command(slug: str, seed: int = 0) -> list[str]:
    """What measures the claim of a system. Raises UnknownSystem for a name that the catalogue does not have."""
    return [sys.executable, "-m", "vistok", "try", catalogue.card(slug).slug, "--seed", str(int(seed))]


async def follow(command: Sequence[str], tick: float = TICK) -> AsyncIterator[Progress]:
    """Run ``command`` (no shell) and tell its progress at least every ``tick`` seconds, at last with its exit status.

    When the iterator is closed, or its task cancelled, the process and all that it has started are killed.
    """
    environment = os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    start, output, decoder = time.monotonic(), "", codecs.getincrementaldecoder("utf-8")("replace")
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # a process group of its own, to be killed as a whole
    )
    assert process.stdout is not None
    reading = asyncio.ensure_future(process.stdout.read(4096))
    try:
        yield Progress("", 0.0)
        said, last = output, start
        while True:
            done, _ = await asyncio.wait([reading], timeout=tick if said == output else PAUSE)
            if done:
                data = reading.result()
                output = (output + decoder.decode(data, final=not data))[-ROOM:]
                if not data:
                    break
                reading = asyncio.ensure_future(process.stdout.read(4096))
            now = time.monotonic()
            if not done or now - last >= PAUSE:  # a flood of output is told now and then
                said, last = output, now
                yield Progress(output, now - start)
        yield Progress(output, time.monotonic() - start, await process.wait())
    finally:
        reading.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def told(slug: str, seed: int, how: Progress) -> str:
    """The HTML of a trial that runs or has ended."""
    state, words, seconds = "runs", f"Measuring {slug}", f"{how.seconds:.0f} s"
    if how.code == 0:
        state = verdict(slug, how.output)
        result = {"held": "the claim held", "open": "the claim did not hold at this scale"}.get(state, "finished")
        words = f"{slug}: {result}"
    elif how.code is not None:
        state, words = "failed", f"{slug} could not be measured (exit status {how.code})"
    return panel(state, words, seconds, f"vistok try {slug} --seed {seed}", how.output)


def verdict(slug: str, output: str) -> str:
    """What the table that ``vistok try`` prints says of the claim: "held", "open" (not at this scale), or ""."""
    line = next((line for line in reversed(output.splitlines()) if line.split()[:1] == [slug]), "")
    return "open" if "did not" in line else "held" if re.search(r"\bheld\b(?!-)", line) else ""


def panel(state: str, words: str, seconds: str = "", command: str = "", output: str = "") -> str:
    """The HTML of a trial. ``state``: "runs", "held", "open", "failed", or "" where there is none."""
    return render("trial.html", state=state, words=words, seconds=seconds, command=command, output=output)

"""A process of its own that is shown hostile input, case by case, and tells how much memory it held.

The process of the tests is no place to measure that: it has run other tests, and hypothesis holds every case it drew
and, where it has not run before, takes 200 MiB for tables of Unicode. This one imports the server's readers and nothing
else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpcore
from PIL import Image

from tests.serve.outside import answer, file
from vistok.serve.body import read_json
from vistok.serve.errors import MediaError, RequestError
from vistok.serve.limits import Limits
from vistok.serve.media import MediaPolicy, decode, load
from vistok.serve.schema import read_request

LIMITS = Limits(picture_bytes=50_000, picture_pixels=10_000, picture_side=1_000)
MOST_KIB = 8 * 1024
"""What the process may hold at any moment of a case, above what it held before the first."""


class Guarded:
    """The process, inside a ``with``. A case is called by the name of a method of ``Cases`` and its arguments.

    ``root``: a folder that its file URLs may name.
    """

    def __init__(self, root: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.hostile", str(root)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Guarded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.communicate()

    def __call__(self, case: str, *given: Any) -> bool:
        """Whether the input was read, or properly refused. AssertionError for all else, and for memory."""
        held, read = self.held_kib(case, *given)
        assert (held or 0) < MOST_KIB, f"{case}: held {held} KiB"
        return read

    def held_kib(self, case: str, *given: Any) -> tuple[int | None, bool]:
        """The most that was held during the case, in KiB (None where the system does not tell), and as above."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps([case, *given], default=lambda data: data.decode("latin-1")) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        assert line, f"{case}: the process ended"
        told = json.loads(line)
        assert told["wrong"] is None, told["wrong"]
        return told["held_kib"], told["read"]


class Cases:
    """What is done in the process. Bytes come as text of the characters U+0000 to U+00FF."""

    def __init__(self, root: str, runner: asyncio.Runner) -> None:
        self._root, self._runner = root, runner
        self._context = ssl.create_default_context()
        self._data = MediaPolicy(limits=LIMITS)
        self._all = MediaPolicy(limits=LIMITS, allow_http=True, hosts=("*",), roots=(Path(root),), fetch_seconds=5)

    def check_refusal(self, error: RequestError) -> None:
        """A refusal that tells nothing of the machine."""
        assert 400 <= error.status < 500 and len(error.message) < 400
        json.dumps(error.body(), ensure_ascii=False).encode()
        assert self._root not in error.message
        assert not isinstance(error, MediaError) or "0x" not in error.message

    def load(self, url: str, names: list[list[str]], answers: list[str]) -> None:
        """A URL, in a world of these names and answers."""
        world = Hostile(names, [one.encode("latin-1") for one in answers], self._context)
        _check(self._runner.run(load(url, self._all, world)))

    def load_data(self, url: str) -> None:
        """A URL, where nothing but data URLs is allowed."""
        _check(self._runner.run(load(url, self._data)))

    def decode(self, data: str) -> None:
        """A picture file."""
        _check(decode(data.encode("latin-1"), LIMITS))

    def request(self, raw: str) -> None:
        """A request's body."""
        request = read_request(read_json(raw.encode("latin-1"), LIMITS), LIMITS)
        json.dumps(request.model_dump(), allow_nan=False).encode()

    # What no limit bounds, to show that the measure sees it.

    def decode_without_limits(self, data: str) -> None:
        """A picture file, with the usual server's limits."""
        decode(data.encode("latin-1"), Limits())

    def hold(self, kib: int) -> None:
        """So much memory, for a moment."""
        bytearray(b"x") * (kib * 1024)


def _check(made: Image.Image) -> None:
    assert made.mode == "RGB" and made.info == {}
    assert 0 < made.width * made.height <= LIMITS.picture_pixels and max(made.size) <= LIMITS.picture_side


class Hostile:
    """Every name has the drawn addresses, a new set each time; every address gives the drawn answers."""

    def __init__(self, names: list[list[str]], answers: list[bytes], context: ssl.SSLContext) -> None:
        self.names, self.answers, self.context = names, answers, context

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.names.append(self.names.pop(0))
        return self.names[-1]

    async def connect(self, address: str, port: int, timeout: float | None) -> httpcore.AsyncNetworkStream:
        assert not inside(address), address
        assert port in (80, 443)
        self.answers.append(self.answers.pop(0))
        return httpcore.AsyncMockStream([self.answers[-1], b""])

    def ssl_context(self) -> ssl.SSLContext:
        return self.context


def inside(address: str) -> bool:
    """Whether an address is, or carries, one that is not public: judged by ``ipaddress``, not by our own lists."""
    parsed = ipaddress.ip_address(address)
    forms: list[ipaddress.IPv4Address | ipaddress.IPv6Address | None] = [parsed]
    if isinstance(parsed, ipaddress.IPv6Address):
        forms += [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if parsed in ipaddress.ip_network("64:ff9b::/96"):
            forms = [ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)]
    return any(
        form is not None
        and (
            form.is_private
            or form.is_loopback
            or form.is_link_local
            or form.is_multicast
            or form.is_reserved
            or form.is_unspecified
            or str(form) in ("168.63.129.16", "100.100.100.200")
        )
        for form in forms
    )


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _forget_peak() -> bool:
    """The peak starts again from here. False where the system has none."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _warm(cases: Cases) -> None:
    """What is loaded at first use is loaded now."""
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = file(kind)
        cases.decode(data.decode("latin-1"))
        reply = answer(data, f"image/{kind.lower()}").decode("latin-1")
        cases.load("https://a.example/", [["93.184.216.34"]], [reply])
    cases.request('{"model": "m", "messages": [{"role": "user", "content": "x"}]}')


def main(root: str) -> None:
    """Answers the cases on standard input, a line of JSON each, on standard output."""
    with asyncio.Runner() as runner:
        cases = Cases(root, runner)
        _warm(cases)
        before = _kib("VmRSS") if _forget_peak() else None
        for line in sys.stdin:
            name, *given = json.loads(line)
            read, wrong = False, None
            if before is not None:
                _forget_peak()
            try:
                getattr(cases, name)(*given)
                read = True
            except RequestError as error:
                try:
                    cases.check_refusal(error)
                except Exception:
                    wrong = traceback.format_exc()
            except Exception:
                wrong = traceback.format_exc()
            held = None if before is None else _kib("VmHWM") - before
            print(json.dumps({"read": read, "wrong": wrong, "held_kib": held}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

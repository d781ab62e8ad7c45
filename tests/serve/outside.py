"""A world outside for tests: names, public addresses and servers, all of them on loopback."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from io import BytesIO

import httpcore
from PIL import Image

PUBLIC = "93.184.216.34"
Answer = bytes | Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Outside:
    """Looks names up in a table, and leads connections to public addresses to servers on loopback.

    ``names``: for each name its answers, one a lookup (the last one stays); ``servers``: the local port behind each
    address. ``lookups`` and ``connects`` tell what was asked for.
    """

    def __init__(self, names: dict[str, list[list[str]]] | None = None) -> None:
        self.names = names or {}
        self.servers: dict[str, int] = {}
        self.lookups: list[str] = []
        self.connects: list[tuple[str, int]] = []
        self.context = ssl.create_default_context()

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.lookups.append(host)
        if host not in self.names:
            raise OSError("no such name")
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def connect(self, address: str, port: int, timeout: float | None) -> httpcore.AsyncNetworkStream:
        self.connects.append((address, port))
        if address not in self.servers:
            raise httpcore.ConnectError("nobody there")
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.servers[address], timeout=timeout)

    def ssl_context(self) -> ssl.SSLContext:
        return self.context


@asynccontextmanager
async def server(*answers: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server on loopback: its port, and the request headers it got. It gives ``answers`` in turn, then the last."""
    got: list[bytes] = []
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            got.append(head)
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(head, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    async with running:
        yield running.sockets[0].getsockname()[1], got


def answer(body: bytes, kind: str = "image/png", status: str = "200 OK", more: str = "") -> bytes:
    """A whole HTTP answer."""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    """An answer that leads elsewhere."""
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def picture(width: int = 6, height: int = 4) -> Image.Image:
    """A small picture whose four corners differ."""
    made = Image.new("RGB", (width, height), (90, 120, 150))
    made.putpixel((0, 0), (255, 0, 0))
    made.putpixel((width - 1, 0), (0, 255, 0))
    made.putpixel((0, height - 1), (0, 0, 255))
    return made


def file(kind: str, made: Image.Image | None = None, **options: object) -> bytes:
    """The bytes of a picture file."""
    stream = BytesIO()
    (made or picture()).save(stream, kind, **options)
    return stream.getvalue()

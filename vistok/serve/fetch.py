"""Fetches a picture over http(s) for a stranger, who must not reach by it what only this machine can reach.

One grammar reads the URL, and the request is built from what it read: no second parser can see another host in it.
A name is resolved once, all its addresses are judged, and the connection goes to an address that was judged. The Host
header and TLS keep the name. Each redirect is a new URL with the same checks. Proxies, cookies, passwords and other
settings of the environment play no part.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urljoin

import httpcore

from vistok.serve.addresses import allowed
from vistok.serve.errors import MediaError

URL_CHARACTERS = 4_096
"""Length of an http(s) URL, in characters."""

PICTURE_TYPES = frozenset(
    {"image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif", "image/bmp", "image/x-ms-bmp"}
)
# Object stores send pictures as plain bytes where nobody set a type.
_ANSWER_TYPES = PICTURE_TYPES | {"application/octet-stream", "binary/octet-stream"}

_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?:\[(?P<v6>[0-9a-f:.]{2,45})\]|(?P<name>[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][^#]*)?(?:#.*)?",
    re.IGNORECASE,
)
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_ADDRESSES = 4
_CONNECT_SECONDS = 5.0
_HTTP_ERRORS = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
    httpcore.ConnectionNotAvailable,
)
# Names are looked up in threads of their own: slow name servers must not hold up other work.
_LOOKUPS = ThreadPoolExecutor(max_workers=4, thread_name_prefix="vistok-names")


@dataclass(frozen=True)
class Rules:
    """Where pictures may be fetched from, and how much at most.

    ``hosts``: names (``images.example.com``), names with all their subdomains (``*.example.com``; not
    ``example.com`` itself) or ``*``; none means that nothing is fetched. ``ports`` of the URL; ``max_bytes`` of a
    body; ``seconds`` for all of it, redirects too; ``redirects`` followed at most.
    """

    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    max_bytes: int
    seconds: float
    redirects: int


class Network(Protocol):
    """The world outside: looks up names, connects to addresses, and says whose certificates are good."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """All addresses of a name. Raises OSError where there are none."""

    async def connect(self, address: str, port: int, timeout: float | None) -> httpcore.AsyncNetworkStream:
        """A stream to a numeric address; ``timeout`` in seconds. Raises httpcore's network errors."""

    def ssl_context(self) -> ssl.SSLContext:
        """What TLS is checked against."""


class SystemNetwork:
    """This machine's resolver, sockets and certificates."""

    async def resolve(self, host: str, port: int) -> list[str]:
        """All addresses of ``host``, IPv4 and IPv6. Raises OSError where there are none."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            _LOOKUPS, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        )
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def connect(self, address: str, port: int, timeout: float | None) -> httpcore.AsyncNetworkStream:
        """A TCP stream to ``address``; ``timeout`` in seconds."""
        return await httpcore.AnyIOBackend().connect_tcp(address, port, timeout=timeout)

    def ssl_context(self) -> ssl.SSLContext:
        """The certificates of the system; host names are checked."""
        return ssl.create_default_context()


@dataclass(frozen=True)
class Place:
    """A URL that was read: ``host`` in lower case (an IPv6 address without brackets), ``target`` its path and query."""

    scheme: str
    host: str
    port: int
    target: str

    def bracketed(self) -> str:
        """The host as a URL writes it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def url(self) -> str:
        """The URL again, for links relative to it."""
        return f"{self.scheme}://{self.bracketed()}:{self.port}{self.target}"


def read_url(url: str) -> Place:
    """The parts of an http(s) URL. Raises MediaError for all that programs have been known to read differently.

    Refused are: characters outside printable ASCII, spaces and backslashes; user names; hosts with escapes or with a
    dot at the end; and hosts that end in a number without being a usual IPv4 address (``2130706433``, ``0x7f.1``,
    ``0177.0.0.1``, ``127.1``).
    """
    if len(url) > URL_CHARACTERS:
        raise MediaError(400, "invalid_url", f"The picture's URL is longer than {URL_CHARACTERS} characters.")
    match = _URL.fullmatch(url)
    if match is None or "\\" in url or not all("!" <= character <= "~" for character in url):
        raise MediaError(400, "invalid_url", "The picture's URL is not a plain http or https URL.")
    scheme = match["scheme"].lower()
    host = (match["v6"] or match["name"]).lower()
    last = host.rsplit(".", 1)[-1]
    try:
        if match["v6"]:
            host = str(ipaddress.IPv6Address(host))
        elif re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last):
            host = str(ipaddress.IPv4Address(host))
    except ValueError as error:
        raise MediaError(400, "invalid_url", "The host of the picture's URL is not a usual address.") from error
    port = int(match["port"] or _PORTS[scheme])
    target = match["target"] or "/"
    return Place(scheme, host, port, target if target.startswith("/") else f"/{target}")


def host_allowed(host: str, hosts: Iterable[str]) -> bool:
    """True where ``host`` (lower case) is on the list: see ``Rules.hosts``."""
    for entry in hosts:
        name = entry.lower()
        below = name.startswith("*.") and host.endswith(name[1:]) and len(host) >= len(name)
        if name in ("*", host) or below:
            return True
    return False


async def fetch(url: str, rules: Rules, network: Network) -> bytes:
    """The body at ``url``. Raises MediaError for what is not allowed, too large, too slow, or no picture by its type.

    A host that cannot be found, one with a forbidden address and one that does not answer give the same error: the
    difference would draw a map of the network that the server is in.
    """
    try:
        async with asyncio.timeout(rules.seconds):
            place = _checked(read_url(url), rules)
            for _ in range(rules.redirects + 1):
                body, location = await _one(place, rules, network)
                if location is None:
                    return body
                following = _checked(read_url(urljoin(place.url(), location)), rules)
                if place.scheme == "https" and following.scheme == "http":
                    raise MediaError(400, "redirect_not_allowed", "The picture's URL redirects from https to http.")
                place = following
    except TimeoutError as error:
        raise MediaError(400, "fetch_failed", "The picture could not be fetched in time.") from error
    except (OSError, UnicodeError, ValueError, *_HTTP_ERRORS) as error:
        raise _failed() from error
    raise MediaError(400, "redirect_not_allowed", f"The picture's URL redirects more than {rules.redirects} times.")


def _failed() -> MediaError:
    return MediaError(400, "fetch_failed", "The picture could not be fetched.")


def _checked(place: Place, rules: Rules) -> Place:
    if not host_allowed(place.host, rules.hosts) or place.port not in rules.ports:
        raise MediaError(403, "host_not_allowed", "This server does not fetch pictures from that host and port.")
    return place


async def _addresses(place: Place, network: Network) -> list[str]:
    """The addresses of a host; none of them forbidden."""
    try:
        found = [str(ipaddress.ip_address(place.host))]
    except ValueError:
        found = list(await network.resolve(place.host, place.port))
    if not found or not all(allowed(address) for address in found):
        raise _failed()
    return found


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to the addresses that were judged, whatever name the connection is for."""

    def __init__(self, addresses: Sequence[str], network: Network) -> None:
        self._addresses = addresses[:_MAX_ADDRESSES]
        self._network = network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                return await self._network.connect(address, port, timeout)
            except (OSError, httpcore.NetworkError, httpcore.TimeoutException) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("pictures are not fetched from local sockets")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def _one(place: Place, rules: Rules, network: Network) -> tuple[bytes, str | None]:
    """One request: its body, or where it redirects to."""
    backend = _Pinned(await _addresses(place, network), network)
    context = network.ssl_context() if place.scheme == "https" else None
    host = place.bracketed().encode()
    url = httpcore.URL(scheme=place.scheme.encode(), host=host, port=place.port, target=place.target.encode("ascii"))
    headers = [
        (b"Host", host if place.port == _PORTS[place.scheme] else b"%s:%d" % (host, place.port)),
        (b"Accept", b"image/*"),
        (b"Accept-Encoding", b"identity"),
        (b"User-Agent", b"vistok"),
    ]
    timeouts = {"connect": _CONNECT_SECONDS, "read": rules.seconds, "write": rules.seconds, "pool": rules.seconds}
    extensions = {"timeout": timeouts, "sni_hostname": place.host}
    async with (
        httpcore.AsyncConnectionPool(ssl_context=context, network_backend=backend, max_keepalive_connections=0) as pool,
        pool.stream("GET", url, headers=headers, extensions=extensions) as response,
    ):
        answer = {name.lower(): value for name, value in response.headers}
        if response.status in _REDIRECTS:
            return b"", answer.get(b"location", b"").decode("ascii")
        if response.status != 200:
            raise _failed()
        _check_answer(answer, rules)
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) > rules.max_bytes:
                raise too_large(rules.max_bytes)
        return bytes(body), None


def _check_answer(answer: dict[bytes, bytes], rules: Rules) -> None:
    """Refuses an answer by its header, before its body is read."""
    kind = answer.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
    if kind not in _ANSWER_TYPES:
        raise MediaError(400, "unsupported_media_type", "The URL did not answer with a PNG, JPEG, WebP, GIF or BMP.")
    # A compressed body grows when it is read, and pictures are compressed already.
    if answer.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
        raise MediaError(400, "unsupported_media_type", "The URL answered with a compressed body.")
    length = answer.get(b"content-length", b"0")
    if not length.isdigit() or int(length[:20]) > rules.max_bytes:
        raise too_large(rules.max_bytes)


def too_large(max_bytes: int) -> MediaError:
    """The error for a picture of more than ``max_bytes``."""
    return MediaError(413, "picture_too_large", f"The picture has more than {max_bytes} bytes.")

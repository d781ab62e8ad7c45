"""Who may speak to the server: by API key, by the name it was called by, and from which pages of the web.

``Guard`` judges a request by its header alone, before any of its body is read.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from vistok.serve.errors import RequestError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = frozenset({"/healthz", "/readyz"})
"""Paths that ask for no key: they tell nothing but that the server is there."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_KEY = re.compile(r"[!-~]{16,512}")
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](:[0-9]{1,5})?")


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Access:
    """Who may speak to the server. Raises ValueError for a key or an origin that cannot be meant.

    ``api_keys``: one of them must come as ``Authorization: Bearer KEY``; none: everybody may, which is for a loopback
    address only. ``hosts``: names in the ``Host`` header that are answered, without port; none: all. On a loopback
    address without a key they are that address's own names, so that a page whose name was pointed at this machine
    (DNS rebinding) gets nothing. ``origins``: pages of the web that may read answers (CORS); none by default.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not _KEY.fullmatch(key):  # the key itself is not shown
                raise ValueError(f"api_keys: got one of {len(key)} characters, must be 16 to 512 visible ASCII ones")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"origins: got {origin!r}, must be as https://example.com, without a path")


class Guard:
    """Answers what may not pass with an error, and hands on the rest."""

    def __init__(self, app: ASGIApp, access: Access, header_bytes: int) -> None:
        self._app, self._header_bytes = app, header_bytes
        self._digests = [sha256(key.encode()).digest() for key in access.api_keys]
        self._hosts = frozenset(host.lower() for host in access.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; what is no http (the start and the end of the server) passes. WebSockets are closed."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        error = self._refusal(scope)
        if error is None:
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        await JSONResponse(error.body(), error.status, headers | {"Connection": "close"})(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        # The HTTP parser bounds a header only while it is waiting for the rest of it.
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._header_bytes:
            return RequestError(431, "header_too_large", f"The header has more than {self._header_bytes} bytes.")
        if self._hosts and not self._named(_all(scope, b"host")):
            return RequestError(421, "wrong_host", "This server does not answer by that name.")
        # A browser asks first whether it may (CORS), and can send no key with that question.
        if scope["path"] in OPEN or (scope["type"] == "http" and scope["method"] == "OPTIONS"):
            return None
        if self._digests and not self._knows(_all(scope, b"authorization")):
            return RequestError(401, "invalid_api_key", "A key is needed: Authorization: Bearer KEY.")
        return None

    def _named(self, hosts: list[bytes]) -> bool:
        name = re.sub(r":[0-9]*$", "", hosts[0].decode("latin-1")).lower() if len(hosts) == 1 else ""
        return name in self._hosts

    def _knows(self, given: list[bytes]) -> bool:
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = sha256(key.strip()).digest()
        # All are compared, each in constant time: how long it takes tells nothing of which came close.
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(found)


def _all(scope: Scope, name: bytes) -> list[bytes]:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return [value for key, value in headers if key == name]

"""Runs the server's application in uvicorn, with the limits that hold before an application sees a request."""

from __future__ import annotations

import math
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from vistok.serve.limits import Limits

CONNECTIONS = 1_024
"""Connections at a time; one more is answered with status 503."""
KEEP_ALIVE_SECONDS = 75
"""How long a connection may be idle: longer than clients keep one (httpx, and with it the openai package: 5 s), so that
none is closed here just as its client uses it again."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host``, an address or a name of this machine; port 0 is a free one. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(CONNECTIONS)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    return listening


def serve_forever(app: FastAPI, listening: socket.socket, limits: Limits, grace_s: float) -> None:
    """Serve until SIGINT or SIGTERM; what was taken then is finished for ``grace_s`` seconds.

    Raises what loading a model raised, if one cannot be loaded.
    """
    _Server(server_config(app, limits, grace_s)).run(sockets=[listening])
    if app.state.service.failed:
        raise app.state.service.failed


def server_config(app: Any, limits: Limits, grace_s: float) -> uvicorn.Config:
    """uvicorn's settings: plain HTTP/1.1, headers bounded, nothing of a client's header believed."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=limits.header_bytes,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
        proxy_headers=False,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(grace_s),
    )


class _Server(uvicorn.Server):
    """Ends by itself when a model cannot be loaded."""

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second: whether to end."""
        return self.config.app.state.service.failed is not None or await super().on_tick(counter)  # type: ignore

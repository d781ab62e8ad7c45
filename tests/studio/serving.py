"""A studio with the smallest model, and one served on a port of this machine for as long as a ``with`` lasts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from vistok.studio.state import Models, Studio


@cache
def tiny_studio() -> Studio:
    """The same for all tests of a process, so that its model is loaded once."""
    return Studio(Models(["vistok-tiny"]))


@contextmanager
def served(studio: Studio) -> Iterator[str]:
    """Its address, ending in a slash. The server runs in a thread, so that a test can hold the locks of the models."""
    import uvicorn
    from fastapi import FastAPI

    from vistok.studio.app import mount

    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, *args: Any, **kwargs: Any) -> None:
            await super().startup(*args, **kwargs)
            started.set()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = mount(FastAPI(), studio)
    how = {"host": "127.0.0.1", "port": port, "log_level": "warning", "timeout_graceful_shutdown": 1}
    server = Server(uvicorn.Config(app, **how))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(120), "the studio did not start"
        yield f"http://127.0.0.1:{port}/studio/"
    finally:
        server.should_exit = True
        thread.join(10)

"""A real server on a free port of this machine, for tests and for looking at it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from PIL import Image

from vistok.serve.access import Access
from vistok.serve.app import create_app
from vistok.serve.http import _Server, listen, server_config
from vistok.serve.service import Service, Settings
from vistok.world import sample


@dataclass
class Server:
    """A server that runs: where, and its parts."""

    app: FastAPI
    url: str
    running: Any = field(repr=False)
    thread: threading.Thread = field(repr=False)

    @property
    def service(self) -> Service:
        return self.app.state.service

    def stop(self) -> None:
        self.running.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def serving(settings: Settings | None = None, access: Access | None = None, grace_s: float = 10.0) -> Iterator[Server]:
    """A server with its models loaded, ended at the end of the ``with``."""
    settings = settings or Settings()
    app = create_app(settings, access, grace_s=grace_s)
    listening = listen("127.0.0.1", 0)
    running = _Server(server_config(app, settings.limits, grace_s))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    server = Server(app, f"http://127.0.0.1:{listening.getsockname()[1]}", running, thread)
    try:
        assert app.state.service.loaded.wait(120) and app.state.service.ready
        yield server
    finally:
        server.stop()


def asked(n: int, seed: int = 5) -> list[tuple[Image.Image, str]]:
    """Pictures of the world, each with its first question."""
    drawn = sample("scenes", n, seed=seed, size=112, split="test")
    return [(Image.fromarray(picture.image), picture.questions[0].text) for picture in drawn]

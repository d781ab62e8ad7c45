"""What the studio remembers of each open page, and how work that is under way is stopped."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vistok.host.hooks import Hooks
from vistok.host.hosts import host_of


class Stopped(Exception):
    """The work was stopped by whoever asked for it."""


class Stop:
    """A flag that one thread sets and another looks at."""

    def __init__(self) -> None:
        self._flag = threading.Event()

    def set(self) -> None:
        """Whatever looks at it stops."""
        self._flag.set()

    def check(self) -> None:
        """Raises Stopped once it is set."""
        if self._flag.is_set():
            raise Stopped

    @contextmanager
    def holding(self, lock: threading.Lock) -> Iterator[None]:
        """``lock``, as soon as it is free; Stopped while waiting for it too."""
        while not lock.acquire(timeout=0.1):
            self.check()
        try:
            self.check()
            yield
        finally:
            lock.release()

    @contextmanager
    def inside(self, model: Any) -> Iterator[None]:
        """Inside the ``with`` the model's decoder raises Stopped before its next layer, not only at its next token."""
        hooks = Hooks()
        try:
            for layer in host_of(model).layers:
                hooks.before(layer, lambda module, args, kwargs: self.check())
            yield
        finally:
            hooks.remove()


@dataclass
class Page:
    """One open page."""

    stop: Stop = field(default_factory=Stop)
    """Of the work that was begun last."""
    run: Any = None
    """What the tab Look showed last (``vistok.studio.looking.Run``)."""

    def begin(self) -> Stop:
        """The flag of new work; what was under way is stopped."""
        self.stop.set()
        self.stop = Stop()
        return self.stop


class Sessions:
    """A ``Page`` for each of at most ``most`` open pages, by the page's session; the one longest unused goes first."""

    def __init__(self, most: int = 64) -> None:
        self._pages: OrderedDict[str, Page] = OrderedDict()
        self._most, self._lock = most, threading.Lock()

    def __len__(self) -> int:
        return len(self._pages)

    def page(self, session: str | None) -> Page:
        """The page of ``session``, a new one where it is not known."""
        with self._lock:
            page = self._pages.pop(session or "", None) or Page()
            self._pages[session or ""] = page
            while len(self._pages) > self._most:
                self._pages.popitem(last=False)[1].stop.set()
            return page

    def close(self, session: str | None) -> None:
        """Forget the page and stop its work."""
        with self._lock:
            page = self._pages.pop(session or "", None)
        if page is not None:
            page.stop.set()

"""How many bytes all requests together may hold: bodies and decoded pictures, for as long as a request lives."""

from __future__ import annotations

from types import TracebackType

from vistok.serve.errors import RequestError


class Budget:
    """A sum that must not pass ``most_bytes``. Used on one event loop only, so it needs no lock."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self.held = most_bytes, 0

    def share(self) -> Share:
        """What one request holds; ``with budget.share() as share`` gives all of it back at the end."""
        return Share(self)


class Share:
    """The part of one request."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._held = budget, 0

    def take(self, size: int) -> None:
        """Hold ``size`` more bytes. Raises RequestError (503) where there is no room for them now."""
        if self._budget.held + size > self._budget._most:
            raise RequestError(503, "server_busy", "The server holds as much as it may.", retry_after_s=1)
        self._budget.held += size
        self._held += size

    def give(self, size: int) -> None:
        """``size`` bytes are not held any more."""
        self._budget.held -= size
        self._held -= size

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give(self._held)

"""What a client is told when its request is refused."""

from __future__ import annotations

import math
from typing import Any


class RequestError(Exception):
    """A request that is refused: ``status`` is the HTTP status, ``code`` a word for programs, ``message`` for people.

    ``param`` names the field at fault, where there is one; ``retry_after_s``: when it may go well,
    in seconds. A message holds no path, address or text of another
    library's error: those tell a stranger about the machine. The cause stays in ``__cause__``, for the server's log.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}

    def body(self) -> dict[str, Any]:
        """The error as the OpenAI API writes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class MediaError(RequestError):
    """A picture that cannot be had or may not be read."""

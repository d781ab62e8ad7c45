"""What a client is told when its request is refused."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is refused: ``status`` is the HTTP status, ``code`` a word for programs, ``message`` for people.

    ``param`` names the field at fault, where there is one. A message holds no path, address or text of another
    library's error: those tell a stranger about the machine. The cause stays in ``__cause__``, for the server's log.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        """The error as the OpenAI API writes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class MediaError(RequestError):
    """A picture that cannot be had or may not be read."""

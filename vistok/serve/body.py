"""Reads the JSON of a request's body; depth and number of values are checked before any object is made."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from vistok.serve.errors import RequestError
from vistok.serve.limits import Limits

# A string (or one that never ends), or a sign of structure. Possessive, so that each byte is looked at once.
_MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(body: bytes, limits: Limits) -> Any:
    """The value in ``body``, UTF-8. Raises RequestError for what is too long, too deep, or no JSON.

    ``NaN`` and ``Infinity``, a name twice in one object, and half a surrogate pair are no JSON here: what reads the
    value later would disagree about them.
    """
    if len(body) > limits.request_bytes:
        raise RequestError(413, "request_too_large", f"The request has more than {limits.request_bytes} bytes.")
    depth, values = 0, 1
    for marks, mark in enumerate(_MARKS.finditer(body)):
        sign = body[mark.start()]
        if sign in b"[{":
            depth += 1
            values += 1
        elif sign in b"]}":
            depth -= 1
        elif sign == 0x2C:
            values += 1
        # A value brings at most five marks: its name, itself, two brackets and a comma.
        if depth > limits.json_depth or values > limits.json_values or marks > 5 * limits.json_values:
            raise RequestError(400, "json_too_large", "The request's JSON is nested too deep or has too many values.")
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises for a half of a pair
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "invalid_json", "The request's body is not proper JSON.") from error
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")
    return made

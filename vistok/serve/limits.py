"""How much a stranger may ask for; every bound is checked before the work that it bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Upper bounds, on one request where nothing else is said.

    Raises ValueError for a bound that is no number, not positive, or not possible.

    - ``request_bytes`` (64 MiB): the body. Room for two of the largest pictures in base64.
    - ``header_bytes`` (16 KiB): the request's header. An API key and a proxy's marks need no more.
    - ``json_depth`` (16): objects and lists inside one another. A chat request needs 6; deep nesting ends the stack.
    - ``json_values`` (20,000): values in the body. ``[],[],...`` in 64 MiB would become gigabytes of objects.
    - ``messages`` (256): turns of the conversation.
    - ``text_characters`` (100,000): all texts together. Tokenizers and chat templates take time by length.
    - ``pictures`` (8): pictures of a request. Each becomes hundreds to thousands of visual tokens.
    - ``picture_bytes`` (20 MiB): one picture as it is sent, before base64. A phone's largest photograph fits.
    - ``picture_pixels`` (25,000,000): width times height. Decoding takes up to about 16 bytes for each.
    - ``picture_side`` (16,384 pixels): width or height. JPEG's own bound is 65,535.
    - ``picture_ratio`` (200): longer side over shorter one. Image processors raise beyond it.
    - ``frames`` (1): frames read of an animation: a picture is its first frame, and only 1 is possible.
    - ``new_tokens`` (4,096): tokens that a request may ask for. One request must not hold a batch for minutes.
    - ``deadline_seconds`` (120.0): from the request's arrival to its last token.
    - ``queue_length`` (256): jobs that wait. More than this would miss their deadline anyway.
    - ``held_bytes`` (2 GiB): bodies and decoded pictures of all requests together, those that wait included.
    """

    request_bytes: int = 64 * 2**20
    header_bytes: int = 16 * 2**10
    json_depth: int = 16
    json_values: int = 20_000
    messages: int = 256
    text_characters: int = 100_000
    pictures: int = 8
    picture_bytes: int = 20 * 2**20
    picture_pixels: int = 25_000_000
    picture_side: int = 16_384
    picture_ratio: int = 200
    frames: int = 1
    new_tokens: int = 4_096
    deadline_seconds: float = 120.0
    queue_length: int = 256
    held_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # "from __future__ import annotations": a field's type is its text.
            kinds = (int, float) if field.type == "float" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or value <= 0:
                wanted = "a number above 0" if field.type == "float" else "a whole number above 0"
                raise ValueError(f"{field.name}: got {value!r}, must be {wanted}")
        if self.frames != 1:
            raise ValueError(f"frames: got {self.frames}, must be 1: only the first frame of an animation is read")
        if self.picture_bytes > self.request_bytes:
            raise ValueError(
                f"picture_bytes: got {self.picture_bytes}, must be at most request_bytes ({self.request_bytes})"
            )
        if self.request_bytes > self.held_bytes:
            raise ValueError(f"request_bytes: got {self.request_bytes}, must be at most held_bytes ({self.held_bytes})")
        if self.picture_side > 65_535:
            raise ValueError(f"picture_side: got {self.picture_side}, must be at most 65535")

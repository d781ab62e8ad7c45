"""What a client of the server sends: pictures as data URLs, and turns of a conversation."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


def data_url(image: Image.Image) -> str:
    """The picture, as PNG, in a URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def message(text: str, *urls: str) -> dict[str, Any]:
    """A turn of the user: the pictures at ``urls``, then a text."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}

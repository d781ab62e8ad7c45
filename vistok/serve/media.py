"""Pictures of a request, safely: from data URLs, and from hosts and folders that were allowed.

Every limit is checked before the work it bounds: the length of base64 before it is decoded, bytes while a body comes
in, format and size from the header before a decoder runs. Errors are ``MediaError``s.
"""

from __future__ import annotations

import asyncio
import binascii
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from vistok.serve import files
from vistok.serve.container import Container, damaged, read_container
from vistok.serve.errors import MediaError
from vistok.serve.fetch import PICTURE_TYPES, Network, Rules, SystemNetwork, fetch, too_large
from vistok.serve.limits import Limits

__all__ = ["MediaError", "MediaPolicy", "decode", "digest", "load"]

# Imported by name, so that opening one of them never makes Pillow import its forty other parsers.
_PLUGINS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin)
# Two pictures are decoded at a time, however many requests there are: this bounds the memory for decoding.
_DECODERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="vistok-pictures")
_DATA = re.compile(r"([a-z0-9.+-]+/[a-z0-9.+-]+)(?:;[a-z0-9._-]+=[a-z0-9._-]+)*;base64")
_DATA_HEAD = 128
_HOST = re.compile(r"\*|(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|[0-9a-f:.]+", re.IGNORECASE)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class MediaPolicy:
    """Where pictures may come from. Data URLs always may; hosts and folders only where they are named.

    ``allow_http`` with ``hosts`` (names, ``*.name`` for all its subdomains, ``*`` for every public host) and
    ``ports``; ``roots``: folders whose files may be named by file URLs; ``fetch_seconds`` for one picture, redirects
    too; ``redirects`` followed at most (0 to 3). Raises ValueError for what cannot be meant, such as http without a
    host: an empty list allows nothing.
    """

    limits: Limits = field(default_factory=Limits)
    allow_http: bool = False
    hosts: tuple[str, ...] = ()
    ports: tuple[int, ...] = (80, 443)
    roots: tuple[Path, ...] = ()
    fetch_seconds: float = 10.0
    redirects: int = 3

    def __post_init__(self) -> None:
        if self.allow_http != bool(self.hosts):
            raise ValueError(f"hosts: got {self.hosts!r} with allow_http={self.allow_http}, name hosts to allow http")
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(f"hosts: got {host!r}, must be a name, *.name or *")
        if not self.ports or any(not 0 < port < 65_536 for port in self.ports):
            raise ValueError(f"ports: got {self.ports!r}, must be numbers from 1 to 65535")
        if not 0 < self.fetch_seconds <= 3_600:
            raise ValueError(f"fetch_seconds: got {self.fetch_seconds!r}, must be above 0, at most 3600")
        if not 0 <= self.redirects <= 3:
            raise ValueError(f"redirects: got {self.redirects!r}, must be from 0 to 3")
        roots = tuple(Path(os.path.realpath(root)) for root in self.roots)
        for given, root in zip(self.roots, roots, strict=True):
            if not root.is_dir() or root == Path(root.anchor):
                raise ValueError(f"roots: got {str(given)!r}, must be a folder, and not the whole disk")
        if roots and not files.SUPPORTED:
            raise ValueError("roots: this system cannot open files without following links, so none can be allowed")
        object.__setattr__(self, "roots", roots)


async def load(url: str, policy: MediaPolicy, network: Network | None = None) -> Image.Image:
    """The picture at a ``data:``, ``http(s):`` or ``file:`` URL: mode RGB, upright, without metadata.

    ``network`` is the world outside (by default this machine's). Raises MediaError. The work is done in threads: the
    event loop goes on.
    """
    limits = policy.limits
    scheme = url[:8].partition(":")[0].lower()
    read: Callable[[], bytes]
    if scheme == "data":
        read = partial(_from_data, url, limits.picture_bytes)
    elif scheme == "file":
        read = partial(files.read_file, url, policy.roots, limits.picture_bytes)
    elif scheme in ("http", "https"):
        if not policy.allow_http:
            raise MediaError(403, "http_not_allowed", "This server does not fetch pictures: send a data URL.")
        rules = Rules(policy.hosts, policy.ports, limits.picture_bytes, policy.fetch_seconds, policy.redirects)
        read = partial(bytes, await fetch(url, rules, network or SystemNetwork()))
    else:
        raise MediaError(400, "invalid_url", "The picture's URL must begin with data:, https:, http: or file:.")
    return await asyncio.get_running_loop().run_in_executor(_DECODERS, lambda: decode(read(), limits))


def _from_data(url: str, max_bytes: int) -> bytes:
    """The bytes of a data URL in base64; its length is checked before it is decoded."""
    comma = url.find(",", 0, _DATA_HEAD)
    match = _DATA.fullmatch(url[5:comma].lower()) if comma >= 0 else None
    if match is None:
        raise MediaError(400, "invalid_url", "The data URL must read data:image/png;base64,... (or another type).")
    if match[1] not in PICTURE_TYPES:
        raise MediaError(400, "unsupported_media_type", "The data URL is not of a PNG, JPEG, WebP, GIF or BMP.")
    if len(url) - comma - 1 > 4 * -(-max_bytes // 3):
        raise too_large(max_bytes)
    try:
        data = binascii.a2b_base64(url[comma + 1 :], strict_mode=True)
    except ValueError as error:
        raise MediaError(400, "invalid_base64", "The data URL is not proper base64.") from error
    if len(data) > max_bytes:
        raise too_large(max_bytes)
    return data


def decode(data: bytes, limits: Limits) -> Image.Image:
    """The picture in a file's bytes: mode RGB, upright, transparent parts on white, without metadata.

    Raises MediaError for another format than PNG, JPEG, WebP, GIF (its first frame) and BMP, for more pixels or a
    longer side than ``limits`` allow, and for what is damaged or cut short.
    """
    if len(data) > limits.picture_bytes:
        raise too_large(limits.picture_bytes)
    container = read_container(data)
    _check_size(container, limits)
    try:
        with Image.open(BytesIO(container.data), formats=(container.format,)) as picture:
            # The decoder's own reading of the header must agree with the one that was checked.
            if picture.size != (container.width, container.height) or picture.format != container.format:
                raise damaged()
            picture.load()
            plain = _rgb(picture)
    except MediaError:
        raise
    except Exception as error:  # decoders raise whatever they stumble over, down to SyntaxError
        raise damaged() from error
    return plain.transpose(_UPRIGHT[container.orientation]) if container.orientation in _UPRIGHT else plain


def digest(image: Image.Image) -> str:
    """A hash of the picture's content: equal for equal pictures, whatever file they came in."""
    shape = f"{image.mode} {image.width} {image.height} ".encode()
    return blake2b(shape + image.tobytes(), digest_size=16).hexdigest()


def _check_size(container: Container, limits: Limits) -> None:
    width, height = container.width, container.height
    if width < 1 or height < 1:
        raise damaged()
    if width * height > limits.picture_pixels or max(width, height) > limits.picture_side:
        raise MediaError(
            413,
            "picture_too_large",
            f"The picture has more than {limits.picture_pixels} pixels, or a side of more than {limits.picture_side}.",
        )
    if max(width, height) > limits.picture_ratio * min(width, height):
        raise MediaError(
            400, "unsupported_picture", f"The picture is more than {limits.picture_ratio} times longer than wide."
        )


def _rgb(picture: Image.Image) -> Image.Image:
    """``picture`` in mode RGB, sharing nothing with its file."""
    if picture.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion makes nearly all of it white
        grey = (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if picture.has_transparency_data:
        # What a viewer shows, not what lies hidden below transparent pixels.
        clear = picture.convert("RGBA")
        plain = Image.new("RGB", picture.size, "white")
        plain.paste(clear, mask=clear.getchannel("A"))
        return plain
    plain = picture.convert("RGB")
    plain.info = {}
    return plain

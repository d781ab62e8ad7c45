"""Reads the header of a picture file before any decoder sees it, and takes out what no decoder needs to see.

The size is known before a pixel is decoded: some decoders take memory for the whole canvas as soon as they open a
file. Metadata (Exif, ICC, XMP, comments, compressed text) and all frames but the first are left out, so that the
parsers of those, where most of the advisories are, never run. Of Exif only the orientation is read, here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from vistok.serve.errors import MediaError

MAX_SCANS = 100
"""Scans of a JPEG. A scan of 100 bytes can make the decoder visit every pixel again; real files have about 10."""

_MAX_WEBP_CHUNKS = 1_000
_PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_BMP_PLAIN = frozenset({0, 3})  # no run lengths: those are decoded byte by byte, and skip over pixels for nothing


@dataclass(frozen=True)
class Container:
    """A picture file that was walked through: ``format`` is Pillow's name, ``width`` and ``height`` are in pixels as
    stored, ``orientation`` is Exif's (1 to 8; 1 is upright), ``data`` is the file with one frame and no metadata."""

    format: str
    width: int
    height: int
    orientation: int
    data: bytes


def read_container(data: bytes) -> Container:
    """The header and the slim file. Raises MediaError for what is not a PNG, JPEG, WebP, GIF or BMP, or is cut short.

    The bytes decide the format; a file's name or declared type does not.
    """
    for start, read in _READERS:
        if data.startswith(start):
            try:
                return read(data)
            except (IndexError, struct.error) as error:
                raise damaged() from error
    raise MediaError(400, "unsupported_picture", "The picture is not a PNG, JPEG, WebP, GIF or BMP.")


def damaged() -> MediaError:
    """The error for a file that is cut short or breaks its format's rules."""
    return MediaError(400, "unreadable_picture", "The picture is damaged or cut short.")


def _png(data: bytes) -> Container:
    kept = [data[:8]]
    position, orientation, size = 8, 1, None
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        # Exactly one header, and first: a second one would change the size after it was checked.
        if end > len(data) or (kind == b"IHDR") != (size is None) or (kind == b"IHDR" and length != 13):
            raise damaged()
        if kind == b"IHDR":
            size = struct.unpack_from(">II", data, position + 8)
        elif kind == b"eXIf":
            orientation = _orientation(data[position + 8 : end - 4])
        if kind in _PNG_CHUNKS:
            kept.append(data[position:end])
        if kind == b"IEND" and size:
            return Container("PNG", size[0], size[1], orientation, b"".join(kept))
        position = end


def _jpeg(data: bytes) -> Container:
    kept = [data[:2]]
    position, orientation, size = 2, 1, None
    while True:
        if data[position] != 0xFF:
            raise damaged()
        while data[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker = data[position + 1]
        if marker in _JPEG_ALONE:
            position += 2
            continue
        end = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        if marker in (0x00, 0xD8, 0xD9) or end < position + 4 or end > len(data):
            raise damaged()
        if marker == 0xDA:
            break
        body = data[position + 4 : end]
        if marker in _JPEG_SIZES:
            if size is not None:
                raise damaged()
            height, width = struct.unpack_from(">HH", body, 1)
            size = (width, height)
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _orientation(body[6:])
        # Of the application segments, these two say how colours are stored.
        colours = (marker == 0xE0 and body.startswith(b"JFIF\0")) or (marker == 0xEE and body.startswith(b"Adobe"))
        if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[position:end])
        position = end
    if size is None:
        raise damaged()
    # Between scans the bytes FF DA are always a new scan: data would have written FF 00.
    if data.count(b"\xff\xda", position) > MAX_SCANS:
        raise MediaError(400, "unsupported_picture", f"The JPEG has more than {MAX_SCANS} scans.")
    kept.append(data[position:])
    return Container("JPEG", size[0], size[1], orientation, b"".join(kept))


def _gif(data: bytes) -> Container:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _palette(flags)
    kept = [data[:position]]
    control = b""
    while data[position] == 0x21:
        end = _blocks_end(data, position + 2)
        if data[position + 1] == 0xF9:
            control = data[position:end]
        position = end
    if data[position] != 0x2C:
        raise damaged()
    left, top, wide, high, flags = struct.unpack_from("<HHHHB", data, position + 1)
    end = _blocks_end(data, position + 10 + _palette(flags) + 1)
    kept += [control, data[position:end], b"\x3b"]
    # Decoders make the canvas larger where the first frame does not fit into it.
    return Container("GIF", max(width, left + wide), max(height, top + high), 1, b"".join(kept))


def _palette(flags: int) -> int:
    """Bytes of the colour table that ``flags`` announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks_end(data: bytes, position: int) -> int:
    """The position after a run of GIF's sub-blocks; IndexError where the data ends before it."""
    while size := data[position]:
        position += size + 1
    return position + 1


def _webp(data: bytes) -> Container:
    if data[8:12] != b"WEBP":
        raise damaged()
    kind = data[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        if len(data) < 30:
            raise damaged()
    elif kind == b"VP8L" and data[20] == 0x2F:
        bits = struct.unpack_from("<I", data, 21)[0]
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise damaged()
    # Pillow hands on a WebP's metadata as bytes without parsing it: nothing has to be taken out.
    return Container("WEBP", width, height, _webp_orientation(data) if kind == b"VP8X" else 1, data)


def _webp_orientation(data: bytes) -> int:
    position = 12
    for _ in range(_MAX_WEBP_CHUNKS):
        if position + 8 > len(data):
            break
        kind, size = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            exif = data[position + 8 : position + 8 + size]
            return _orientation(exif.removeprefix(b"Exif\0\0"))
        position += 8 + size + (size & 1)
    return 1


def _bmp(data: bytes) -> Container:
    header = struct.unpack_from("<I", data, 14)[0]
    if header == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        plain = True
    else:
        width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
        plain = compression in _BMP_PLAIN
    if not plain:
        raise MediaError(400, "unsupported_picture", "The BMP is compressed: only plain ones are read.")
    return Container("BMP", width, abs(height), 1, data)  # a height below 0 says that the top row comes first


def _orientation(exif: bytes) -> int:
    """The orientation in Exif's first directory; 1 where there is none or the data is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        start = struct.unpack_from(f"{order}I", exif, 4)[0]
        count = struct.unpack_from(f"{order}H", exif, start)[0]
        for entry in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


_READERS: tuple[tuple[bytes, Callable[[bytes], Container]], ...] = (
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"\xff\xd8\xff", _jpeg),
    (b"RIFF", _webp),
    (b"GIF87a", _gif),
    (b"GIF89a", _gif),
    (b"BM", _bmp),
)

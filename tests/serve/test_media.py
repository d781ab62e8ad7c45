"""Pictures of strangers: every way in that advisories against servers and image proxies describe is a case here."""

from __future__ import annotations

import asyncio
import binascii
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import time
import zlib
from base64 import b64encode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from tests.serve.outside import PUBLIC, Outside, answer, file, picture, redirect, server
from vistok.serve import files, media
from vistok.serve.addresses import allowed
from vistok.serve.container import read_container
from vistok.serve.errors import MediaError
from vistok.serve.fetch import SystemNetwork, host_allowed, read_url
from vistok.serve.limits import Limits
from vistok.serve.media import MediaPolicy, decode, load

LIMITS = Limits(picture_bytes=200_000, picture_pixels=10_000, picture_side=1_000)
DATA_ONLY = MediaPolicy(limits=LIMITS)
HTTP = MediaPolicy(limits=LIMITS, allow_http=True, hosts=("*",), fetch_seconds=5)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
PNG = file("PNG")
LEAKS = re.compile(r"0x[0-9a-f]{4}|BytesIO|/|\\|object at|\d+\.\d+\.\d+|PIL|Errno", re.IGNORECASE)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"


def refused(url: str, policy: MediaPolicy = DATA_ONLY, outside: Outside | None = None) -> MediaError:
    return error_of(lambda: asyncio.run(load(url, policy, outside or Outside())))


def error_of(call: Callable[[], object]) -> MediaError:
    with pytest.raises(MediaError) as caught:
        call()
    message = caught.value.message.replace("data:image/png;base64,", "").replace("and/or", "")
    assert 400 <= caught.value.status < 500 and caught.value.code
    assert not LEAKS.search(message.replace("WebP", "")), message
    return caught.value


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a decoder is opened: a limit must have spoken before."""

    def opened(*_: object, **__: object) -> None:
        raise SystemError("a decoder was opened")

    monkeypatch.setattr(media.Image, "open", opened)
    with pytest.raises(MediaError) as caught:  # what a test would see
        decode(PNG, LIMITS)
    assert isinstance(caught.value.__cause__, SystemError)


def refused_unopened(data: bytes, code: str) -> None:
    error = error_of(lambda: decode(data, LIMITS))
    assert error.code == code
    assert not isinstance(error.__cause__, SystemError)


# Formats and data URLs


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_are_read(kind: str) -> None:
    data = file(kind, quality=95) if kind == "JPEG" else file(kind, lossless=True) if kind == "WEBP" else file(kind)
    made = asyncio.run(load(data_url(data, f"image/{kind.lower()}"), DATA_ONLY))
    assert (made.mode, made.size, made.info) == ("RGB", (6, 4), {})
    if kind != "JPEG":
        assert np.array_equal(np.asarray(made), np.asarray(picture()))


def test_a_declared_type_does_not_decide_the_format() -> None:
    assert asyncio.run(load(data_url(PNG, "image/jpeg"), DATA_ONLY)).size == (6, 4)


@pytest.mark.parametrize(
    "kind", ["TIFF", "JPEG2000", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF", "ICNS", "SGI", "IM", "DDS"]
)
def test_formats_that_pillow_would_open_are_not_read(kind: str, no_decoder: None) -> None:
    try:
        data = file(kind, picture(16, 16))
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    refused_unopened(data, "unsupported_picture")


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF", b"8BPS\0\1", b"SIMPLE  =  T"],
)
def test_other_bytes_are_not_read(data: bytes, no_decoder: None) -> None:
    refused_unopened(data, "unsupported_picture")


@pytest.mark.parametrize(
    "kind",
    [
        "text/html",
        "image/svg+xml",
        "image/tiff",
        "image/jp2",
        "video/jpeg",
        "application/octet-stream",
        "image/png\n",
        "",
    ],
)
def test_data_urls_of_other_types(kind: str) -> None:
    assert refused(data_url(PNG, kind)).code in ("unsupported_media_type", "invalid_url")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64", "invalid_url"),
        ("data:image/png,AAAA", "invalid_url"),
        ("data:,", "invalid_url"),
        ("data:image/png;base64,", "unsupported_picture"),
        ("data:image/png;base64,A", "invalid_base64"),
        ("data:image/png;base64,AAAA\n", "invalid_base64"),
        ("data:image/png;base64,AA-_", "invalid_base64"),
        ("data:image/png;base64,AAA=AAAA", "invalid_base64"),
        ("data:image/png;base64,AA=A", "invalid_base64"),
        ("data:image/png;base64,%41%41", "invalid_base64"),
        ("data:image/png;base64,\u0410AAA", "invalid_base64"),
        ("data:image/png;base64,\ud800", "invalid_base64"),
        ("data:image/png;base64,AAAA,AAAA,AAAA", "invalid_base64"),  # frames of a made-up video
        (f"data:image/png;{'x' * 200};base64,AAAA", "invalid_url"),
        ("", "invalid_url"),
        ("ftp://example.com/a.png", "invalid_url"),
        ("gopher://127.0.0.1:6379/_INFO", "invalid_url"),
        ("javascript:alert(1)", "invalid_url"),
        ("/etc/passwd", "invalid_url"),
        ("\\\\host\\share", "invalid_url"),
        (" data:image/png;base64,AAAA", "invalid_url"),
    ],
)
def test_urls_that_are_not_read(url: str, code: str) -> None:
    assert refused(url).code == code


def test_base64_is_measured_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object, **__: object) -> bytes:
        raise SystemError("decoded")

    monkeypatch.setattr(media.binascii, "a2b_base64", decoded)
    most = 4 * -(-LIMITS.picture_bytes // 3)
    assert refused("data:image/png;base64," + "A" * (most + 1)).status == 413
    with pytest.raises(SystemError):  # one less is decoded
        asyncio.run(load("data:image/png;base64," + "A" * most, DATA_ONLY))


def test_decoded_bytes_are_measured_too() -> None:
    assert refused(data_url(b"\0" * (LIMITS.picture_bytes + 1))).status == 413
    assert binascii.a2b_base64(b64encode(b"\0" * LIMITS.picture_bytes)) == b"\0" * LIMITS.picture_bytes


# Bombs: the size is known before a decoder is opened


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def gif(screen: tuple[int, int], frame: tuple[int, int], before: bytes = b"", after: bytes = b"") -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + before + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0" + after + b";"


def vp8x(width: int, height: int) -> bytes:
    body = b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + 8 + len(body)) + b"WEBPVP8X" + struct.pack("<I", len(body)) + body


def bmp(width: int, height: int, compression: int = 0, data: bytes = b"", bits: int = 8) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 2, 0)
    return b"BM" + struct.pack("<IHHI", 62 + len(data), 0, 0, 62) + head + bytes(8) + data


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(file("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png(50_000, 50_000, chunk(b"IDAT", zlib.compress(bytes(100_000)))),
        png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", b"")),
        jpeg(65_500, 65_500),
        vp8x(2**24, 2**24),
        vp8x(16_384, 16_384),
        b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f\xff\xff\xff\xff",
        b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f",
        gif((65_535, 65_535), (1, 1)),
        gif((1, 1), (65_535, 65_535)),
        gif((1, 1), (65_535, 65_535), before=b"\x21\xf9\x04\x08\0\0\0\0"),  # disposal would fill it when it is opened
        bmp(30_000, 30_000),
        bmp(30_000, -30_000),
        png(10_001, 1),
        png(101, 100),
    ],
)
def test_bombs(data: bytes, no_decoder: None) -> None:
    refused_unopened(data, "picture_too_large")


@pytest.mark.parametrize(
    "data",
    [png(0, 5), png(5, 0), jpeg(0, 5), jpeg(5, 0), bmp(0, 5), bmp(-5, 5), b"BM" + bytes(24), b"RIFF\0\0\0\0WAVEfmt "],
)
def test_sizes_that_are_none(data: bytes, no_decoder: None) -> None:
    refused_unopened(data, "unreadable_picture")


def test_run_lengths_of_a_bmp_are_not_decoded(no_decoder: None) -> None:
    refused_unopened(bmp(100, 100, 1, b"\0\2\xff\xff" * 20), "unsupported_picture")
    refused_unopened(bmp(100, 100, 2, b"\0\2\xff\xff" * 20, bits=4), "unsupported_picture")


def test_pictures_like_threads_are_refused(no_decoder: None) -> None:
    refused_unopened(png(201, 1), "unsupported_picture")
    refused_unopened(png(1, 201), "unsupported_picture")


def test_the_bounds_themselves_are_read() -> None:
    assert decode(file("PNG", picture(100, 100)), LIMITS).size == (100, 100)
    assert decode(file("PNG", picture(200, 2)), LIMITS).size == (200, 2)


def test_the_bytes_of_a_picture_are_measured(no_decoder: None) -> None:
    refused_unopened(PNG + bytes(LIMITS.picture_bytes), "picture_too_large")


def test_pillows_own_limit_is_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert error_of(lambda: decode(png(50_000, 50_000), LIMITS)).code == "picture_too_large"


def test_scans_of_a_jpeg_are_counted(no_decoder: None) -> None:
    data = file("JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert read_container(data).format == "JPEG"
    refused_unopened(data[:-2] + scan * 100 + b"\xff\xd9", "unsupported_picture")


# What decoders need not see


def test_text_and_profiles_of_a_png_never_reach_the_decoder() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 1_000, zip=True)
    text.add_itxt("Other", "y" * 1_000, zip=True)
    data = file("PNG", pnginfo=text, icc_profile=b"profile" * 50, exif=b"Exif\0\0" + exif_bytes(1))
    assert all(kind in data for kind in (b"zTXt", b"iTXt", b"iCCP", b"eXIf"))
    slim = read_container(data).data
    assert not any(kind in slim for kind in (b"zTXt", b"iTXt", b"iCCP", b"eXIf"))
    assert np.array_equal(np.asarray(decode(data, LIMITS)), np.asarray(picture()))


def test_a_png_has_one_header(no_decoder: None) -> None:
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0))
    refused_unopened(png(5, 5, second), "unreadable_picture")
    refused_unopened(b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"a\0b") + png(5, 5)[8:], "unreadable_picture")


def test_only_the_first_picture_of_an_animated_png() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "green")]
    data = file("PNG", frames[0], save_all=True, append_images=frames[1:])
    assert b"fdAT" in data and b"fdAT" not in read_container(data).data
    assert decode(data, LIMITS).getpixel((3, 2)) == (255, 0, 0)


def exif_bytes(orientation: int, order: str = "<") -> bytes:
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_upright(kind: str, orientation: int) -> None:
    order = "<" if orientation % 2 else ">"
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    data = file(kind, picture(16, 8), exif=b"Exif\0\0" + exif_bytes(orientation, order), **options)
    with Image.open(BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened.convert("RGB"))
    assert np.array_equal(np.asarray(decode(data, LIMITS)), np.asarray(upright))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0" + struct.pack("<IH", 8, 65_535),  # a directory that is not there
        b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 99, 0, 0),
        b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x8769, 4, 1, 8),  # a directory that is its own child
        b"Exif\0\0" * 2_000,
    ],
)
def test_broken_exif_is_as_none(exif: bytes) -> None:
    data = file("JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    assert np.array_equal(np.asarray(decode(data[:2] + segment + data[2:], LIMITS)), np.asarray(decode(data, LIMITS)))


def test_segments_of_a_jpeg_never_reach_the_decoder() -> None:
    data = file("JPEG", icc_profile=b"profile" * 20_000, comment=b"comment", exif=exif_bytes(1))
    second = b"\xff\xe2" + struct.pack(">H", 8) + b"MPF\0xx"  # more pictures in the file
    data = data[:2] + second + data[2:]
    slim = read_container(data).data
    assert not any(mark in slim for mark in (b"profile", b"comment", b"Exif", b"MPF"))
    assert np.array_equal(np.asarray(decode(data, LIMITS)), np.asarray(decode(file("JPEG"), LIMITS)))


def test_colours_of_a_jpeg_for_print_stay() -> None:
    made = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    with Image.open(BytesIO(file("JPEG", made))) as opened:
        assert np.array_equal(np.asarray(decode(file("JPEG", made), LIMITS)), np.asarray(opened.convert("RGB")))


def test_a_jpeg_has_one_size(no_decoder: None) -> None:
    data = file("JPEG")
    at = data.index(b"\xff\xc0")
    segment = data[at : at + 19]
    refused_unopened(data[:at] + segment + data[at:], "unreadable_picture")


def test_only_the_first_frame_of_a_gif_and_no_comments() -> None:
    frames = [Image.new("RGB", (6, 4), (i % 256, 0, 99)) for i in range(300)]
    data = file("GIF", frames[0], save_all=True, append_images=frames[1:], comment=b"comment" * 1_000)
    slim = read_container(data).data
    assert len(slim) < 1_000 and b"comment" not in slim
    with Image.open(BytesIO(slim)) as opened:
        assert opened.n_frames == 1  # type: ignore[attr-defined]
    assert decode(data, LIMITS).getpixel((3, 2)) == (0, 0, 99)


def test_frames_of_a_webp_are_not_decoded() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "green")]
    data = file("WEBP", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data, LIMITS).getpixel((3, 2)) == (255, 0, 0)


def test_many_small_blocks_cost_no_time() -> None:
    comment = b"\x21\xfe" + b"\x01x" * 90_000 + b"\0"
    started = time.process_time()
    read_container(gif((1, 1), (1, 1), before=comment))
    read_container(png(1, 1, chunk(b"IDAT", b"") * 15_000))
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("kind", FORMATS)
def test_files_that_are_cut_short(kind: str) -> None:
    data = file(kind, picture(30, 20))
    for length in sorted({*range(0, len(data) - 3, max(1, len(data) // 40)), len(data) // 2, 30}):
        error = error_of(lambda length=length: decode(data[:length], LIMITS))  # type: ignore[misc]
        assert error.code in ("unreadable_picture", "unsupported_picture")


@pytest.mark.parametrize(
    "data", [PNG[:-30] + PNG[-12:], PNG[:50] + b"\0" + PNG[51:], file("JPEG")[:-200], b"\xff\xd8\xff" * 9]
)
def test_errors_of_decoders_are_not_passed_on(data: bytes) -> None:
    assert error_of(lambda: decode(data, LIMITS)).message == "The picture is damaged or cut short."


def test_two_readings_of_a_header_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        size, format = (7, 4), "PNG"

        def __enter__(self) -> Other:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(media.Image, "open", lambda *_, **__: Other())
    error = error_of(lambda: decode(PNG, LIMITS))
    assert error.code == "unreadable_picture" and error.__cause__ is None


def test_transparent_parts_are_white_and_hide_nothing() -> None:
    made = Image.new("RGBA", (6, 4), (200, 30, 40, 0))
    made.putpixel((1, 1), (10, 20, 30, 255))
    for kind in ("PNG", "WEBP"):
        got = decode(file(kind, made, lossless=True, exact=True), LIMITS)
        assert (got.getpixel((0, 0)), got.getpixel((1, 1))) == ((255, 255, 255), (10, 20, 30))


def test_grey_of_16_bits_keeps_its_steps() -> None:
    steps = np.array([[0, 256, 32_768, 65_535]], np.uint16)
    assert np.asarray(decode(file("PNG", Image.fromarray(steps)), LIMITS))[0, :, 0].tolist() == [0, 1, 128, 255]


# Which addresses, names and URLs


FORBIDDEN = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.1.2.3",
    "127.255.255.255",
    "168.63.129.16",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "::ffff:93.184.216.34",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::7f00:1",
    "64:ff9b:1::5db8:d822",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::",
    "2002:5db8:d822::",
    "3ffe::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "fe80::a9fe:a9fe",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "2606:4700::5efe:7f00:1",
    "2606:4700::200:5efe:a00:1",
    "4000::1",
]
PUBLIC_ADDRESSES = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.216.34",
    "100.63.255.255",
    "100.128.0.1",
    "126.255.255.255",
    "128.0.0.1",
    "169.253.1.1",
    "169.255.1.1",
    "172.15.255.255",
    "172.32.0.1",
    "192.1.0.1",
    "192.167.1.1",
    "192.169.1.1",
    "198.17.1.1",
    "198.20.1.1",
    "223.255.255.255",
    "2606:4700:4700::1111",
    "2001:4860:4860::8888",
    "2a00:1450:4001::1",
    "64:ff9b::8.8.8.8",
]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_forbidden_addresses(address: str) -> None:
    assert not allowed(address)
    literal = f"[{address}]" if ":" in address else address
    outside = Outside({"inside.example": [[address]], "mixed.example": [[PUBLIC, address]]})
    for host in (literal, "inside.example", "mixed.example"):
        assert refused(f"http://{host}/a.png", HTTP, outside).code in ("fetch_failed", "invalid_url")
    assert outside.connects == []
    assert outside.lookups == ["inside.example", "mixed.example"]


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses(address: str) -> None:
    assert allowed(address)
    outside = Outside()
    refused(f"http://[{address}]/" if ":" in address else f"http://{address}/", HTTP, outside)
    assert outside.connects != [] and outside.lookups == []


@pytest.mark.parametrize(
    "text", ["", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "1.1.1.1/32", " 1.1.1.1"]
)
def test_what_is_no_address_is_forbidden(text: str) -> None:
    assert not allowed(text)


BAD_URLS = [
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://127.1/",
    "http://127.0.1/",
    "http://0/",
    "http://0x/",
    "http://1.1.1.1.1/",
    "http://256.1.1.1/",
    "http://127.0.0.1.0x1/",
    "http://example.com./",
    "http://.example.com/",
    "http://a..b/",
    "http:///a",
    "http://",
    "http:/example.com/",
    "http:example.com",
    "http://user@example.com/",
    "http://user:password@example.com/",
    "http://example.com@127.0.0.1/",
    "http://127.0.0.1\\@example.com/",
    "http://example.com\\@127.0.0.1/",
    "http://example.com\\.evil.example/",
    "http://example.com#@127.0.0.1/\\",
    "http:\\\\example.com/",
    "http://example.com:80@127.0.0.1/",
    "http://example.com:80:22/",
    "http://example.com:/",
    "http://example.com:99999999/",
    "http://example.com:-1/",
    "http://example.com:\u0661/",
    "http://exam%70le.com/",
    "http://127.0.0.1%00.example.com/",
    "http://example.com%2f@127.0.0.1/",
    "http://ex ample.com/",
    "http://example.com/a b",
    "http://example.com/\r\nHost: inside",
    "http://example.com/\tx",
    "http://exa\nmple.com/",
    "http://example.com/\x00",
    "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/",
    "http://ex\u00e4mple.com/",
    "http://example\u3002com/",
    "http://\u202eexample.com/",
    "http://[::1/",
    "http://::1/",
    "http://[::1]x/",
    "http://[fe80::1%25eth0]/",
    "http://[::ffff:127.0.0.1.1]/",
    "http://[12345::]/",
    "http://[127.0.0.1]/",
    "http://[v1.x]/",
    "http://" + "a" * 64 + ".com/",
    "http://example.com/" + "a" * 5_000,
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_urls_that_programs_read_differently(url: str) -> None:
    outside = Outside({"example.com": [[PUBLIC]]})
    assert refused(url, HTTP, outside).code == "invalid_url"
    assert outside.lookups == outside.connects == []


def test_a_url_is_read_once() -> None:
    place = read_url("HTTPS://Images.Example.COM:8443?a=b@c#@127.0.0.1/")
    assert (place.scheme, place.host, place.port, place.target) == ("https", "images.example.com", 8443, "/?a=b@c")
    assert read_url("http://[2606:4700:0::1]/").url() == "http://[2606:4700::1]:80/"
    assert read_url("http://xn--exmple-cua.com").host == "xn--exmple-cua.com"


def test_hosts_that_are_allowed() -> None:
    hosts = ("a.example", "*.b.example", "Upper.example")
    good = ("a.example", "x.b.example", "x.y.b.example", "upper.example")
    bad = ("b.example", "x.a.example", "xb.example", "ba.example", "a.example.evil.example", "example", ".b.example")
    assert all(host_allowed(host, hosts) for host in good)
    assert not any(host_allowed(host, hosts) for host in bad)
    assert host_allowed("anything.example", ("*",)) and not host_allowed("a.example", ())


def test_nothing_is_fetched_unless_it_is_allowed() -> None:
    outside = Outside({"a.example": [[PUBLIC]], "b.example": [[PUBLIC]]})
    one = MediaPolicy(allow_http=True, hosts=("a.example",))
    assert refused("http://a.example/", DATA_ONLY, outside).code == "http_not_allowed"
    assert refused("http://b.example/", one, outside).code == "host_not_allowed"
    assert refused("http://a.example:22/", one, outside).code == "host_not_allowed"
    assert refused("http://a.example:0/", one, outside).code == "host_not_allowed"
    assert outside.lookups == outside.connects == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"allow_http": True},
        {"hosts": ("a.example",)},
        {"allow_http": True, "hosts": ("https://a.example",)},
        {"allow_http": True, "hosts": ("a.example/",)},
        {"allow_http": True, "hosts": ("",)},
        {"allow_http": True, "hosts": ("a.*.example",)},
        {"ports": ()},
        {"ports": (0,)},
        {"fetch_seconds": 0},
        {"fetch_seconds": float("nan")},
        {"redirects": 4},
        {"redirects": -1},
        {"roots": (Path("/"),)},
        {"roots": (Path("/no/such/folder"),)},
    ],
)
def test_policies_that_cannot_be_meant(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|name hosts"):
        MediaPolicy(**wrong)  # type: ignore[arg-type]


# Fetching


def run_fetch(
    url: str,
    *answers: object,
    names: dict[str, list[list[str]]] | None = None,
    policy: MediaPolicy = HTTP,
    tls: ssl.SSLContext | None = None,
    trust: ssl.SSLContext | None = None,
) -> tuple[Image.Image | MediaError, Outside, list[bytes]]:
    """Loads ``url`` while a server stands at the public address; what came of it, what was asked for, what it got."""
    outside = Outside(names or {"a.example": [[PUBLIC]]})
    if trust:
        outside.context = trust

    async def go() -> tuple[Image.Image | MediaError, list[bytes]]:
        async with server(*answers, tls=tls) as (port, got):  # type: ignore[arg-type]
            outside.servers[PUBLIC] = port
            try:
                return await load(url, policy, outside), got
            except MediaError as error:
                return error, got

    result, got = asyncio.run(go())
    if isinstance(result, MediaError):
        assert not LEAKS.search(result.message.replace("WebP", "")), result.message
    return result, outside, got


def test_a_picture_is_fetched() -> None:
    result, outside, got = run_fetch("http://a.example/x.png?y=1#z", answer(PNG))
    assert isinstance(result, Image.Image) and np.array_equal(np.asarray(result), np.asarray(picture()))
    assert (outside.lookups, outside.connects) == (["a.example"], [(PUBLIC, 80)])
    assert got[0].startswith(b"GET /x.png?y=1 HTTP/1.1\r\nHost: a.example\r\n")
    assert b"Accept-Encoding: identity\r\n" in got[0]


def test_the_port_is_in_the_host_header() -> None:
    policy = MediaPolicy(limits=LIMITS, allow_http=True, hosts=("a.example",), ports=(8080,))
    _, outside, got = run_fetch("http://a.example:8080/", answer(PNG), policy=policy)
    assert b"\r\nHost: a.example:8080\r\n" in got[0] and outside.connects == [(PUBLIC, 8080)]


def test_a_name_is_resolved_once_and_the_judged_address_is_used() -> None:
    names = {"a.example": [[PUBLIC], ["127.0.0.1"]]}  # public when it is looked at, loopback a moment later
    result, outside, _ = run_fetch("http://a.example/", answer(PNG), names=names)
    assert isinstance(result, Image.Image)
    assert (outside.lookups, outside.connects) == (["a.example"], [(PUBLIC, 80)])


def test_the_next_address_is_tried() -> None:
    result, outside, _ = run_fetch("http://a.example/", answer(PNG), names={"a.example": [["1.1.1.1", PUBLIC]]})
    assert isinstance(result, Image.Image) and outside.connects == [("1.1.1.1", 80), (PUBLIC, 80)]


def test_not_all_of_very_many_addresses_are_tried() -> None:
    names = {"a.example": [[f"1.1.1.{i}" for i in range(250)]]}
    _, outside, _ = run_fetch("http://a.example/", answer(PNG), names=names)
    assert len(outside.connects) == 4


def test_redirects_are_followed() -> None:
    names = {"a.example": [[PUBLIC]], "b.example": [[PUBLIC]]}
    steps = (redirect("/other"), redirect("//b.example/x", 307), redirect("http://a.example/y?z", 308), answer(PNG))
    result, outside, got = run_fetch("http://a.example/", *steps, names=names)
    assert isinstance(result, Image.Image)
    assert [head.split(b" ")[1] for head in got] == [b"/", b"/other", b"/x", b"/y?z"]
    assert outside.lookups == ["a.example", "a.example", "b.example", "a.example"]


def test_a_fourth_redirect_is_not_followed() -> None:
    result, _, got = run_fetch("http://a.example/", redirect("/again"))
    assert isinstance(result, MediaError) and result.code == "redirect_not_allowed" and len(got) == 4
    result, _, got = run_fetch(
        "http://a.example/", redirect("/again"), policy=MediaPolicy(allow_http=True, hosts=("*",), redirects=0)
    )
    assert isinstance(result, MediaError) and len(got) == 1


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:80/",
        "http://[::1]/",
        "http://[::ffff:169.254.169.254]/",
        "//10.0.0.1/",
        "http://inside.example/",
        "http://a.example:22/",
        "http://a.example\\@127.0.0.1/",
        "http://user@a.example/",
        "http://2130706433/",
        "file:///etc/passwd",
        "data:image/png;base64," + b64encode(PNG).decode(),
        "gopher://127.0.0.1:6379/_INFO",
        "ftp://a.example/",
        "http://a.example/" + "x" * 5_000,
        "http://\u00e4.example/",
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_checked_like_any_url(location: str, status: int) -> None:
    names = {"a.example": [[PUBLIC]], "inside.example": [["192.168.0.1"]]}
    result, outside, got = run_fetch("http://a.example/", redirect(location, status), answer(PNG), names=names)
    assert isinstance(result, MediaError)
    assert outside.connects == [(PUBLIC, 80)] and len(got) == 1


def test_redirects_stay_on_the_list() -> None:
    policy = MediaPolicy(allow_http=True, hosts=("a.example",))
    names = {"a.example": [[PUBLIC]], "b.example": [[PUBLIC]]}
    result, outside, _ = run_fetch(
        "http://a.example/", redirect("http://b.example/"), answer(PNG), names=names, policy=policy
    )
    assert isinstance(result, MediaError) and result.code == "host_not_allowed" and outside.lookups == ["a.example"]


def test_a_redirect_to_the_same_name_is_judged_again() -> None:
    names = {"a.example": [[PUBLIC], ["127.0.0.1"]]}
    result, outside, _ = run_fetch("http://a.example/", redirect("/again"), answer(PNG), names=names)
    assert isinstance(result, MediaError) and outside.connects == [(PUBLIC, 80)]


def test_the_errors_draw_no_map_of_the_network() -> None:
    names = {"inside.example": [["10.0.0.1"]], "empty.example": [["1.1.1.1"]], "nothing.example": [[]]}
    hosts = ("inside.example", "empty.example", "nothing.example", "unknown.example", "10.0.0.1", "x" * 63 + ".com")
    errors = {refused(f"http://{host}/", HTTP, Outside(names)).message for host in hosts}
    assert errors == {"The picture could not be fetched."}


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (answer(PNG, kind="text/html"), "unsupported_media_type"),
        (answer(PNG, kind="image/svg+xml"), "unsupported_media_type"),
        (answer(PNG, kind="application/json"), "unsupported_media_type"),
        (answer(PNG, kind=""), "unsupported_media_type"),
        (answer(b"<html>", kind="image/png"), "unsupported_picture"),
        (answer(zlib.compress(bytes(10**6)), more="Content-Encoding: gzip\r\n"), "unsupported_media_type"),
        (answer(PNG, more="Content-Encoding: br\r\n"), "unsupported_media_type"),
        (answer(PNG, status="404 Not Found"), "fetch_failed"),
        (answer(PNG, status="206 Partial Content"), "fetch_failed"),
        (answer(PNG, status="401 Unauthorized", more="WWW-Authenticate: Basic\r\n"), "fetch_failed"),
        (answer(PNG)[:-5], "fetch_failed"),
        (answer(PNG, more="Content-Length: 1\r\n"), "fetch_failed"),
        (answer(PNG, more="X: " + "y" * 300_000 + "\r\n"), "fetch_failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: -1\r\n\r\n", "fetch_failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 99999999999\r\n\r\n", "picture_too_large"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "fetch_failed"),
        (b"", "fetch_failed"),
        (redirect(""), "redirect_not_allowed"),
    ],
)
def test_answers_that_are_not_read(raw: bytes, code: str) -> None:
    result, _, _ = run_fetch("http://a.example/", raw)
    assert isinstance(result, MediaError) and result.code == code


@pytest.mark.parametrize("kind", ["image/png; charset=x", "IMAGE/PNG", "application/octet-stream", "image/jpeg"])
def test_types_of_answers_that_are_read(kind: str) -> None:
    assert isinstance(run_fetch("http://a.example/", answer(PNG, kind=kind))[0], Image.Image)


def test_a_body_without_an_end_is_cut() -> None:
    sent = 0

    async def endless(_: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sent < 2**28:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()
            sent += 0x10000

    result, _, _ = run_fetch("http://a.example/", endless)
    assert isinstance(result, MediaError) and result.code == "picture_too_large"
    assert sent < 2**25  # the limit, and what sockets and streams hold on the way


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"])
def test_drops_of_an_answer_do_not_hold_the_server(start: bytes) -> None:
    async def slow(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        for _ in range(100):
            writer.write(b"X: y\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    policy = MediaPolicy(allow_http=True, hosts=("*",), fetch_seconds=0.3)
    started = time.monotonic()
    result, _, _ = run_fetch("http://a.example/", slow, policy=policy)
    assert isinstance(result, MediaError) and result.code == "fetch_failed"
    assert time.monotonic() - started < 3.0


def test_proxies_and_passwords_of_the_environment_play_no_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.setblocking(False)
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        (tmp_path / ".netrc").write_text("machine a.example login me password secret\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
        result, _, got = run_fetch("http://a.example/", answer(PNG, more="Set-Cookie: a=b\r\n"))
        assert isinstance(result, Image.Image)
        assert b"authorization" not in got[0].lower() and b"cookie" not in got[0].lower()
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_the_system_network_is_the_same_code() -> None:
    """The real resolver, on a name of this machine: found, judged, refused."""
    assert asyncio.run(SystemNetwork().resolve("localhost", 80))
    for url in ("http://localhost/", "http://localhost:80/", "http://127.0.0.1/", "http://[::1]/"):
        assert refused_by_system(url).code == "fetch_failed"


def refused_by_system(url: str) -> MediaError:
    return error_of(lambda: asyncio.run(load(url, HTTP)))


def test_the_systems_certificates_and_names_are_checked() -> None:
    context = SystemNetwork().ssl_context()
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for a.example and its key, in one file."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "both.pem", "-days", "2", "-subj", "/CN=a.example"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:a.example"], cwd=folder, check=True, capture_output=True)
    with open(folder / "both.pem", "a") as both:
        both.write((folder / "key.pem").read_text())
    return folder / "both.pem"


def test_tls_is_for_the_name_and_not_for_the_address(certificate: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    asked: list[str | None] = []
    tls.sni_callback = lambda _, name, __: asked.append(name)
    trust = ssl.create_default_context(cafile=str(certificate))
    names = {"a.example": [[PUBLIC]], "b.example": [[PUBLIC]]}
    result, outside, got = run_fetch("https://a.example/", answer(PNG), names=names, tls=tls, trust=trust)
    assert isinstance(result, Image.Image) and asked == ["a.example"] and outside.connects == [(PUBLIC, 443)]
    assert b"\r\nHost: a.example\r\n" in got[0]
    other, _, got = run_fetch("https://b.example/", answer(PNG), names=names, tls=tls, trust=trust)
    assert isinstance(other, MediaError) and got == []  # the certificate is of another name
    untrusted, _, got = run_fetch("https://a.example/", answer(PNG), names=names, tls=tls)
    assert isinstance(untrusted, MediaError) and got == []
    down, outside, _ = run_fetch("https://a.example/", redirect("http://a.example/"), names=names, tls=tls, trust=trust)
    assert isinstance(down, MediaError) and down.code == "redirect_not_allowed" and len(outside.connects) == 1


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "open" / "inner").mkdir(parents=True)
    (tmp_path / "open" / "inner" / "a b.png").write_bytes(PNG)
    (tmp_path / "open" / "big.png").write_bytes(PNG + bytes(LIMITS.picture_bytes))
    (tmp_path / "openness").mkdir()
    (tmp_path / "openness" / "secret.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "open" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "open" / "up").symlink_to(tmp_path)
    (tmp_path / "open" / "in.png").symlink_to("inner/a b.png")
    (tmp_path / "open" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "open" / "pipe")
    return tmp_path


def test_files_under_a_root(folder: Path) -> None:
    policy = MediaPolicy(limits=LIMITS, roots=(folder / "open",))
    for url in (f"file://{folder}/open/inner/a%20b.png", f"file://localhost{folder}/open/in.png"):
        assert np.array_equal(np.asarray(asyncio.run(load(url, policy))), np.asarray(picture()))


@pytest.mark.parametrize(
    "name",
    [
        "secret.png",
        "openness/secret.png",
        "open/../secret.png",
        "open/%2e%2e/secret.png",
        "open/inner/..%2f..%2fsecret.png",
        "open/out.png",
        "open/up/secret.png",
        "open/loop",
        "open/pipe",
        "open/inner",
        "open",
        "open/",
        "open/none.png",
        "open/in.png%00.png",
        "open/%ff.png",
        "open/" + "a/" * 1_500 + "x",
    ],
)
def test_other_files_are_refused_all_alike(folder: Path, name: str) -> None:
    policy = MediaPolicy(limits=LIMITS, roots=(folder / "open",))
    error = refused(f"file://{folder}/{name}", policy)
    assert error.message == "The file is not one that this server reads." and error.status == 403


def test_files_are_measured_before_they_are_read(folder: Path) -> None:
    assert refused(f"file://{folder}/open/big.png", MediaPolicy(limits=LIMITS, roots=(folder / "open",))).status == 413


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file:/etc/passwd",
        "file:etc",
        "file://host/etc/passwd",
        "file:///dev/zero",
        "FILE:///etc/shadow",
    ],
)
def test_no_file_without_a_root(url: str, folder: Path) -> None:
    assert refused(url).code in ("files_not_allowed", "invalid_url")
    assert refused(url, MediaPolicy(roots=(folder / "open",))).code in ("file_not_allowed", "invalid_url")


@pytest.mark.parametrize("name", ["out.png", "up/secret.png"])
def test_a_link_that_was_put_there_after_the_check_is_not_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = Path(os.path.realpath(folder / "open"))
    policy = MediaPolicy(limits=LIMITS, roots=(root,))
    monkeypatch.setattr(files.os.path, "realpath", lambda path: str(path))  # what the check saw before the swap
    assert refused(f"file://{root}/{name}", policy).code == "file_not_allowed"


def test_what_is_outside_is_not_even_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = MediaPolicy(limits=LIMITS, roots=(folder / "open",))

    def looked(_: object) -> str:
        raise AssertionError("looked at")

    monkeypatch.setattr(files.os.path, "realpath", looked)
    assert refused(f"file://{folder}/secret.png", policy).code == "file_not_allowed"

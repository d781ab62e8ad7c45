"""12,000 cases of hostile URLs, answers, pictures and requests: refused properly, in little memory, never inside."""

from __future__ import annotations

import ipaddress
import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.serve.hostile import MOST_KIB, Guarded
from tests.serve.outside import answer, file, picture, redirect
from tests.serve.test_media import BAD_URLS, FORBIDDEN, PUBLIC_ADDRESSES, bmp, gif, png, vp8x
from vistok.serve.schema import ChatRequest

QUIET = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    with Guarded(tmp_path) as process:
        yield process


V4 = st.ip_addresses(v=4).map(str)
ADDRESSES = st.one_of(
    st.sampled_from(FORBIDDEN),
    st.sampled_from(PUBLIC_ADDRESSES),
    V4,
    st.ip_addresses(v=6).map(str),
    st.builds("{}{}".format, st.sampled_from(["::ffff:", "64:ff9b::", "::", "64:ff9b:1::"]), V4),
    st.integers(0, 2**112 - 1).map(lambda low: str(ipaddress.IPv6Address((0x2002 << 112) | low))),
    st.integers(0, 2**96 - 1).map(lambda low: str(ipaddress.IPv6Address((0x20010000 << 96) | low))),
)
PUBLIC = st.lists(st.sampled_from(PUBLIC_ADDRESSES), min_size=1, max_size=2)
HOSTS = st.one_of(
    st.just("a.example"),
    st.sampled_from(PUBLIC_ADDRESSES[:5]),
    st.sampled_from(["localhost", "A.Example", "metadata", "2130706433", "0x7f.1", "127.1"]),
    ADDRESSES.map(lambda address: f"[{address}]" if ":" in address else address),
    ADDRESSES,
    st.text("abc.-_0123456789xX%@:[]\\", min_size=1, max_size=20),
)
PLAIN = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(
        [*["http://", "https://"] * 5, "HTTP://", "http:/", "http:\\\\", "//", "", "file://", "ftp://", "data:"]
    ),
    st.sampled_from([*[""] * 12, "user@", "a.example@", "a.example:80@", "1.1.1.1\\@", "%40"]),
    HOSTS,
    st.sampled_from([*[""] * 8, ":80", ":443", ":22", ":0", ":", ":080", ":99999"]),
    st.sampled_from(["", "/", "/a.png", "?x", "#x", "/../..", "/%2e%2e/etc/passwd", "\\x", "/a b", "/\r\nHost: x"]),
)


@st.composite
def spoiled(draw: st.DrawFn) -> str:
    """A URL with a character put into it or taken out."""
    url = draw(st.one_of(PLAIN, st.sampled_from(BAD_URLS)))
    at = draw(st.integers(0, len(url)))
    return url[:at] + draw(st.text(max_size=2)) + url[at + draw(st.integers(0, 1)) :]


FINE = st.builds("{}://a.example/{}".format, st.sampled_from(["http", "https"]), st.integers())
URLS = st.one_of(FINE, FINE, PLAIN, PLAIN, spoiled(), st.text(max_size=40))
ANSWERS = st.one_of(
    st.just(answer(file("PNG"))),
    st.just(answer(file("WEBP"), kind="image/webp")),
    URLS.map(lambda url: redirect(url.encode("utf-8", "replace").decode("latin-1")[:200].replace("\n", ""))),
    FINE.map(redirect),
    HOSTS.map(lambda host: redirect(f"http://{host}/")),
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda noise: answer(file("GIF"))[:-40] + noise),
    st.binary(max_size=60).map(lambda noise: b"HTTP/1.1 200 OK\r\n" + noise + b"\r\n\r\n" + noise),
)


def test_urls_and_answers(guarded: Guarded) -> None:
    read: list[bool] = []

    @settings(max_examples=3_000, **QUIET)
    @given(
        URLS,
        st.lists(st.one_of(PUBLIC, PUBLIC, st.lists(ADDRESSES, max_size=2)), min_size=1, max_size=3),
        st.lists(ANSWERS, min_size=1, max_size=5),
    )
    def case(url: str, names: list[list[str]], answers: list[bytes]) -> None:
        read.append(guarded("load", url, names, answers))

    case()
    # The cases do reach the end, and do not only do that.
    assert read.count(True) > 20 and read.count(False) > 1_000


ANIMATION = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "green")]
SEEDS = [
    file("PNG", picture(20, 10)),
    file("PNG", picture(20, 10).convert("P"), icc_profile=b"x" * 90),
    file("PNG", picture(20, 10).convert("1")),
    file("PNG", ANIMATION[0], save_all=True, append_images=ANIMATION[1:]),
    file("JPEG", picture(20, 10)),
    file(
        "JPEG", picture(20, 10), progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0"
    ),
    file("JPEG", picture(20, 10).convert("CMYK")),
    file("WEBP", picture(20, 10)),
    file("WEBP", picture(20, 10), lossless=True, exif=b"II*\0"),
    file("WEBP", ANIMATION[0], save_all=True, append_images=ANIMATION[1:]),
    file("GIF", picture(20, 10)),
    file("GIF", ANIMATION[0], save_all=True, append_images=ANIMATION[1:], disposal=2),
    file("BMP", picture(20, 10)),
    file("BMP", picture(20, 10).convert("P")),
    png(20, 10),
    gif((9, 9), (20, 20), before=b"\x21\xf9\x04\x08\0\0\0\0"),
    vp8x(20, 10),
    bmp(20, 10, 1, b"\0\2\xff\xff" * 20),
]
EXTREMES = st.sampled_from(
    [
        b"\0",
        b"\xff",
        b"\xff\xff",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff",
        b"\xff\xff\xff\x7f",
        b"\0\0\xff\xff",
    ]
)


@st.composite
def spoiled_pictures(draw: st.DrawFn) -> bytes:
    """A picture file with bytes overwritten, mostly in its header, put in, taken out, or with another file's end."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.one_of(st.integers(0, min(64, len(data))), st.integers(0, len(data))))
        new = draw(st.one_of(EXTREMES, st.binary(max_size=4)))
        kind = draw(st.integers(0, 5))
        if kind <= 2:
            data[at : at + len(new)] = new
        elif kind == 3:
            data[at:at] = new
        elif kind == 4:
            del data[at : at + draw(st.integers(1, 40))]
        else:
            data[at:] = draw(st.sampled_from(SEEDS))[at:]
    return bytes(data)


def test_pictures(guarded: Guarded) -> None:
    read: list[bool] = []

    @settings(max_examples=6_000, **QUIET)
    @given(spoiled_pictures())
    def case(data: bytes) -> None:
        read.append(guarded("decode", data))

    case()
    assert read.count(True) > 100 and read.count(False) > 1_000


def test_data_urls(guarded: Guarded) -> None:
    head = st.sampled_from(
        ["data:image/png;base64,", "data:image/gif;a=b;base64,", "data:image/png,", "DATA:image/bmp;base64,"]
    )
    tail = st.one_of(spoiled_pictures().map(lambda data: b64encode(data).decode()), st.text(max_size=40))
    read: list[bool] = []

    @settings(max_examples=1_000, **QUIET)
    @given(st.builds(str.__add__, head, tail))
    def case(url: str) -> None:
        read.append(guarded("load_data", url))

    case()
    assert read.count(True) > 10


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["user", "text"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.sampled_from(["type", "text", "url", "keep", "hyper"]), st.text(max_size=4)), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from([*ChatRequest.model_fields, "tools", "n", "logprobs", "response_format", "chat_template"])


def test_requests(guarded: Guarded) -> None:
    fine = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}
    read: list[bool] = []

    @settings(max_examples=2_000, **QUIET)
    @given(
        st.dictionaries(FIELDS, VALUES, max_size=3),
        st.one_of(st.none(), st.tuples(st.integers(0, 200), st.binary(max_size=3))),
    )
    def case(more: dict[str, Any], noise: tuple[int, bytes] | None) -> None:
        raw = json.dumps(fine | more).encode()
        if noise:
            raw = raw[: noise[0]] + noise[1] + raw[noise[0] :]
        read.append(guarded("request", raw))

    case()
    assert read.count(True) > 20


@pytest.mark.parametrize(
    ("case", "given"),
    [
        ("decode_without_limits", file("PNG", Image.new("RGB", (4_000, 4_000)))),  # 48 MB from a file of 47 kB
        ("hold", MOST_KIB + 256),
    ],
)
def test_the_measure_sees_what_was_decoded(guarded: Guarded, case: str, given: Any) -> None:
    held, _ = guarded.held_kib("request", b"{}")
    if held is None:
        pytest.skip("this system does not tell the peak of a process")
    assert held < MOST_KIB / 4
    with pytest.raises(AssertionError, match="held"):
        guarded(case, given)
    guarded("request", b"{}")  # and it is seen where it is held, not after it

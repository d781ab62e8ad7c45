"""Opening pictures: every kind gives upright RGB, everything else one clear line."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vistok.cli import pictures
from vistok.cli.console import UserError
from vistok.cli.pictures import open_picture, world_picture
from vistok.world import derive_seed, make

GRADIENT = np.linspace(0, 255, 24 * 16).reshape(16, 24)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, bits: int = 1) -> bytes:
    """A PNG of any size in a few bytes: valid up to where its pixels would have to be unpacked."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def write(tmp_path):
    def to_file(data: bytes, name: str = "picture.png"):
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return to_file


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_format_is_read(write, kind):
    image = Image.fromarray(GRADIENT.astype(np.uint8)).convert("RGB")
    opened = open_picture(write(encoded(image, kind)))
    assert opened.mode == "RGB"
    assert opened.size == (24, 16)
    assert np.abs(np.asarray(opened, int) - np.asarray(image, int)).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBA", "LA", "PA", "I;16", "I", "F"])
def test_every_mode_becomes_rgb_of_the_same_brightness(write, mode):
    grey = Image.fromarray(GRADIENT.astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((GRADIENT * 257).round().astype(np.uint16))
    elif mode == "I":
        image = Image.fromarray((GRADIENT * 257).round().astype(np.int32))
    elif mode == "F":
        image = Image.fromarray((GRADIENT / 255).astype(np.float32))
    elif mode == "PA":
        image = grey.convert("RGB").convert("P").convert("PA")
    else:
        image = grey.convert("RGB").convert(mode)
    assert image.mode == mode
    kind = "PNG" if mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16") else "TIFF"
    how = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}  # Pillow before 13 cannot read it uncompressed
    opened = open_picture(write(encoded(image, kind, **how)))
    assert opened.mode == "RGB"
    right = GRADIENT.mean(axis=0)
    assert np.abs(np.asarray(opened, float).mean(axis=(0, 2)) - right).mean() < (60 if mode == "1" else 8)


def test_transparent_parts_are_white(write):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, 2:, 3] = 255
    opened = np.asarray(open_picture(write(encoded(Image.fromarray(pixels)))))
    assert (opened[:, :2] == 255).all()
    assert (opened[:, 2:] == 0).all()


def test_a_transparent_palette_colour_is_white(write):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    opened = np.asarray(open_picture(write(encoded(image, transparency=1))))
    assert (opened == 255).all()


def test_the_first_frame_of_an_animation_is_taken(write):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    opened = open_picture(write(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert opened.getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied(write):
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture must be turned clockwise
    opened = open_picture(write(encoded(image, "JPEG", exif=exif, quality=95)))
    assert opened.size == (10, 20)
    assert opened.getpixel((5, 2))[2] > 200
    assert opened.getpixel((5, 17))[0] > 200


def test_broken_exif_is_no_reason_to_refuse(write):
    opened = open_picture(write(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")))
    assert opened.size == (20, 10)


WHOLE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
JPEG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"not a picture at all", "must be a picture (PNG, "),
    "header only": (WHOLE[:8], "must be a picture"),
    "truncated png": (WHOLE[: len(WHOLE) // 2], "cut off or corrupt"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "cut off or corrupt"),
    "corrupt": (WHOLE[:60] + bytes(200) + WHOLE[260:], "cut off or corrupt"),
    "bomb": (bomb(100_000, 100_000), "must have at most 50 megapixels"),
    "smaller bomb": (bomb(10_000, 10_000), "must have at most 50 megapixels, it has 10000 x 10000"),
    "just too large": (bomb(7_072, 7_072), "it has 7072 x 7072"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "must be a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_name_the_argument(write, name):
    data, message = BAD[name]
    path = write(data)
    with pytest.raises(UserError) as caught:
        open_picture(path)
    assert str(caught.value).startswith(f"PICTURE: got {path}, ")
    assert message in str(caught.value)


def test_the_limit_itself_is_allowed(write, monkeypatch):
    monkeypatch.setattr(pictures, "LARGEST_PIXELS", 200)
    assert open_picture(write(encoded(Image.new("L", (20, 10))))).size == (20, 10)
    with pytest.raises(UserError, match="it has 20 x 11"):
        open_picture(write(encoded(Image.new("L", (20, 11)))))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "no such file"),
        (".", "it is a folder"),
        ("a" * 300, "cannot be read"),
        ("a\0b", "PICTURE: got "),
    ],
)
def test_bad_paths(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_picture(name, "PICTURE")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="regular file"):
        open_picture(str(tmp_path / "pipe"))


@settings(max_examples=80)
@given(st.sampled_from([WHOLE, JPEG]), st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0.05, 1))
def test_damage_gives_a_picture_or_a_user_error(tmp_path_factory, data, seed, damaged, share):
    """Random bytes overwritten and the end cut off: never any other exception."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    rng = np.random.default_rng(seed)
    broken = np.frombuffer(data, np.uint8).copy()
    broken[rng.integers(0, len(broken), damaged)] = rng.integers(0, 256, damaged)
    path.write_bytes(broken[: int(len(broken) * share)].tobytes())
    try:
        opened = open_picture(str(path))
    except UserError as error:
        assert str(error).startswith("PICTURE: got ")
    else:
        assert opened.mode == "RGB"


def test_world_pictures_are_named():
    found = world_picture("world:charts:3")
    assert found is not None
    assert (found.image == make("charts", derive_seed(0, 3, "test")).image).all()
    assert world_picture("picture.png") is None
    assert world_picture("world:scenes").task == "scenes"


@pytest.mark.parametrize(
    "name", ["world:nope:3", "world:scenes:x", "world:scenes:-1", "world::", "world:scenes:4294967296"]
)
def test_wrong_world_pictures(name):
    with pytest.raises(UserError, match="world:TASK:NUMBER, TASK one of scenes"):
        world_picture(name)

"""How pictures are brought to a tokenizer's size."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.parts.framing import framed, to_tensor


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_of_the_size_is_left_alone():
    image = noise(24, 16)
    for frame in ("crop", "pad"):
        assert framed(image, (16, 24), frame) is image
    x = to_tensor(image)
    assert x.shape == (3, 16, 24)
    assert np.array_equal((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(), np.asarray(image))


def test_crop_is_the_centre_and_pad_is_all():
    image = noise(60, 40)
    assert framed(image, (20, 20)).tobytes() == image.resize((30, 20), Image.LANCZOS).crop((5, 0, 25, 20)).tobytes()
    whole = framed(image, (30, 30), "pad")
    assert whole.crop((0, 5, 30, 25)).tobytes() == image.resize((30, 20), Image.LANCZOS).tobytes()
    assert not np.asarray(whole)[:5].any() and not np.asarray(whole)[25:].any()


def test_thin_pictures_cost_little():
    start = time.process_time()
    for size in ((1, 500_000), (500_000, 1)):
        for frame in ("crop", "pad"):
            assert framed(Image.new("RGB", size, "red"), (64, 64), frame).size == (64, 64)
    assert time.process_time() - start < 5
    with pytest.raises(ValueError, match="frame: got 'fill'"):
        framed(noise(3, 2), (4, 4), "fill")

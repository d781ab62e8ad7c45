"""Samples on disk, run lengths, photographs."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vistok.world import decode_mask, encode_mask, photos, sample, write_samples
from vistok.world import files as files_module


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_run_lengths_go_there_and_back(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    runs = encode_mask(mask)
    assert sum(runs["counts"]) == mask.size and all(c > 0 for c in runs["counts"][1:])
    assert (decode_mask(json.loads(json.dumps(runs))) == mask).all()


def test_run_lengths_must_add_up():
    with pytest.raises(ValueError, match="runs: "):
        decode_mask({"size": [2, 2], "counts": [3]})


def test_write_samples(tmp_path):
    path = write_samples(tmp_path / "new" / "folder", "all", 6, seed=2, size=80)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, *(line["image"] for line in lines)])
    for line, picture in zip(lines, sample("all", 6, seed=2, size=80), strict=True):
        assert (np.asarray(Image.open(path.parent / line["image"])) == picture.image).all()
        assert (line["task"], line["seed"], line["caption"]) == (picture.task, picture.seed, picture.caption)
        for told, question in zip(line["questions"], picture.questions, strict=True):
            assert (told["text"], told["answer"], told["family"]) == (question.text, question.answer, question.family)
            assert told["choices"] == list(question.choices)
            assert (decode_mask(told["evidence"]) == question.evidence).all()
        for told, thing in zip(line["things"], picture.things, strict=True):
            assert told["kind"] == thing.kind and (decode_mask(told["mask"]) == thing.mask).all()


def test_write_samples_again_gives_the_same_files(tmp_path):
    first = write_samples(tmp_path, "words", 2).read_bytes()
    (tmp_path / "mine.txt").write_text("stays")
    assert write_samples(tmp_path, "words", 2).read_bytes() == first
    assert (tmp_path / "mine.txt").read_text() == "stays"


def test_a_failed_write_leaves_the_old_file_and_no_scraps(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files_module._replace(target, fail)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_bad_arguments_leave_no_folder(tmp_path):
    with pytest.raises(ValueError, match="task: "):
        write_samples(tmp_path / "x", "birds", 1)
    assert not (tmp_path / "x").exists()


def test_photos():
    if not all(map(find_spec, ("skimage", "sklearn"))):
        pytest.skip("needs scikit-image and scikit-learn")
    found = photos(96)
    names = [p.name for p in found]
    assert len(set(names)) == len(names) and names[-10:] == [f"digit-{d}" for d in range(10)]
    assert {"astronaut", "cat", "coffee", "temple", "flower"} <= set(names)
    for first, again in zip(found, photos(96), strict=True):
        assert first.image.shape == (96, 96, 3) and first.image.dtype == np.uint8
        assert (first.image == again.image).all() and first.image.std() > 5
        assert first.questions == () and first.things == ()
    digits = np.stack([p.image.astype(float).ravel() for p in found[-10:]])
    assert np.linalg.norm(digits[:, None] - digits[None], axis=-1)[~np.eye(10, dtype=bool)].min() > 1000


@pytest.mark.parametrize("size", [63, 673])
def test_photos_check_the_size(size):
    with pytest.raises(ValueError, match="size: "):
        photos(size)


def test_photos_say_what_to_install(monkeypatch):
    monkeypatch.setattr("vistok.world.photographs.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"photos\(\) needs .*pip install 'vistok\[bench\]'"):
        photos(96)

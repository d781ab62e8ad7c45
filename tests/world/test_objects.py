"""Objects over clutter, places, class maps: the truth is where the pixels are, and test shows nothing of train."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vistok.world import derive_seed, make, objects
from vistok.world.draw import Dice
from vistok.world.maps import MAP_CLASSES, class_map
from vistok.world.objects import COVERAGE, OBJECTS, clutter, make_object, sample_objects
from vistok.world.places import make_view
from vistok.world.real import TEST_PHOTOGRAPHS, TRAIN_DIGITS, _digits, crop, digit_grey, photographs


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [96, 64, 224])
def test_the_object_covers_its_share_and_lies_inside(split: str, size: int) -> None:
    for picture in sample_objects(90 if size == 96 else 36, seed=3, size=size, split=split):
        (thing,) = picture.things
        assert picture.image.shape == (size, size, 3) and picture.image.dtype == np.uint8
        assert COVERAGE[0] - 0.001 <= thing.mask.mean() <= COVERAGE[1] + 0.001
        rows, columns = np.flatnonzero(thing.mask.any(1)), np.flatnonzero(thing.mask.any(0))
        assert thing.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert not thing.mask.flags.writeable
        assert thing.attributes["class"] == OBJECTS[thing.attributes["label"]] == picture.caption


def test_the_mask_is_where_the_object_is() -> None:
    """Against the same picture without its object: what changed (but for the grain) is the mask, and all of it did."""
    for seed in range(2 * len(OBJECTS)):
        picture = make_object(seed)
        behind = clutter(Dice(seed, objects._STREAM), 96, test=False).image
        far = np.abs(picture.image.astype(int) - behind).max(2)
        mask = picture.things[0].mask
        assert (far[mask] > 6).mean() > 0.9 and np.median(far[mask]) > 30
        # the edge is softened over a pixel or two; elsewhere only the grain of 6 grey levels is left
        near = mask.copy()
        for axis in (0, 1):
            near |= np.roll(near, 1, axis) | np.roll(near, -1, axis) | np.roll(near, 2, axis) | np.roll(near, -2, axis)
        assert (far[~near] <= 14).mean() > 0.99


def test_classes_come_in_turn() -> None:
    labels = [picture.things[0].attributes["label"] for picture in sample_objects(2 * len(OBJECTS), seed=5)]
    assert Counter(labels) == dict.fromkeys(range(len(OBJECTS)), 2)
    assert labels[: len(OBJECTS)] == labels[len(OBJECTS) :]


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert make_object(77).image.tobytes() == make_object(77).image.tobytes()
    assert make_object(77).image.tobytes() != make_object(77 + len(OBJECTS)).image.tobytes()
    streams = [[p.seed for p in sample_objects(5, seed, split=split)] for seed in (0, 1) for split in ("train", "test")]
    assert len({seed for stream in streams for seed in stream}) == 20
    later = next(sample_objects(1, 0, start=3))
    assert later.image.tobytes() == list(sample_objects(4, 0))[3].image.tobytes()


def test_test_shows_other_photographs_and_digits() -> None:
    train, test = photographs(False), photographs(True)
    assert len(test) == len(TEST_PHOTOGRAPHS) and len(train) > len(test)
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    assert sum(map(len, _digits(False))) == TRAIN_DIGITS and sum(map(len, _digits(True))) == 1797 - TRAIN_DIGITS
    written = [{one.tobytes() for kind in _digits(part) for one in kind} for part in (False, True)]
    assert not written[0] & written[1]
    for part in (False, True):
        cuts = [crop(Dice(seed), 16, part) for seed in range(4)]
        assert all(cut.shape == (16, 16, 3) for cut in cuts)
        assert digit_grey(Dice(1), 7, part) in _digits(part)[7]


@pytest.mark.parametrize(("arguments", "message"), [((-1,), "seed"), ((0, 50), "size"), ((2**64,), "seed")])
def test_wrong_arguments_of_objects(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_object(*arguments)


def test_views_of_a_place_are_of_one_scene() -> None:
    """Without change the views of a place are the same but for what passes by; with it they differ, but less than those
    of another place do."""
    near, far = [], []
    for number in range(12):
        place, other = derive_seed(2, number), derive_seed(2, number + 100)
        still = [make_view(place, view, change=0.0).image.astype(int) for view in (0, 1)]
        assert (np.abs(still[0] - still[1]).max(2) <= 16).mean() > 0.75
        moved = [make_view(place, view).image.astype(int) for view in (0, 1)]
        assert (np.abs(moved[0] - moved[1]).max(2) <= 8).mean() < 0.9
        colours = [
            np.sort(image.reshape(-1, 3), 0) for image in (*still, make_view(other, 0, change=0.0).image.astype(int))
        ]
        near.append(np.abs(colours[0] - colours[1]).mean())
        far.append(np.abs(colours[0] - colours[2]).mean())
    assert np.mean(near) < 0.3 * np.mean(far)


def test_views_are_seeded() -> None:
    place = derive_seed(0, 1, "test")
    assert make_view(place, 4).image.tobytes() == make_view(place, 4).image.tobytes()
    assert make_view(place, 4).image.tobytes() != make_view(place, 5).image.tobytes()
    assert make_view(place, 0, 64).image.shape == (64, 64, 3)
    with pytest.raises(ValueError, match="change"):
        make_view(place, 0, change=1.5)
    with pytest.raises(ValueError, match="view"):
        make_view(place, -1)


def test_class_map_by_brute_force() -> None:
    for seed in range(6):
        picture = make("scenes", seed, 64, questions=0)
        found = class_map(picture)
        for y in range(0, 64, 3):
            for x in range(0, 64, 3):
                here = [t.attributes["shape"] for t in picture.things if t.mask[y, x]]
                assert MAP_CLASSES[found[y, x]] == (here[0] if here else "ground")
    with pytest.raises(ValueError, match="scenes"):
        class_map(make("words", 0))

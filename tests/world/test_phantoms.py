"""Phantoms: densities are where the anatomy is, findings are what their masks say, windows are linear between ends."""

from __future__ import annotations

import numpy as np
import pytest

from vistok.world.phantoms import BIAS, FINDINGS, WINDOWS, from_stored, make_phantom, to_stored, window


def test_the_same_seed_gives_the_same_slice_and_another_one_another() -> None:
    one, same, other = make_phantom(5), make_phantom(5), make_phantom(6)
    assert one.hu.tobytes() == same.hu.tobytes() and one.finding == same.finding
    assert not np.array_equal(one.hu, other.hu)
    assert one.hu.dtype == np.int16 and one.hu.shape == (64, 64) and not one.mask.flags.writeable


def test_all_findings_occur() -> None:
    counts = np.bincount([make_phantom(seed, 16).finding for seed in range(300)], minlength=len(FINDINGS))
    assert counts.min() > 25


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("label", range(len(FINDINGS)))
def test_a_finding_has_its_density_where_its_mask_is(label: int, size: int) -> None:
    means = {"nodule": (-350, 80), "calcification": (150, 850), "effusion": (-200, 40), "pneumothorax": (-1020, -900)}
    for seed in range(8):
        phantom = make_phantom(seed, size, label)
        assert phantom.finding == label
        if FINDINGS[label] == "none":
            assert not phantom.mask.any()
            continue
        assert 0 < phantom.mask.mean() < 0.25
        low, high = means.get(FINDINGS[label], (-600, 60))
        assert low < phantom.hu[phantom.mask].mean() < high


def test_without_its_finding_a_slice_is_the_same_outside_the_mask() -> None:
    for label in range(1, len(FINDINGS)):
        for seed in range(4):
            plain, changed = make_phantom(seed, 96, 0), make_phantom(seed, 96, label)
            differs = plain.hu != changed.hu
            assert differs[changed.mask].mean() > 0.9
            if FINDINGS[label] in ("nodule", "calcification", "effusion"):
                assert differs[~changed.mask].mean() < 0.03


def test_air_is_outside_bone_inside_and_lungs_are_dark() -> None:
    for seed in range(5):
        hu = make_phantom(seed, 96, 0).hu
        assert hu[:3, :3].mean() < -950 and hu.max() > 250
        assert 0.1 < ((hu > -950) & (hu < -700)).mean() < 0.5


def test_windows_are_linear_between_their_ends() -> None:
    hu = np.array([-2000, -160, 40, 140, 240, 3000], np.int16)
    assert np.allclose(window(hu, *WINDOWS["soft tissue"]), [0, 0, 0.5, 0.75, 1, 1])
    assert window(hu, 0, 1).dtype == np.float32
    with pytest.raises(ValueError, match="width: got 0, must be greater than 0"):
        window(hu, 0, 0)


def test_stored_slices_are_above_zero_and_come_back() -> None:
    hu = make_phantom(1).hu
    stored = to_stored(hu)
    assert stored.min() >= 0 and stored.dtype == np.int16 and int(stored[0, 0]) == int(hu[0, 0]) + BIAS
    assert np.array_equal(from_stored(stored), hu)


def test_refusals() -> None:
    for arguments, message in (((-1,), "seed"), ((0, 8), "size"), ((0, 64, 6), "finding")):
        with pytest.raises(ValueError, match=message):
            make_phantom(*arguments)

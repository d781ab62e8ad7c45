"""Limits: the defaults can be meant together, and nonsense is refused by name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from vistok.serve.limits import Limits


def test_every_limit_is_explained() -> None:
    assert Limits.__doc__ is not None
    for field in fields(Limits):
        assert f"``{field.name}`` (" in Limits.__doc__


def test_the_largest_picture_fits_into_a_request() -> None:
    limits = Limits()
    assert 4 * limits.picture_bytes / 3 < limits.request_bytes


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "8", None])
def test_nonsense_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        Limits(**{name: value})


def test_counts_are_whole_and_seconds_need_not_be() -> None:
    assert Limits(deadline_seconds=0.5).deadline_seconds == 0.5
    with pytest.raises(ValueError, match=r"pictures: got 1\.5"):
        Limits(pictures=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"frames": 2}, {"picture_bytes": 10, "request_bytes": 9}, {"picture_side": 65_536}])
def test_what_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Limits(**wrong)  # type: ignore[arg-type]


def test_limits_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Limits().pictures = 9  # type: ignore[misc]

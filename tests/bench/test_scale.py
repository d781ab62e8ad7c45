"""The simulation behind docs/scale.md, against plain list scheduling and cases that can be worked out by hand."""

from __future__ import annotations

import heapq
import random

import pytest

from benchmarks.scale import Costs, durations, simulate

FREE_OF_CHARGE = Costs(0, 0, 0, 0)


@pytest.mark.parametrize("drivers", [1, 2, 3, 7])
def test_drivers_that_cost_nothing_are_list_scheduling(drivers):
    """Each worker takes the next cell when it is free, whoever its driver is: no cell is done twice or left."""
    seconds = [random.Random(number).expovariate(1) for number in range(300)]
    ends = [0.0] * 7
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    wall, busy, driver = simulate(seconds, 7, [FREE_OF_CHARGE] * drivers)
    assert wall == pytest.approx(max(ends))
    assert busy == pytest.approx(sum(seconds) / 7 / max(ends))
    assert driver == 0


def test_a_driver_is_the_limit_of_short_cells():
    """Handing out takes 10 ms: a thousand workers do a hundred cells a second, whatever they last below ten seconds."""
    for mean in (0.01, 1.0, 5.0):
        wall, busy, driver = simulate([mean] * 5000, 1000, [Costs(0.01, 0, 0, 0)])
        assert wall == pytest.approx(5000 * 0.01 + mean, rel=1e-6)
        assert busy == pytest.approx(mean * 5000 / 1000 / wall)
        assert driver == pytest.approx(50 / wall)
    halved, _, _ = simulate([1.0] * 5000, 1000, [Costs(0.01, 0, 0, 0)] * 2)
    assert halved == pytest.approx(26, rel=0.01)


def test_passing_over_the_cells_of_others_costs():
    """Two drivers with a worker each and 100 cells: each passes over the 50 of the other."""
    wall, _, driver = simulate([1.0] * 100, 2, [Costs(0.1, 0, 0.05, 0.05)] * 2)
    assert wall == pytest.approx(50 * (1 + 0.1 + 0.05), rel=0.02)
    assert driver == pytest.approx(0.15 / 1.15, rel=0.05)


def test_a_look_is_paid_once_for_all_that_have_ended():
    """The first of ten wakes the driver; the next look finds the nine others."""
    wall, _, _ = simulate([1.0] * 20, 10, [Costs(0, 0.5, 0, 0)])
    assert wall == pytest.approx(1 + 0.5 + 0.5 + 1)


def test_durations_have_the_mean_that_was_asked_for():
    found = durations([1.0, 2.0, 6.0], 30.0, 30_000)
    assert sum(found) / len(found) == pytest.approx(30, rel=0.02)
    assert set(found) == {10.0, 20.0, 60.0}

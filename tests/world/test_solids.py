"""Solids: their distance, surface, inside and views agree with one another."""

from __future__ import annotations

import numpy as np
import pytest

from vistok.world.solids import KINDS, REACH, VIEWS, Part, Solid, cells, make_solid


def alone(kind, sizes=(0.5, 0.3, 0.4)):
    return Solid((Part(kind, sizes, np.eye(3), np.zeros(3), np.ones(3)),), 0)


def test_the_same_seed_is_the_same_solid():
    one, same, other = make_solid(5), make_solid(5), make_solid(6)
    points = cells(6)
    assert np.array_equal(one.distance(points), same.distance(points))
    assert not np.array_equal(one.distance(points), other.distance(points))
    assert np.array_equal(one.surface(20)[0], same.surface(20)[0])
    assert not np.array_equal(one.surface(20)[0], one.surface(20, seed=1)[0])


def test_all_kinds_come_and_stay_inside():
    seen = set()
    for seed in range(40):
        solid = make_solid(seed)
        for part in solid.parts:
            seen.add(part.kind)
            assert np.linalg.norm(part.centre) + part.radius <= REACH + 1e-9
            assert np.allclose(part.turn @ part.turn.T, np.eye(3)) and np.linalg.det(part.turn) > 0
        assert 1 <= len(solid.parts) <= 3 and solid.occupied(16).any()
    assert seen == set(KINDS)


def test_volumes():
    a, b, c = 0.5, 0.3, 0.4
    points = np.random.default_rng(0).uniform(-1, 1, (200_000, 3))
    for kind, volume in (
        ("ball", 4 / 3 * np.pi * a**3),
        ("box", 8 * a * b * c),
        ("cylinder", np.pi * a * a * 2 * b),
        ("torus", 2 * np.pi**2 * a * b * b),
        ("capsule", np.pi * b * b * 2 * a + 4 / 3 * np.pi * b**3),
    ):
        assert alone(kind).inside(points).mean() * 8 == pytest.approx(volume, rel=0.03), kind


@pytest.mark.parametrize("kind", KINDS)
def test_distance_is_that_to_the_nearest_point_of_the_surface(kind):
    solid = alone(kind)
    surface = solid.surface(6000)[0]
    assert np.abs(solid.distance(surface)).max() < 1e-4
    points = np.random.default_rng(0).uniform(-1, 1, (60, 3))
    nearest = np.sqrt(((points[:, None] - surface[None]) ** 2).sum(2)).min(1)
    assert np.allclose(np.abs(solid.distance(points)), nearest, atol=0.06)


def test_normals_point_out():
    solid = make_solid(3)
    points, normals = solid.surface(300)
    assert np.allclose(np.linalg.norm(normals, axis=1), 1)
    assert (~solid.inside(points + 0.01 * normals)).mean() > 0.97 and solid.inside(
        points - 0.01 * normals
    ).mean() > 0.97


def test_a_union_holds_what_its_parts_hold():
    solid, points = make_solid(1), cells(12)
    each = [part.distance(points) < 0 for part in solid.parts]
    assert len(each) > 1 and np.array_equal(solid.inside(points), np.logical_or.reduce(each))


def test_samples_tell_the_inside():
    points, inside = make_solid(2).samples(400)
    assert points.shape == (400, 3) and np.array_equal(inside, make_solid(2).inside(points))
    assert 0.3 < inside[200:].mean() < 0.7


def test_views_show_what_the_cells_tell():
    """A pixel sees the solid where some cell of its column is inside, at that depth."""
    solid, n = make_solid(4), 24
    grid = solid.occupied(n)
    for side in VIEWS:
        axis = "xyz".index(side[1])
        picture, depth = solid.view(side, n)
        column = np.moveaxis(grid, ((axis + 2) % 3, (axis + 1) % 3, axis), (0, 1, 2))[::-1]
        column = column[:, :, ::-1] if side[0] == "+" else column
        seen = np.isfinite(depth)
        assert np.mean(column.any(2) == seen) > 0.97 and np.array_equal(picture.any(2), seen)
        both = column.any(2) & seen
        first = (column.argmax(2) + 0.5) / n * 2
        assert np.median(np.abs(first - depth)[both]) < 2 / n
        assert 0 <= picture.min() and picture.max() <= 1


def test_colours_are_those_of_the_nearest_part():
    solid = make_solid(1)
    for part in solid.parts:
        assert np.array_equal(Solid((part,), 0).colours(cells(2)), np.tile(part.colour, (8, 1)))


def test_refusals():
    with pytest.raises(ValueError, match="seed: got -1; must be a whole number from 0"):
        make_solid(-1)
    with pytest.raises(ValueError, match="most: got 0"):
        make_solid(0, 0)
    with pytest.raises(ValueError, match=r"side: got 'x'; must be one of \+x, -x"):
        make_solid(0).view("x", 8)

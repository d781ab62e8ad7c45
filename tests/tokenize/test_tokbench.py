"""TokBench: text and faces by relative size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.fidelity import to_uint8
from vistok.parts.reading import numbers
from vistok.parts.reconstruction import Unchanged
from vistok.tokenize.tokbench import (
    FACE_EDGES,
    TEXT_EDGES,
    TokBench,
    aligned_faces,
    claim,
    evaluate_faces,
    evaluate_text,
)


@pytest.fixture(scope="module")
def drawn():
    """Numbers in pictures of 256 px, of which the smallest are below the smallest edge."""
    return numbers(60, 256, (4, 14), 0)


def template_reader(drawn):
    """A reader of these very words: the nearest crop of the originals (a frozen recogniser with a ceiling of 1)."""
    from vistok.parts.reading import word_crops

    known = word_crops(drawn.images, drawn.boxes).flatten(1)

    def read(crops):
        return [drawn.words[i] for i in torch.cdist(crops.flatten(1), known).argmin(1)]

    return read


def blurred(images, side):
    if side == 1:
        return images
    pad = side // 2
    return avg_pool2d(nn.functional.pad(images, (pad,) * 4, mode="replicate"), side, 1)


def test_identity_gives_the_readers_ceiling(drawn):
    scores = TokBench(256).text(
        Unchanged(), to_uint8(drawn.images).split(16), drawn.boxes, drawn.words, drawn.ratios, template_reader(drawn)
    )
    assert scores.accuracy.headline == scores.ceiling.headline == scores.similarity.headline == 1
    assert sum(scores.accuracy.counts) == int((drawn.ratios >= 0.02).sum()) < 60
    assert all(scores.accuracy.counts) and scores.accuracy.edges == TEXT_EDGES[256]


def test_a_reader_with_a_ceiling(drawn):
    """One that is wrong on the originals is no better on an unchanged copy, and near misses count in part."""
    answers = [word if i % 2 else word[:2] + "x" for i, word in enumerate(drawn.words)]
    pairs = drawn.images, drawn.images
    scores = evaluate_text(pairs, drawn.boxes, drawn.words, drawn.ratios, lambda _: answers, (0, 1))
    assert scores.accuracy.means == scores.ceiling.means == (0.5,)
    assert scores.similarity.means[0] == pytest.approx((1 + 2 / 3) / 2)


def test_blur_lowers_the_score_step_by_step():
    drawn = numbers(24, 64, (6, 14), 1)
    read, found = template_reader(drawn), []
    noise = 0.05 * torch.randn(drawn.images.shape, generator=torch.Generator().manual_seed(0))
    for side in (1, 3, 5, 11):
        pairs = (blurred(drawn.images, side) + noise).clamp(0, 1), drawn.images
        found.append(evaluate_text(pairs, drawn.boxes, drawn.words, drawn.ratios, read, (0, 1)).accuracy.overall)
    assert found == sorted(found, reverse=True) and found[0] > 0.95 and found[-1] < 0.5


def test_mistakes(drawn):
    with pytest.raises(ValueError, match="words: got 1, must be as many"):
        evaluate_text((drawn.images,) * 2, drawn.boxes, ["1"], drawn.ratios, list, (0, 1))
    with pytest.raises(ValueError, match="size: got 300, must be one of 256, 512, 1024"):
        TokBench(300).text(
            Unchanged(), to_uint8(drawn.images[:2]).split(2), drawn.boxes[:2], drawn.words[:2], drawn.ratios[:2],
            lambda crops: [""] * len(crops),
        )  # fmt: skip
    assert all(len(edges) == 4 for edges in (*TEXT_EDGES.values(), *FACE_EDGES.values()))


TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=torch.float64,
)


def faces(count, side=160, seed=0):
    """Five bright blobs of different colours where the key points are, each face turned, scaled and moved."""
    rng = torch.Generator().manual_seed(seed)
    line = torch.arange(side).double()
    images, points = [], []
    for _ in range(count):
        angle, scale = float(torch.rand((), generator=rng)) - 0.5, 0.6 + 0.5 * float(torch.rand((), generator=rng))
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
        place = scale * (TEMPLATE - 56) @ turn.t() + side / 2 + 5 * torch.randn(2, generator=rng).double()
        image = torch.zeros(3, side, side).double()
        for i, (x, y) in enumerate(place):
            blob = (-((line - x) ** 2 + (line[:, None] - y) ** 2) / 2 / (3 * scale) ** 2).exp()
            image[i % 3] += blob
        images.append(image.clamp(0, 1).float())
        points.append(place)
    return torch.stack(images), torch.stack(points)


def test_faces_are_brought_to_one_place():
    images, points = faces(4)
    found = aligned_faces(images, points)
    assert found.shape == (4, 3, 112, 112)
    for one in found:
        # red is the left eye and the left corner of the mouth
        for i, (x, y) in enumerate(TEMPLATE.round().long().tolist()):
            assert float(one[i % 3, y, x]) > 0.85
    torch.testing.assert_close(found[0], found[1], atol=0.15, rtol=0)
    (same,) = aligned_faces(torch.rand(1, 3, 112, 112), TEMPLATE[None]).unbind()
    assert same.shape == (3, 112, 112)
    picture = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(aligned_faces(picture, TEMPLATE[None]), picture, atol=1e-3, rtol=0)


def test_faces():
    torch.manual_seed(0)
    images, points = faces(12)
    embedder = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.Tanh(), nn.Conv2d(8, 16, 5, 4), nn.Flatten()).eval()
    ratios = torch.linspace(0.01, 0.4, 12)
    with torch.no_grad():
        perfect = TokBench(256).faces(Unchanged(), to_uint8(images).split(5), points, ratios, embedder)
        assert perfect.headline == pytest.approx(1, abs=1e-5) and perfect.edges == FACE_EDGES[256]
        found = [
            evaluate_faces((blurred(images, side), images), points, ratios, embedder, (0, 1)).overall
            for side in (1, 5, 11, 25)
        ]
    assert found == sorted(found, reverse=True) and found[-1] < found[0] - 0.01


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=8, size=32), steps=1, reader_steps=1)
    assert 0 <= outcome.value and outcome.holds == (outcome.value < 0.9 * outcome.baseline)

"""Crops of words, and a reader that learns."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from vistok.parts.reading import SmallReader, numbers, tesseract, trained_reader, word_crops


def test_numbers_are_where_they_are_said_to_be():
    drawn = numbers(20, 40, (8, 12), 3)
    again = numbers(20, 40, (8, 12), 3)
    assert torch.equal(drawn.images, again.images) and drawn.words == again.words
    assert drawn.images.shape == (20, 3, 40, 40) and 0 <= drawn.images.min() and drawn.images.max() <= 1
    for i, (picture, x0, y0, x1, y1) in enumerate(drawn.boxes.tolist()):
        assert picture == i
        bright = (drawn.images[i].mean(0) > 0.5).nonzero()
        assert y0 <= bright[:, 0].min() and bright[:, 0].max() < y1
        assert x0 <= bright[:, 1].min() and bright[:, 1].max() < x1
        assert float(drawn.ratios[i]) == (y1 - y0 - 2) / 40
    with pytest.raises(ValueError, match="heights: got 20, must let 3 digits fit in 24 px"):
        numbers(1, 24, (20, 20), 0)


def test_crops_keep_proportions():
    images = torch.zeros(1, 3, 50, 50)
    images[..., 10:20, 10:30] = 1
    (crop,) = word_crops(images, torch.tensor([[0, 10, 10, 30, 20]]))
    assert crop.shape == (3, 32, 128) and bool((crop == 1).all())
    images[..., 10:20, 20:30] = 0.5
    (crop,) = word_crops(images, torch.tensor([[0, 10, 10, 30, 20]]))
    assert bool((crop[:, :, :32] == 0.75).all()) and float(crop[0, 16, 40]) == 1 and float(crop[0, 16, 90]) == 0.5
    assert word_crops(images, torch.zeros(0, 5)).shape == (0, 3, 32, 128)
    for box in ([0, 5, 5, 5, 9], [0, 0, 0, 60, 9], [1, 0, 0, 5, 5]):
        with pytest.raises(ValueError, match="boxes: got"):
            word_crops(images, torch.tensor([box]))


def test_spelling_leaves_out_repeats_and_empty_places():
    reader = SmallReader("ab")
    reader.forward = lambda crops: torch.nn.functional.one_hot(torch.tensor([[0, 1, 1, 0, 1, 2, 2, 0]]), 3).float()
    assert reader.read(torch.zeros(1, 3, 32, 32)) == ["aab"]


def test_a_reader_learns():
    torch.manual_seed(0)
    reader = SmallReader(width=8)
    drawn = numbers(8, 32, (9, 10), 0, digits=1)
    crops = word_crops(drawn.images, drawn.boxes, (32, 64))
    optimizer = torch.optim.Adam(reader.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = reader.loss(crops, drawn.words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert reader.training and len(reader.read(crops)) == 8 and reader.training
    assert not trained_reader(32, (9, 10), 1, 4, digits=1).training


@pytest.mark.skipif(importlib.util.find_spec("pytesseract") is not None, reason="pytesseract is here")
def test_without_tesseract():
    with pytest.raises(ImportError, match="needs pytesseract"):
        tesseract()

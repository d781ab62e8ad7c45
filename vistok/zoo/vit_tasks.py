"""What the small vision transformers learn, and how well they do it: objects, scenes by the pixel, places.

A task draws its pictures (a function of numbers, so that training can stop and go on), has a loss, and a score on
held-out pictures. Every system of the vit family is trained and measured on these, so that all see the same data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vistok.core.tensors import take
from vistok.world import (
    COLOUR_NAMES,
    MAP_CLASSES,
    OBJECTS,
    Picture,
    class_map,
    derive_seed,
    make,
    make_object,
    make_view,
)

from .vit import Pooling, describe, segment, to_pixels

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class ViTBatch:
    """B pictures and their truth."""

    images: Tensor
    """(B, H, W, 3) uint8"""
    label: Tensor
    """(B,) int64: class (objects), 0 (scenes), number of the place within the batch (places)"""
    truth: Tensor
    """(B, H, W) uint8: the object's mask, 0 or 1 (objects); ``class_map`` (scenes); zeros (places)"""
    places: Tensor | None = None
    """(B, K) int64: which patches the model is given, ascending; None for all. See ``fewer_patches``."""

    @property
    def pixels(self) -> Tensor:
        """(B, 3, H, W) float32 in -1 .. 1"""
        return to_pixels(self.images)

    def to(self, device: str | torch.device) -> ViTBatch:
        """The same on another device."""
        places = None if self.places is None else self.places.to(device)
        return ViTBatch(self.images.to(device), self.label.to(device), self.truth.to(device), places)


class ViTTask:
    """Base of the tasks."""

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    """Names of the outputs of a model for it."""

    def draw(self, start: int, n: int, *, seed: int = 0, split: str = "train", size: int = 96) -> ViTBatch:
        """Pictures start .. start + n - 1 of the stream ``seed`` of a split ("train" or "test")."""
        raise TypeError(f"{type(self).__name__} must define draw()")

    def loss(self, model: Any, batch: ViTBatch, heads: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """(loss, share that is right), both scalars. ``heads``: read-outs used in training only (``heads``)."""
        raise TypeError(f"{type(self).__name__} must define loss()")

    def heads(self, width: int) -> nn.Module | None:
        """Read-outs used in training only; None where the task has none."""
        return None

    def score(self, model: Any, n: int, *, seed: int = 1, size: int = 96) -> dict[str, float]:
        """Figures in [0, 1] on the first n pictures of the test stream ``seed``; the first is the one that counts."""
        raise TypeError(f"{type(self).__name__} must define score()")

    def pieces(self, n: int, *, seed: int, size: int) -> Iterator[ViTBatch]:
        """The first n test pictures in batches."""
        for start in range(0, n, EVALUATION_BATCH):
            yield _test_batch(self, start, min(EVALUATION_BATCH, n - start), seed, size)


@lru_cache(maxsize=40)
def _test_batch(task: ViTTask, start: int, n: int, seed: int, size: int) -> ViTBatch:
    """Drawn once for all methods that are measured on it."""
    return task.draw(start, n, seed=seed, split="test", size=size)


@dataclass(frozen=True)
class Objects(ViTTask):
    """Which of 18 objects is in the clutter. Loss: cross-entropy of the class token's logits.

    With ``heads`` also of every patch's class (object's class where the mask covers at least 0.4 of the patch, "none"
    below 0.1, in between not counted): class labels alone teach a small transformer little for a long time. Where
    patches are left out of the model, those that are left are judged.
    """

    name = "objects"
    classes = OBJECTS
    dense_weight: ClassVar[float] = 1.0

    def draw(self, start: int, n: int, *, seed: int = 0, split: str = "train", size: int = 96) -> ViTBatch:
        pictures = [make_object(derive_seed(seed, number, split), size) for number in range(start, start + n)]
        return ViTBatch(
            _images(pictures),
            torch.tensor([picture.things[0].attributes["label"] for picture in pictures]),
            torch.from_numpy(np.stack([picture.things[0].mask for picture in pictures]).astype(np.uint8)),
        )

    def heads(self, width: int) -> nn.Module:
        return nn.Linear(width, len(OBJECTS) + 1)

    def loss(self, model: Any, batch: ViTBatch, heads: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        pixels = to_pixels(batch.images)
        if heads is None:
            logits = model(pixels).float()
            return nn.functional.cross_entropy(logits, batch.label), _right(logits, batch.label)
        tokens = model.forward_features(pixels)
        logits = model.forward_head(tokens).float()
        target = patch_classes(batch, model.patch_embed.num_patches)
        if batch.places is not None:
            target = target.gather(1, batch.places)
        dense = heads(tokens[:, model.num_prefix_tokens :]).float().flatten(0, 1)
        weight = torch.ones(dense.shape[1], device=dense.device)
        weight[0] = 0.2  # most patches are clutter
        loss = nn.functional.cross_entropy(logits, batch.label)
        loss = loss + self.dense_weight * nn.functional.cross_entropy(dense, target.flatten(), weight, ignore_index=-1)
        return loss, _right(logits, batch.label)

    def score(self, model: Any, n: int, *, seed: int = 1, size: int = 96) -> dict[str, float]:
        right, digit = [], []
        with _judging(model):
            for batch in self.pieces(n, seed=seed, size=size):
                found = model(to_pixels(batch.images, model)).argmax(1).cpu()
                right.append(found == batch.label)
                digit.append(batch.label < 10)
        hit, digits = torch.cat(right).float(), torch.cat(digit)
        return {
            "accuracy": hit.mean().item(),
            "digits": hit[digits].mean().item(),
            "shapes": hit[~digits].mean().item(),
        }


@dataclass(frozen=True)
class Scenes(ViTTask):
    """Which shape each pixel of a scene shows, or the ground. Loss: cross-entropy of the enlarged logits."""

    name = "scenes"
    classes = MAP_CLASSES

    def draw(self, start: int, n: int, *, seed: int = 0, split: str = "train", size: int = 96) -> ViTBatch:
        numbers = range(start, start + n)
        pictures = [make("scenes", derive_seed(seed, number, split), size, questions=0) for number in numbers]
        truth = torch.from_numpy(np.stack([class_map(picture) for picture in pictures]))
        return ViTBatch(_images(pictures), torch.zeros(n, dtype=torch.int64), truth)

    def loss(self, model: Any, batch: ViTBatch, heads: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        logits, truth = segment(model, to_pixels(batch.images)), batch.truth.long()
        weight = torch.ones(len(self.classes), device=logits.device)
        weight[0] = 0.3  # most pixels are ground
        return nn.functional.cross_entropy(logits, truth, weight), (logits.argmax(1) == truth).float().mean()

    def score(self, model: Any, n: int, *, seed: int = 1, size: int = 96) -> dict[str, float]:
        count = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        with _judging(model):
            for batch in self.pieces(n, seed=seed, size=size):
                found = segment(model, to_pixels(batch.images, model)).argmax(1).cpu()
                count += confusion(batch.truth, found, len(self.classes))
        return {"miou": mean_iou(count), "pixels": (count.diag().sum() / count.sum()).item()}


@dataclass(frozen=True)
class Places(ViTTask):
    """Whether two views are of one place. Loss: each view finds the other views of its place in the batch (softmax of
    cosines over a temperature of 0.1). Score: the share of queries whose nearest view of another number is of the place
    (recall@1), and that for which one of the nearest five is."""

    name = "places"
    classes = ()
    views: int = 2
    """Views of a place, consecutive pictures of the stream."""
    pooling: Pooling = "gem"
    change: float = 1.0
    """How far views differ, 0 to 1; see ``make_view``."""
    temperature: float = 0.1

    def draw(self, start: int, n: int, *, seed: int = 0, split: str = "train", size: int = 96) -> ViTBatch:
        if start % self.views or n % self.views:
            raise ValueError(f"start, n: got {start} and {n}, must be multiples of the {self.views} views of a place")
        numbers = range(start, start + n)
        places = [number // self.views for number in numbers]
        pictures = [
            make_view(derive_seed(seed, place, split), number % self.views, size, self.change)
            for place, number in zip(places, numbers, strict=True)
        ]
        images = _images(pictures)
        return ViTBatch(images, torch.tensor(places) - places[0], images.new_zeros(images.shape[:3]))

    def loss(self, model: Any, batch: ViTBatch, heads: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        found = describe(model, to_pixels(batch.images), self.pooling)
        itself = torch.eye(len(found), dtype=torch.bool, device=found.device)
        cosine = (found.float() @ found.float().T).masked_fill(itself, -torch.inf)
        same = (batch.label[:, None] == batch.label) & ~itself
        log = (cosine / self.temperature).log_softmax(1).masked_fill(~same, 0)
        return -(log.sum(1) / same.sum(1)).mean(), same.gather(1, cosine.argmax(1, keepdim=True)).float().mean()

    def score(self, model: Any, n: int, *, seed: int = 1, size: int = 96) -> dict[str, float]:
        found, label, first = [], [], 0
        with _judging(model):
            for batch in self.pieces(n, seed=seed, size=size):
                found.append(describe(model, to_pixels(batch.images, model), self.pooling).cpu())
                label.append(batch.label + first)
                first = int(label[-1][-1]) + 1
        return recall(torch.cat(found), torch.cat(label))


@dataclass(frozen=True)
class Colours(ViTTask):
    """Which of eight colours the one thing in a scene has: what a classifier of shapes in any colour has no use for."""

    name = "colours"
    classes = COLOUR_NAMES

    def draw(self, start: int, n: int, *, seed: int = 0, split: str = "train", size: int = 96) -> ViTBatch:
        numbers = range(start, start + n)
        pictures = [make("scenes", derive_seed(seed, i, split), size, questions=0, max_objects=1) for i in numbers]
        images = _images(pictures)
        label = [COLOUR_NAMES.index(picture.things[0].attributes["colour"]) for picture in pictures]
        return ViTBatch(images, torch.tensor(label), images.new_zeros(images.shape[:3]))

    def loss(self, model: Any, batch: ViTBatch, heads: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        logits = model(batch.pixels).float()
        return nn.functional.cross_entropy(logits, batch.label), _right(logits, batch.label)

    def score(self, model: Any, n: int, *, seed: int = 1, size: int = 96) -> dict[str, float]:
        right = []
        with _judging(model):
            for batch in self.pieces(n, seed=seed, size=size):
                right.append(model(to_pixels(batch.images, model)).argmax(1).cpu() == batch.label)
        return {"accuracy": torch.cat(right).float().mean().item()}


TASKS: dict[str, ViTTask] = {task.name: task for task in (Objects(), Scenes(), Places(), Colours())}


def half_of_the_patches(batch: ViTBatch, patches: int, rng: torch.Generator) -> Tensor:
    """(B, N / 2) int64, ascending: places of the object's patches and of a random choice of the others."""
    side = round(patches**0.5)
    of_object = nn.functional.adaptive_max_pool2d(batch.truth[:, None].float(), side).flatten(1)
    first = of_object + torch.rand(of_object.shape, generator=rng)
    return first.topk(patches // 2, dim=1).indices.sort(1).values


@contextmanager
def fewer_patches(model: Any, places: Tensor | None) -> Iterator[None]:
    """A timm VisionTransformer's blocks are given the prefix and the patches ``places`` (B, K) int64; None: all."""
    if places is None:
        yield
        return
    prefix = model.num_prefix_tokens

    def drop(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        return torch.cat([x[:, :prefix], take(x[:, prefix:], places)], 1)

    hook = model.norm_pre.register_forward_hook(drop)
    try:
        yield
    finally:
        hook.remove()


def patch_classes(batch: ViTBatch, patches: int) -> Tensor:
    """(B, N) int64 of a batch of objects: 1 + its class for a patch of the object, 0 for clutter, -1 in between."""
    side = round(patches**0.5)
    share = nn.functional.adaptive_avg_pool2d(batch.truth[:, None].float(), side).flatten(1)
    inside = batch.label[:, None].expand_as(share) + 1
    return torch.where(share >= 0.4, inside, torch.where(share < 0.1, 0, -1))


def confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """(classes, classes) int64: pixels by true class (row) and by the class that was found (column)."""
    pair = truth.long().flatten() * classes + found.long().flatten()
    return torch.bincount(pair, minlength=classes**2).view(classes, classes)


def mean_iou(count: Tensor) -> float:
    """Mean over classes of intersection over union, of a confusion matrix; classes that never occur are left out."""
    hit = count.diag().double()
    union = count.sum(0) + count.sum(1) - count.diag()
    return (hit / union)[union > 0].mean().item()


def recall(found: Tensor, label: Tensor) -> dict[str, float]:
    """{"recall@1", "recall@5"}: descriptors (B, C) of length 1, each looking for others of its place ``label`` (B,)."""
    cosine = found.float() @ found.float().T
    order = cosine.fill_diagonal_(-torch.inf).argsort(dim=1, descending=True, stable=True)
    hit = label[order] == label[:, None]
    return {f"recall@{k}": hit[:, :k].any(1).float().mean().item() for k in (1, 5)}


def _images(pictures: list[Picture]) -> Tensor:
    return torch.from_numpy(np.stack([picture.image for picture in pictures]))


def _right(logits: Tensor, label: Tensor) -> Tensor:
    return (logits.argmax(1) == label).float().mean()


@contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    """No gradients, and evaluation mode as long as it lasts."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)

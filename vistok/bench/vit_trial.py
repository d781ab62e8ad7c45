"""Measuring the claims of systems for vision transformers, on the zoo's small ones and held-out pictures."""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vistok.host import apply
from vistok.zoo import load_vit
from vistok.zoo.vit import IMAGE_SIZE, Pooling, to_pixels
from vistok.zoo.vit_tasks import TASKS, Objects, Places, Scenes, ViTBatch, ViTTask
from vistok.zoo.vit_training import Loss, Pace, fit

IN_OBJECT = 0.25
"""Share of a patch that the object's mask must cover for the patch to be of the object."""
TEST_SEED = 1
MODELS = {"objects": "classifier", "scenes": "segmenter", "places": "finder"}
"""By task, the trial's model for it."""


@dataclass(frozen=True)
class MaskScore:
    """How well the kept patches meet the object; means over pictures, each in [0, 1]."""

    precision: float
    """Share of the kept patches that are of the object."""
    recall: float
    """Share of the object's patches that are kept."""
    chance: float
    """Share of all patches that are of the object: the precision of a random choice."""
    accuracy: float
    """Share of the pictures whose object is named right."""


@dataclass
class ViTTrial:
    """What a claim of the vit family is measured with. Every call sees the same held-out pictures.

    A ``method`` is what ``vistok.apply`` takes (a ViTReducer, a name or a list of them), or None for the model as it
    is; ``keep`` goes with a name, and so do hyper-parameters. ``model``: any module in place of the zoo's own, such as
    one that ``fit`` trained.
    """

    pictures: int = 256
    seed: int = 0
    """Of trainings."""
    classifier_name: str = "vistok-vit"
    segmenter_name: str = "vistok-vit-seg"
    place_name: str = "vistok-vit-place"
    size: int = IMAGE_SIZE

    def __post_init__(self) -> None:
        self._plain: dict[ViTTask, dict[str, float]] = {}

    @cached_property
    def classifier(self) -> Any:
        """The zoo's classifier; do not train it, train a copy (``fresh``)."""
        return load_vit(self.classifier_name)

    @cached_property
    def segmenter(self) -> Any:
        """The zoo's segmenter."""
        return load_vit(self.segmenter_name)

    @cached_property
    def finder(self) -> Any:
        """The zoo's model for places."""
        return load_vit(self.place_name)

    def accuracy(self, method: Any = None, keep: Any = None, *, model: Any = None, **hyper: Any) -> float:
        """Share of held-out pictures whose object is named right, in [0, 1]."""
        return self._score(Objects(), model, method, keep, hyper)["accuracy"]

    def miou(self, method: Any = None, keep: Any = None, *, model: Any = None, **hyper: Any) -> float:
        """Mean intersection over union of the segmenter's maps, in [0, 1]; dropped patches are read as the nearest."""
        hyper = hyper if method is None else {"restore": "nearest", **hyper}
        return self._score(Scenes(), model, method, keep, hyper)["miou"]

    def recall(
        self,
        method: Any = None,
        keep: Any = None,
        *,
        k: int = 1,
        pooling: Pooling = "gem",
        change: float = 1.0,
        model: Any = None,
        **hyper: Any,
    ) -> float:
        """Share of views for which one of the ``k`` (1 or 5) nearest others is of the same place, in [0, 1].

        ``pooling``: of the patches to a descriptor. ``change``: how far the two views of a place differ, 0 to 1.
        """
        if k not in (1, 5):
            raise ValueError(f"k: got {k}, must be 1 or 5")
        return self._score(Places(pooling=pooling, change=change), model, method, keep, hyper)[f"recall@{k}"]

    def mask_score(self, method: Any, keep: Any = None, *, model: Any = None, **hyper: Any) -> MaskScore:
        """Where the tokens that leave the classifier's last block stand, against the object's mask.

        A merged token counts once, at its anchor's place.
        """
        net, sums, seen, right = self.classifier if model is None else model, torch.zeros(3), 0, 0
        with torch.no_grad():
            for batch in Objects().pieces(self.pictures, seed=TEST_SEED, size=self.size):
                session: Any
                with apply(net, method, keep=keep, **hyper) as session:
                    found = net(to_pixels(batch.images, net)).argmax(1).cpu()
                    kept = [picture.keep for picture in session.pictures]
                    rows, columns = session.states[0].grid
                inside = nn.functional.adaptive_avg_pool2d(batch.truth[:, None].float(), (rows, columns)) >= IN_OBJECT
                for of_object, places in zip(inside.flatten(1), kept, strict=True):
                    sums += mask_share(of_object, places)
                seen += len(kept)
                right += int((found == batch.label).sum())
        precision, recall, chance = (sums / seen).tolist()
        return MaskScore(precision, recall, chance, right / seen)

    def milliseconds(
        self,
        method: Any = None,
        keep: Any = None,
        *,
        batch: int = 1,
        repeats: int = 9,
        model: Any = None,
        **hyper: Any,
    ) -> float:
        """Median milliseconds of a forward pass of ``batch`` pictures, taken in turn with the plain model."""
        net = self.classifier if model is None else model
        pixels = to_pixels(Objects().draw(0, batch, seed=TEST_SEED, split="test", size=self.size).images, net)
        taken: list[float] = []
        with torch.inference_mode():
            for turn in range(repeats + 1):  # the first of each warms up
                for one in (None, method):
                    with self._with(net, one, keep, hyper):
                        started = time.perf_counter()
                        net(pixels)
                        _finish(pixels)
                        spent = time.perf_counter() - started
                    if turn and one is method:
                        taken.append(1e3 * spent)
        return statistics.median(taken)

    def score(self, task: ViTTask | str, model: Any) -> dict[str, float]:
        """The figures of ``task`` on held-out pictures, each in [0, 1]."""
        return self._score(_task(task), model, None, None, {})

    def draw(self, task: ViTTask | str, n: int) -> ViTBatch:
        """The first ``n`` pictures that ``fit`` trains on."""
        return _task(task).draw(0, n, seed=self.seed, size=self.size)

    def fresh(self, task: ViTTask | str = "objects") -> Any:
        """A copy of the zoo's model for ``task``, in training mode: for ``fit``."""
        return copy.deepcopy(getattr(self, MODELS[_task(task).name])).train()

    def fit(
        self,
        model: Any,
        steps: int,
        *,
        task: ViTTask | str = "objects",
        method: Any = None,
        keep: Any = None,
        loss: Loss | None = None,
        batch_size: int = 32,
        peak_lr: float = 3e-4,
        dense: bool = False,
        seed: int | None = None,
        **hyper: Any,
    ) -> list[float]:
        """Train ``model`` in place for ``steps`` steps with ``method`` in it, and return the losses.

        ``task``: a name of ``vistok.zoo.vit_tasks.TASKS``, or one of your own. ``loss``: instead of the task's own,
        (model, batch) -> (loss, share right). ``dense``: with the task's read-outs of every patch (no method).
        ``seed``: the trial's by default; equal seeds see equal pictures in equal order. ``peak_lr``: for a model that
        is trained already; 2e-3 for a new one.
        """
        pace = Pace(steps=steps, batch_size=batch_size, peak_lr=peak_lr, warmup=max(1, min(20, steps // 10)))
        with self._with(model, method, keep, hyper):
            return fit(
                model,
                _task(task),
                pace,
                seed=self.seed if seed is None else seed,
                size=self.size,
                loss=loss,
                dense=dense,
            )

    def _with(self, net: Any, method: Any, keep: Any, hyper: dict[str, Any]) -> AbstractContextManager[Any]:
        return nullcontext() if method is None else apply(net, method, keep=keep, **hyper)

    def _score(self, task: ViTTask, model: Any, method: Any, keep: Any, hyper: dict[str, Any]) -> dict[str, float]:
        """The task's figures; those of the zoo's model without a method are remembered."""
        plain = model is None and method is None
        if plain and task in self._plain:
            return self._plain[task]
        net = getattr(self, MODELS[task.name]) if model is None else model
        with self._with(net, method, keep, hyper):
            found = task.score(net, self.pictures, seed=TEST_SEED, size=self.size)
        if plain:
            self._plain[task] = found
        return found


def _task(task: ViTTask | str) -> ViTTask:
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task: got {task!r}, must be {', '.join(TASKS)} or a ViTTask")
        return TASKS[task]
    return task


def mask_share(of_object: Tensor, kept: Tensor) -> Tensor:
    """(precision, recall, chance) of the kept places (K,) int64 against the object's patches (N,) bool."""
    hit = of_object[kept].float().sum()
    return torch.stack([hit / max(len(kept), 1), hit / of_object.sum().clamp(min=1), of_object.float().mean()])


def _finish(pixels: Tensor) -> None:
    if pixels.is_cuda:
        torch.cuda.synchronize()

"""Training of the small vision transformers: by recipe, resumable to the step, same bytes; or some steps in memory.

The optimizer, checkpoints, learning rates and the progress bar are those of the other small models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .optimizer import Optimizer, load_checkpoint, save_checkpoint
from .training import learning_rate, progress_bar
from .vit import IMAGE_SIZE, save_vit
from .vit_tasks import ViTBatch, ViTTask, fewer_patches, half_of_the_patches

Loss = Callable[[Any, ViTBatch], tuple[Tensor, Tensor]]
"""(model, batch) -> (loss, share that is right), both scalars."""


@dataclass(frozen=True)
class Pace:
    """How long and how fast a model learns: linear warm-up, then a cosine to a fiftieth of the peak."""

    steps: int
    batch_size: int = 32
    peak_lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.05
    sparse: int = 0
    """Of objects, the first so many steps are taken on half of the patches, the object's and some others: half the work
    while the coarse is learnt."""


@dataclass(frozen=True)
class ViTRecipe:
    """All that it takes to train one vision transformer again."""

    name: str
    task: ViTTask
    pace: Pace
    build: Callable[[], Any]
    """-> the model that training begins with"""
    about: str
    """What it is, in a sentence for its model card."""
    image_size: int = IMAGE_SIZE
    seed: int = 0
    held_out: int = 2000
    """Test pictures that the model card's figures are of."""

    @property
    def steps(self) -> int:
        return self.pace.steps


@dataclass(frozen=True)
class Batches(Dataset[ViTBatch]):
    """Batch number i is a function of i alone."""

    task: ViTTask
    batch_size: int
    seed: int
    size: int = IMAGE_SIZE

    def __getitem__(self, step: int) -> ViTBatch:
        return self.task.draw(step * self.batch_size, self.batch_size, seed=self.seed, size=self.size)


@dataclass
class Run:
    """A model on its way through the steps of a pace."""

    model: Any
    task: ViTTask
    pace: Pace
    seed: int = 0
    size: int = IMAGE_SIZE
    loss: Loss | None = None
    """Instead of the task's own."""
    dense: bool = False
    """Whether the task's training-only heads are used."""
    device: str = "cpu"
    workers: int = 1
    """Processes that draw the pictures; 0: this one."""
    heads: nn.Module | None = field(init=False)
    both: nn.ModuleDict = field(init=False)
    optimizer: Optimizer = field(init=False)

    def __post_init__(self) -> None:
        if self.pace.sparse and self.task.name != "objects":
            raise ValueError(f"sparse: got {self.pace.sparse}, must be 0 for {self.task.name}: they need all patches")
        self.heads = self.task.heads(self.model.embed_dim) if self.dense else None
        parts = {"model": self.model} if self.heads is None else {"model": self.model, "heads": self.heads}
        self.both = nn.ModuleDict(parts).to(self.device).train()
        self.optimizer = Optimizer(self.both, self.pace.weight_decay)

    def steps(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        """Do the steps first .. last - 1; yields {"step", "stage", "loss", "token_accuracy", "lr"} after each."""
        batches = Batches(self.task, self.pace.batch_size, self.seed, self.size)
        ahead = {"num_workers": self.workers, "prefetch_factor": 4} if self.workers else {}
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None, sampler=range(first, last), **ahead)  # type: ignore[arg-type]
        for step, batch in zip(range(first, last), loader, strict=True):
            if step < self.pace.sparse:
                rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
                batch = replace(batch, places=half_of_the_patches(batch, self.model.patch_embed.num_patches, rng))
            batch = batch.to(self.device)
            with torch.autocast(device_type=torch.device(self.device).type, dtype=torch.bfloat16):
                loss, right = self._loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.both.parameters(), 1.0)
            lr = learning_rate(self.pace, step, self.pace.warmup)
            self.optimizer.step(lr)
            yield {
                "step": step + 1,
                "stage": self.task.name,
                "loss": loss.item(),
                "token_accuracy": right.item(),
                "lr": lr,
            }

    def _loss(self, batch: ViTBatch) -> tuple[Tensor, Tensor]:
        if self.loss is not None:
            return self.loss(self.model, batch)
        with fewer_patches(self.model, batch.places):
            return self.task.loss(self.model, batch, self.heads)


def train_vit(
    recipe: ViTRecipe,
    out: Path,
    *,
    device: str = "cpu",
    checkpoint_every: int = 200,
    stop_at: int | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train ``recipe`` and save a timm folder (float16 safetensors) to ``out``.

    Goes on from ``out/checkpoint`` if there is one. ``stop_at``: end (with a checkpoint) before that step.
    ``on_step`` gets {"step", "stage", "loss", "token_accuracy", "lr"} after each step. Returns the folder of the model.
    """
    torch.manual_seed(recipe.seed)
    run = Run(recipe.build(), recipe.task, recipe.pace, recipe.seed, recipe.image_size, dense=True, device=device)
    checkpoint = out / "checkpoint" / "state.safetensors"
    first = load_checkpoint(checkpoint, run.both, run.optimizer) if checkpoint.exists() else 0
    last = min(recipe.steps, recipe.steps if stop_at is None else stop_at)
    with progress_bar(recipe, first, "right") as advance:
        for told in run.steps(first, last):
            advance(told)
            if on_step:
                on_step(told)
            if told["step"] % checkpoint_every == 0 or told["step"] == last:
                save_checkpoint(checkpoint, run.both, run.optimizer, told["step"])
    return save_vit(run.model, out, recipe.task.classes)


def fit(
    model: Any,
    task: ViTTask,
    pace: Pace,
    *,
    seed: int = 0,
    size: int = IMAGE_SIZE,
    loss: Loss | None = None,
    dense: bool = False,
    device: str = "cpu",
    workers: int = 1,
) -> list[float]:
    """Train ``model`` in place for the steps of ``pace``, leave it in evaluation mode, and return the losses.

    For short trainings that compare methods: equal ``seed``s see equal pictures in equal order. Only parameters that
    require gradients learn. ``loss``: instead of the task's own, as where a method has one. ``dense``: with the task's
    read-outs of every patch, which only a model without a method in it has rows for.
    """
    run = Run(model, task, pace, seed, size, loss, dense, device, workers)
    losses = [told["loss"] for told in run.steps(0, pace.steps)]
    model.eval()
    return losses

"""Training of the small models: patch labels first, then packed questions. Resumable to the step, same bytes again.

Why two stages: language loss alone teaches a small vision tower next to nothing for a long time; a few minutes of
dense patch labels give it shapes, colours and characters, and the questions then train several times faster.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, ProcessorMixin

from vistok.world import CHARACTER_LABELS, COLOUR_LABELS, LAST_INDEX, SHAPE_LABELS, Picture, derive_seed, make

from .optimizer import Optimizer, load_checkpoint, save_checkpoint
from .packing import IGNORE, Batch, pack, packed_mask

LARGEST_BATCH = 1024
LABEL_SIZES = {
    "shape": len(SHAPE_LABELS),
    "colour": len(COLOUR_LABELS),
    "character": len(CHARACTER_LABELS),
    "index": LAST_INDEX + 1,
}


@dataclass(frozen=True)
class Stage:
    """One stretch of training with its own cosine schedule."""

    name: str
    steps: int
    batch_size: int
    peak_lr: float
    language: bool
    """False: patch labels only, the language model is not run. True: packed questions, patch labels at a low weight."""
    tasks: tuple[tuple[str, float], ...]
    """(task of the world, share of the pictures)"""
    drop: float = 0.0
    """Share of the steps at which the pictures lose a part of their visual tokens, 0 to 90%."""
    encoder: bool = True
    """False: vision tower and projector stay as they are. With tokens missing at random, an encoder that learns would
    put what it sees into any token, and it would no longer matter which ones are kept."""


class Paced(Protocol):
    """What ``learning_rate`` reads."""

    @property
    def steps(self) -> int: ...
    @property
    def peak_lr(self) -> float: ...


class Named(Protocol):
    """What ``progress_bar`` reads."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int: ...


@dataclass(frozen=True)
class Prefix:
    """What the language model sees before the questions, and what the label heads read."""

    embeds: Tensor
    """(B, P, D)"""
    positions: Tensor
    """(B, P) or, for multimodal rotary positions, (3, B, P)"""
    visual: slice
    """Which of the P are the picture's tokens."""
    patches: Tensor
    """(B, N, Dv) vision features a patch of the label grid, as they feed the projector"""
    summary: Tensor
    """(B, Dv) the vision tower's picture-level state (class token, or mean of the patches)"""

    @property
    def next_position(self) -> Tensor:
        """(B, 1): where the text goes on."""
        last = self.positions.amax(dim=-1, keepdim=True)
        return (last.amax(dim=0) if last.ndim == 3 else last) + 1

    def take(self, share: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Embeddings and positions with a ``share`` of each picture's tokens, each at its own position: scattered at
        random, in patches, or anything between."""
        batch, length = self.embeds.shape[:2]
        every = torch.arange(length)
        tokens = every[self.visual]
        score = patchy(batch, len(tokens), rng)
        kept = score.argsort(1)[:, : max(1, round(share * len(tokens)))]
        ends = [part.expand(batch, -1) for part in (every[: self.visual.start], every[self.visual.stop :])]
        index = torch.cat([ends[0], tokens[kept.sort(1).values], ends[1]], 1).to(self.embeds.device)
        embeds = self.embeds.gather(1, index[..., None].expand(-1, -1, self.embeds.shape[-1]))
        return embeds, self.positions.gather(-1, index.expand(*self.positions.shape[:-1], -1))


def patchy(batch: int, tokens: int, rng: torch.Generator) -> Tensor:
    """(B, N) noise over a square grid of N tokens, between white and a few broad hills, its mix drawn by picture."""
    side = math.isqrt(tokens)
    white = torch.randn(batch, tokens, generator=rng)
    hills = torch.randn(batch, 1, 4, 4, generator=rng)
    hills = nn.functional.interpolate(hills, size=(side, side), mode="bicubic", align_corners=True).flatten(1)
    mix = torch.rand(batch, 1, generator=rng)
    return mix * white + (1 - mix) * hills


def language_loss(
    model: PreTrainedModel, prefix: Prefix, batch: Batch, share: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy of the answers' tokens, how many are right), from ``share`` of the visual tokens."""
    text = model.get_input_embeddings()(batch.text)
    embeds, positions = prefix.take(share, rng)
    later = (batch.position + prefix.next_position).expand(*positions.shape[:-1], -1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([embeds.to(text.dtype), text], dim=1),
        attention_mask=packed_mask(embeds.shape[1], batch.segment),
        position_ids=torch.cat([positions, later], dim=-1),
        use_cache=False,
    ).last_hidden_state[:, embeds.shape[1] :]
    asked = batch.target != IGNORE
    logits = model.lm_head(hidden[asked]).float()
    target = batch.target[asked]
    return nn.functional.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()


@dataclass(frozen=True)
class Recipe:
    """All that it takes to train one model again."""

    name: str
    stages: tuple[Stage, ...]
    image_size: int
    grid: int
    label_width: int
    """Width of ``Prefix.patches`` and ``Prefix.summary``."""
    build: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    prefix: Callable[[PreTrainedModel, Tensor, int], Prefix]
    """(model, pixels (B, H, W, 3) uint8, id of the first token) -> Prefix"""
    teach: Callable[[Tensor], Tensor] | None = None
    """pixels -> (B, N, label_width) features of a trained model that ``Prefix.patches`` is drawn to."""
    pack: Callable[[list[Picture], Any, int], Batch] = pack
    """(pictures, tokenizer, grid) -> Batch"""
    objective: Callable[[PreTrainedModel, Prefix, Batch, float, torch.Generator], tuple[Tensor, Tensor]] = language_loss
    """(model, prefix, batch, share of the visual tokens, rng) -> (loss, share of the tokens that are right)"""
    questions: int = 10
    max_objects: int = 5
    label_weight: float = 0.3
    weight_decay: float = 0.05
    warmup: int = 100
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage that a step belongs to, and the step within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise ValueError(f"step: got {step}, past the end of the recipe")


class WorldBatches(Dataset[Batch]):
    """Batch number ``step`` of a recipe: a pure function of (seed, step), so that a resumed run sees the same data."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer

    def __getitem__(self, step: int) -> Batch:
        stage, _ = self.recipe.stage_at(step)
        names, shares = zip(*stage.tasks, strict=True)
        rng = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        chosen = torch.multinomial(torch.tensor(shares), stage.batch_size, replacement=True, generator=rng)
        pictures = [
            make(
                names[task],
                derive_seed(self.recipe.seed, step * LARGEST_BATCH + row, "train"),
                self.recipe.image_size,
                self.recipe.questions,
                self.recipe.max_objects,
            )
            for row, task in enumerate(chosen.tolist())
        ]
        return self.recipe.pack(pictures, self.tokenizer, self.recipe.grid)


class LabelHeads(nn.Module):
    """Linear read-outs used in training only: what both halves of a patch show, where the patch lies, and what is in
    the picture at all.

    Nothing in the other labels asks for the place, and a tower that has dropped it makes "left of" hard to learn.
    """

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.patch = nn.ModuleDict({name: nn.Linear(width, 2 * size) for name, size in LABEL_SIZES.items()})
        self.place = nn.Linear(width, 2)
        self.pairs = nn.Linear(width, LABEL_SIZES["shape"] * LABEL_SIZES["colour"])
        self.characters = nn.Linear(width, LABEL_SIZES["character"])
        line = torch.linspace(-1, 1, grid)
        self.register_buffer("places", torch.cartesian_prod(line, line), persistent=False)

    def forward(self, prefix: Prefix, labels: dict[str, Tensor]) -> Tensor:
        # Most patches are background: it counts a tenth.
        loss = prefix.patches.new_zeros((), dtype=torch.float32)
        for name, head in self.patch.items():
            weight = torch.ones(LABEL_SIZES[name], device=prefix.patches.device)
            weight[0] = 0.1
            logits = head(prefix.patches).float().reshape(-1, LABEL_SIZES[name])
            loss = loss + nn.functional.cross_entropy(logits, labels[name].flatten(), weight)
        loss = loss + 3 * (self.place(prefix.patches).float() - self.places).square().mean()
        pair = labels["shape"] * LABEL_SIZES["colour"] + labels["colour"]
        for head, present in ((self.pairs, pair), (self.characters, labels["character"])):
            logits = head(prefix.summary).float()
            target = torch.zeros_like(logits).scatter_(1, present.flatten(1), 1.0)
            loss = loss + 5 * nn.functional.binary_cross_entropy_with_logits(logits, target)
        return loss


def relative_error(features: Tensor, target: Tensor) -> Tensor:
    """Squared error over the target's variance: 0 is a copy, 1 is no better than its mean."""
    target = target.float()
    return (features.float() - target).square().mean() / target.var(dim=(0, 1)).mean()


def kept_share(stage: Stage, rng: torch.Generator) -> float:
    """Which share of the visual tokens a step keeps: 1, or with the stage's chance one of 0.1, 0.2, ... 0.9.

    Few shares, since the CPU kernels are compiled and kept for every length of sequence.
    """
    chance, share = torch.rand(2, generator=rng).tolist()
    return (1 + int(9 * share)) / 10 if chance < stage.drop else 1.0


def learning_rate(stage: Paced, step: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak."""
    if step < warmup:
        return stage.peak_lr * (step + 1) / warmup
    share = (step - warmup) / max(1, stage.steps - warmup)
    return stage.peak_lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    checkpoint_every: int = 200,
    stop_at: int | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train ``recipe`` and save an ordinary Hugging Face folder (bf16 safetensors, tokenizer, processor) to ``out``.

    Goes on from ``out/checkpoint`` if there is one. ``stop_at``: end (with a checkpoint) before that step.
    ``on_step`` gets {"step", "stage", "loss", "token_accuracy", "lr"} after each step. Returns the folder of the model.
    """
    torch.manual_seed(recipe.seed)
    model, processor = recipe.build()
    heads = LabelHeads(recipe.label_width, recipe.grid)
    both = nn.ModuleDict({"model": model, "heads": heads}).to(device).train()
    optimizer = Optimizer(both, recipe.weight_decay)
    checkpoint = out / "checkpoint" / "state.safetensors"
    first = load_checkpoint(checkpoint, both, optimizer) if checkpoint.exists() else 0
    last = min(recipe.steps, recipe.steps if stop_at is None else stop_at)
    batches = WorldBatches(recipe, processor.tokenizer)
    loader = DataLoader(batches, batch_size=None, sampler=range(first, last), num_workers=1, prefetch_factor=4)
    cast = torch.autocast(device_type=torch.device(device).type, dtype=torch.bfloat16)
    with progress_bar(recipe, first) as advance:
        for step, batch in zip(range(first, last), loader, strict=True):
            stage, stage_step = recipe.stage_at(step)
            batch = to_device(batch, device)
            with cast:
                with torch.set_grad_enabled(stage.encoder):
                    prefix = recipe.prefix(model, batch.pixels, processor.tokenizer.bos_token_id)
                loss = torch.zeros(())
                if stage.encoder:
                    loss = heads(prefix, batch.labels)
                    if recipe.teach is not None:
                        loss = loss + 5 * relative_error(prefix.patches, recipe.teach(batch.pixels))
                right = torch.zeros(())
                if stage.language:
                    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
                    words, right = recipe.objective(model, prefix, batch, kept_share(stage, rng), rng)
                    loss = words + recipe.label_weight * loss
            loss.backward()
            nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            lr = learning_rate(stage, stage_step, recipe.warmup)
            optimizer.step(lr)
            told = {
                "step": step + 1,
                "stage": stage.name,
                "loss": loss.item(),
                "token_accuracy": right.item(),
                "lr": lr,
            }
            advance(told)
            if on_step:
                on_step(told)
            if (step + 1) % checkpoint_every == 0 or step + 1 == last:
                save_checkpoint(checkpoint, both, optimizer, step + 1)
    return save_model(model, processor, out)


def to_device(batch: Batch, device: str) -> Batch:
    """The same batch on another device."""
    moved = {k: v.to(device) for k, v in vars(batch).items() if k != "labels"}
    return Batch(**moved, labels={k: v.to(device) for k, v in batch.labels.items()})


@contextmanager
def progress_bar(
    recipe: Named, first: int, what: str | None = "answers' tokens"
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields ``advance(step record)``; drawn on standard error. ``what``: what the record's accuracy is of;
    None: it has none."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(recipe.name, total=recipe.steps, completed=first)

        def advance(told: dict[str, Any]) -> None:
            text = f"{told['stage']} loss {told['loss']:.3f}"
            text += "" if what is None else f" {what} {told['token_accuracy']:.1%}"
            bar.update(task, completed=told["step"], description=text)

        yield advance


def save_model(model: PreTrainedModel, processor: ProcessorMixin, out: Path) -> Path:
    """Write the model in bf16 and its processor; weights are renamed into place when they are whole."""
    out.mkdir(parents=True, exist_ok=True)
    slim = copy.deepcopy(model).to(torch.bfloat16)
    slim.save_pretrained(out)
    processor.save_pretrained(out)
    return out

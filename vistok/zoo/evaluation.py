"""How well a small model sees: accuracy by task and question family on held-out pictures, and what it knows blind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vistok.host import apply
from vistok.reduce.dmllm_redundancy import StepPrune
from vistok.world import TASKS, Picture, sample

from .asking import ask, denoise, is_diffusion, is_right

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from .training import Recipe


MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---
# {name}

A small {kind} ({parameters:.1f} M parameters, {grid}x{grid} visual tokens at {size} px) that sees the drawn world of
vistok, and nothing else. `vistok train {name}` makes it again, with seed {seed}. This file is generated.

## Accuracy on held-out pictures

Exact match, greedy decoding, {pictures} pictures a task with eight questions each (split `test`, seed 1). *Blind*: an
even grey instead of the picture. *Random 10%*: a random tenth of the visual tokens.

| task | question family | questions | all tokens | blind | random 10% |
|---|---|---:|---:|---:|---:|
{accuracy}

## Recipe

| stage | steps | pictures a step | peak learning rate | pictures |
|---|---:|---:|---:|---|
{stages}
"""


@dataclass(frozen=True)
class Score:
    """Right answers of ``n`` questions."""

    right: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.right / self.n if self.n else float("nan")


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Iterable[Picture],
    *,
    blind: bool = False,
    keep: float = 1.0,
) -> dict[tuple[str, str], Score]:
    """Scores by (task, question family). ``blind``: the model gets an even grey in place of every picture. ``keep``: a
    random share of the visual tokens."""
    asked = [(picture, question) for picture in pictures for question in picture.questions]
    grey = Image.new("RGB", (112, 112), (128, 128, 128))
    shown = {id(picture): grey if blind else picture.pil() for picture, _ in asked}
    images, questions = [shown[id(p)] for p, _ in asked], [q.text for _, q in asked]
    if is_diffusion(model):
        prune = None if keep == 1 else StepPrune("random", keep, start_frac=0.0)
        answers, _ = denoise(model, processor, images, questions, prune=prune, batch_size=64, cache=True)
    else:
        with nullcontext() if keep == 1 else apply(model, "random", keep=keep):
            answers = ask(model, processor, images, questions, batch_size=64)
    counts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for (picture, question), answer in zip(asked, answers, strict=True):
        counts[picture.task, question.family].append(is_right(question, answer))
    return {key: Score(sum(judged), len(judged)) for key, judged in sorted(counts.items())}


def total(scores: dict[tuple[str, str], Score], task: str | None = None) -> Score:
    """All questions together, or those of one task."""
    chosen = [score for (of, _), score in scores.items() if task in (None, of)]
    return Score(sum(s.right for s in chosen), sum(s.n for s in chosen))


def write_model_card(
    recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin, folder: Path, *, pictures: int = 150
) -> Path:
    """Measure the model with all tokens, blind, and with random 10% of its tokens, and write ``folder/README.md``.

    ``pictures``: held-out pictures of each task, eight questions each.
    """
    held_out = [p for task in TASKS for p in sample(task, pictures, seed=1, size=recipe.image_size, split="test")]
    seen = evaluate(model, processor, held_out)
    blind = evaluate(model, processor, held_out, blind=True)
    few = evaluate(model, processor, held_out, keep=0.1)
    lines = [
        _line(task, family, score, blind[task, family], few[task, family]) for (task, family), score in seen.items()
    ]
    lines += [
        _line(f"**{task or 'all'}**", "", *(total(scores, task) for scores in (seen, blind, few)))
        for task in (*TASKS, None)
    ]
    text = MODEL_CARD.format(
        name=recipe.name,
        kind=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        grid=recipe.grid,
        size=recipe.image_size,
        seed=recipe.seed,
        pictures=pictures,
        accuracy="\n".join(lines),
        stages="\n".join(
            f"| {s.name} | {s.steps} | {s.batch_size} | {s.peak_lr:g} "
            f"| {', '.join(f'{task} {share:.0%}' for task, share in s.tasks)} |"
            for s in recipe.stages
        ),
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _line(task: str, family: str, *scores: Score) -> str:
    shares = " | ".join(f"{score.accuracy:.1%}" for score in scores)
    return f"| {task} | {family} | {scores[0].n} | {shares} |"

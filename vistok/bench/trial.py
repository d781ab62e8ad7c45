"""Measuring the claims of the catalogue on the embedded model and the world."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vistok.catalogue import card, claim_of
from vistok.world import sample
from vistok.zoo import DEFAULT, load, load_processor
from vistok.zoo.asking import denoise, is_right

from .diffusion import denoising_ms
from .measure import DENSE, Case, answer_all, cases_of, cost_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from .measure import Answered


@dataclass
class WorldTrial:
    """``vistok.catalogue.Trial`` on a model and held-out pictures of the world; every call sees the same questions."""

    model_name: str = DEFAULT
    pictures: int = 32
    """Pictures of all tasks, eight questions each."""
    seed: int = 0
    diffusion_name: str = "vistok-tiny-diffusion"
    """The masked-diffusion model."""

    def __post_init__(self) -> None:
        self._answered: dict[tuple[Any, ...], list[Answered]] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        return load(self.model_name)

    @cached_property
    def processor(self) -> ProcessorMixin:
        return load_processor(self.model_name)

    @cached_property
    def cases(self) -> list[Case]:
        return cases_of(list(sample("all", self.pictures, seed=self.seed, split="test")))

    def _answers(self, method: Any, keep: float | int, tasks: tuple[str, ...]) -> list[Answered]:
        cases = [case for case in self.cases if not tasks or (case.truth and case.truth.family in tasks)]
        if not cases:
            raise ValueError(f"tasks: got {tasks}, none is a question family of the world")
        key = (repr(method), keep, tasks)
        if key not in self._answered:
            self._answered[key] = answer_all(self.model, self.processor, method, keep, cases)
        return self._answered[key]

    def accuracy(self, method: Any, keep: float | int = 1.0, tasks: tuple[str, ...] = ()) -> float:
        answered = self._answers(method, keep, tasks)
        return sum(bool(a.correct) for a in answered) / len(answered)

    def evidence_recall(self, method: Any, keep: float | int, tasks: tuple[str, ...] = ()) -> float:
        recalls = [a.evidence_recall for a in self._answers(method, keep, tasks)]
        known = [r for r in recalls if r is not None]
        return sum(known) / len(known)

    def ttft_ms(self, method: Any, keep: float | int = 1.0) -> float:
        settings = [(method, keep), (DENSE, 1.0)]
        return cost_all(self.model, self.processor, settings, self.cases[0], repeats=9)[0].ttft_ms

    @cached_property
    def diffusion(self) -> tuple[PreTrainedModel, ProcessorMixin]:
        return load(self.diffusion_name), load_processor(self.diffusion_name)

    def diffusion_accuracy(self, prune: Any) -> float:
        model, processor = self.diffusion
        images, questions = [case.picture for case in self.cases], [case.question for case in self.cases]
        answers, _ = denoise(model, processor, images, questions, prune=prune, cache=True)
        right = [
            case.truth is not None and is_right(case.truth, a) for case, a in zip(self.cases, answers, strict=True)
        ]
        return sum(right) / len(right)

    def diffusion_ms(self, prune: Any) -> float:
        model, processor = self.diffusion
        return denoising_ms(model, processor, self.cases[0], [prune, None], steps=model.config.answer_length)[0]


def try_system(slug: str, trial: Any) -> dict[str, Any]:
    """Measure the claim of one system: {"system", "claim", "metric", "baseline", "value", "holds", "seconds", "note"}.

    ``trial``: a WorldTrial, for the vit family a ViTTrial. One that has measured one system knows the dense model's
    answers when it measures the next.
    """
    start = time.perf_counter()
    outcome = claim_of(slug)(trial)
    return {
        "system": card(slug).slug,
        "claim": card(slug).claim,
        "metric": outcome.metric,
        "baseline": outcome.baseline,
        "value": outcome.value,
        "holds": outcome.holds,
        "seconds": round(time.perf_counter() - start, 2),
        "note": outcome.note,
    }

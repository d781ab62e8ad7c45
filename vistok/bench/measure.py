"""One method on one set of questions: answers, tokens, time, FLOPs, cache, and the evidence that survived.

``dense`` is a method name here: the model as it is (for an answer, the host with all tokens kept, which is the same bit
for bit and counts tokens and FLOPs by the same code; for milliseconds, the model with nothing in it).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from vistok.host import Picture as Seen
from vistok.host import Reducer, Session, apply
from vistok.host.recipe import Swapped
from vistok.world import Picture, Question
from vistok.zoo.asking import ask, ask_again, encode, is_right

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

DENSE = "dense"


@dataclass(frozen=True)
class Case:
    """One question on one picture; ``truth`` where the answer and its evidence are known."""

    picture: Image.Image
    question: str
    truth: Question | None = None
    name: str = ""
    """What the picture is called in a report."""
    first: tuple[str, str] | None = None
    """A question that is asked before, and the answer that the dialogue gives to it."""
    beside: Image.Image | None = None
    """A second picture of the prompt, which the question is not about."""
    place: int = 0
    """Which of the two ``picture`` is."""

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """Those of the prompt, in order."""
        if self.beside is None:
            return (self.picture,)
        return (self.beside, self.picture) if self.place else (self.picture, self.beside)


@dataclass(frozen=True)
class Answered:
    """What one method made of one case. None: not known (no truth, no grid)."""

    answer: str
    correct: bool | None
    tokens_in: int
    tokens_input: int
    """What the language model was given."""
    tokens_kept: float
    """Mean over the decoder's layers."""
    evidence_recall: float | None
    """Share of the answer's pixels that lie under a token that was kept, mean over the decoder's layers."""
    grid: tuple[int, int] | None = None
    """Of all tokens, before the method."""
    kept: tuple[int, ...] = ()
    """Positions, in raster order, of the tokens that were left after the last stage."""
    overlay: Image.Image | None = field(default=None, compare=False, repr=False)
    """The picture with what was dropped darkened, where it was asked for."""


@dataclass(frozen=True)
class Cost:
    """What one question costs. ``ttft_ms``: median milliseconds from pixels to the first token."""

    ttft_ms: float
    flops: float
    """Encoder, projector and language model up to the first token, from shapes."""
    kv_bytes: int
    """After the prompt."""


def cases_of(pictures: Sequence[Picture], families: Sequence[str] = ()) -> list[Case]:
    """Every question of the pictures (of these families; () is all)."""
    return [
        Case(picture.pil(), question.text, question, picture.task)
        for picture in pictures
        for question in picture.questions
        if not families or question.family in families
    ]


def method_name(method: Any) -> str:
    """How a method is called in tables: a name stays, an instance is called by its class's slug, None is dense."""
    if method is None:
        return DENSE
    if isinstance(method, str):
        return method
    if isinstance(method, Swapped):
        return method.name
    if isinstance(method, Reducer):
        return type(method).__module__.rpartition(".")[2].replace("_", "-")
    return "+".join(method_name(part) for part in method)


def is_dense(method: Any) -> bool:
    """Whether it stands for the model as it is."""
    return method is None or method == DENSE


def applied(model: PreTrainedModel, method: Any, keep: float | int, **how: Any) -> Session:
    """``vistok.apply``; for the dense model with a reducer that is never asked, since all tokens stay."""
    return apply(model, Reducer(), keep=1.0) if is_dense(method) else apply(model, method, keep=keep, **how)


def evidence_recall(evidence: np.ndarray, grid: tuple[int, int], keep: Sequence[int]) -> float:
    """Share of the pixels of ``evidence`` (H, W bool) that lie under a kept token of the (h, w) grid; 1 if none."""
    h, w = grid
    kept = np.zeros(h * w, dtype=bool)
    kept[np.asarray(keep, dtype=int)] = True
    rows = np.arange(evidence.shape[0]) * h // evidence.shape[0]
    columns = np.arange(evidence.shape[1]) * w // evidence.shape[1]
    seen = kept.reshape(h, w)[np.ix_(rows, columns)]
    return float(seen[evidence].mean()) if evidence.any() else 1.0


def mean_recall(evidence: np.ndarray, seen: Seen, num_layers: int) -> float | None:
    """``evidence_recall`` averaged over the decoder's layers, as tokens are; None where the tokens form no one grid, or
    no pixel is known to be evidence."""
    if seen.grid is None or not evidence.any():
        return None
    total, now = 0.0, evidence_recall(evidence, seen.grid, seen.keep.tolist())
    for layer in range(num_layers):
        if layer in seen.layer_keep:
            now = evidence_recall(evidence, seen.grid, seen.layer_keep[layer].tolist())
        total += now
    return total / num_layers


def answer_all(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    method: Any,
    keep: float | int,
    cases: Sequence[Case],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    reselect: bool = False,
    overlay_side: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answered]:
    """The answers of one method, in batches; the cases all have a first turn, or none has.

    ``reselect``: in a second turn the method chooses anew. ``overlay_side``: draw overlays whose longer side is about
    that many pixels; 0: none. ``on_batch`` is told how many cases each batch had.
    """
    made: list[Answered] = []
    num_layers = model.config.get_text_config().num_hidden_layers
    with applied(model, method, keep, reselect=reselect) as session:
        for start in range(0, len(cases), batch_size):
            batch = cases[start : start + batch_size]
            answers = answer_batch(model, processor, batch, max_new_tokens)
            seen_of = {(picture.row, picture.index): picture for picture in session.pictures}
            for row, (case, answer) in enumerate(zip(batch, answers, strict=True)):
                seen = seen_of[row, case.place]
                recall = mean_recall(case.truth.evidence, seen, num_layers) if case.truth else None
                correct = is_right(case.truth, answer) if case.truth else None
                drawn = None
                if overlay_side:
                    shown = resized(case.picture, overlay_side)
                    drawn = session.overlay(shown, session.pictures.index(seen), fit_of(processor, seen))
                tokens = (seen.tokens_in, seen.tokens_kept, seen.mean_tokens(num_layers))
                kept = tuple(seen.layer_keep[max(seen.layer_keep)] if seen.layer_keep else seen.keep)
                made.append(Answered(answer, correct, *tokens, recall, seen.grid, tuple(map(int, kept)), drawn))
            if on_batch:
                on_batch(len(batch))
    return made


def answer_batch(
    model: PreTrainedModel, processor: ProcessorMixin, cases: Sequence[Case], max_new_tokens: int = 16
) -> list[str]:
    """Greedy answers of the model as it is now, all cases in one batch; in a dialogue, to the second question."""
    how = {"batch_size": len(cases), "max_new_tokens": max_new_tokens}
    pictures = [case.pictures for case in cases]
    turns = [(*case.first, case.question) for case in cases if case.first]
    if len(turns) == len(cases):
        return ask_again(model, processor, pictures, turns, **how)
    if turns:
        raise ValueError("cases: got some with a first turn and some without, must be all of one kind")
    return ask(model, processor, pictures, [case.question for case in cases], **how)


def resized(picture: Image.Image, side: int) -> Image.Image:
    """The picture with a longer side of about ``side`` pixels; a small one is enlarged by a whole factor, unblurred."""
    longest = max(picture.size)
    if longest < side:
        factor = round(side / longest)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * side / longest)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def fit_of(processor: ProcessorMixin, seen: Seen) -> Literal["stretch", "crop"]:
    """How the processor brings a picture to the encoder's shape, see ``Session.overlay``."""
    reads = processor.image_processor
    cropped = getattr(reads, "do_center_crop", False) and "shortest_edge" in (getattr(reads, "size", None) or {})
    return "crop" if cropped and not seen.crops else "stretch"


@torch.inference_mode()
def cost_all(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: Sequence[tuple[Any, float | int]],
    case: Case,
    *,
    repeats: int = 5,
) -> list[Cost]:
    """Cost of the first token of one question for each (method, keep), all measured in turn: A B C A B C ...

    The first round warms up and is not counted.
    """
    inputs = encode(processor, [case.pictures], [case.question]).to(model.device)
    times: list[list[float]] = [[] for _ in settings]
    counts: list[tuple[float, int]] = []
    for method, keep in settings:
        with applied(model, method, keep) as session:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        counts.append((session.flops, session.kv_bytes))
    for _ in range(repeats):
        for taken, (method, keep) in zip(times, settings, strict=True):
            with nullcontext() if is_dense(method) else apply(model, method, keep=keep):
                synchronise(model)
                start = time.perf_counter()
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
                synchronise(model)
                taken.append(1e3 * (time.perf_counter() - start))
    return [Cost(statistics.median(taken), *count) for taken, count in zip(times, counts, strict=True)]


def synchronise(model: PreTrainedModel) -> None:
    """Wait until the model's device has done all it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

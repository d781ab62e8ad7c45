"""What answers are worth beyond right and wrong: agreement, the probability of an answer, calibration, chrF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vistok.zoo.asking import Shown, encode, is_diffusion, same_answer

from .statistics import wilson

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, ProcessorMixin

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AnswerProbability:
    """How probable given answers are, (n,) each, in 0 .. 1."""

    mean: Floats
    """Of the answer's tokens, each after the right ones before it."""
    product: Floats
    """Of all of them: that the answer begins so when tokens are drawn."""


@dataclass(frozen=True)
class Calibration:
    """``error``: the expected calibration error, in 0 .. 1. ``table``: one row a bin that holds answers, see
    ``calibration``."""

    error: float
    table: list[dict[str, Any]]


def exact_match(answers: Sequence[str], right: Sequence[str]) -> NDArray[np.bool_]:
    """(n,) bool: equal after trimming; upper and lower case count as the same."""
    _check_equally_many("right", right, answers)
    return np.array([same_answer(r, a) for r, a in zip(right, answers, strict=True)], dtype=bool)


def agreement(answers: Sequence[str], dense: Sequence[str]) -> Estimate:
    """The share of questions answered as the dense model answers them, right or wrong, with its Wilson interval.

    ValueError for unequal numbers, or none.
    """
    same = exact_match(answers, dense)
    if not len(same):
        raise ValueError("answers: got none, must be at least one")
    return Estimate(float(same.mean()), *wilson(int(same.sum()), len(same)))


@torch.inference_mode()
def answer_probability(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[Shown],
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 32,
) -> AnswerProbability:
    """How probable the model finds each of ``answers``, the token that ends an answer not counted.

    Teacher forcing: the prompt is read as for an answer, then all tokens of the answer in one forward on its cache. So
    inside ``vistok.apply`` a method chooses by the question alone; appended to the prompt, the answer would be among
    what it chooses by. Not for ``reselect=True``, where the answer would count as the next question.

    Raises ValueError for unequal numbers, an answer without tokens, or a masked-diffusion model.
    """
    if is_diffusion(model):
        raise ValueError("model: got a masked-diffusion model, must be one that writes token after token")
    _check_equally_many("questions", questions, pictures)
    _check_equally_many("answers", answers, pictures)
    means, products = [], []
    for start in range(0, len(answers), batch_size):
        rows = slice(start, start + batch_size)
        inputs = encode(processor, pictures[rows], questions[rows]).to(model.device)
        said = processor.tokenizer(list(answers[rows]), add_special_tokens=False, padding=True, return_tensors="pt")
        said = said.to(model.device)
        ids, real = said["input_ids"], said["attention_mask"].bool()
        if not bool(real.any(1).all()):
            empty = int(real.any(1).int().argmin())
            raise ValueError(f"answers: got {answers[start + empty]!r}, must have at least one token")
        first, cache = _last_logits(model, 1, inputs)
        both: dict[str, Any] = {
            name: torch.cat([inputs[name], said[name]], 1) for name in ("input_ids", "attention_mask")
        }
        later, _ = _last_logits(model, ids.shape[1], {**both, "past_key_values": cache, "cache_implementation": None})
        # Answers end in the last column. What comes after a token tells of the next; after the prompt, of the first.
        logits = torch.cat([first, later[:, :-1]], 1)
        logits[torch.arange(len(ids)), (~real).sum(1)] = first[:, 0]
        log = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0].double()
        means.append((log.exp() * real).sum(1) / real.sum(1))
        products.append((log * real).sum(1).exp())
    if not means:
        return AnswerProbability(np.zeros(0), np.zeros(0))
    return AnswerProbability(torch.cat(means).cpu().numpy(), torch.cat(products).cpu().numpy())


def calibration(
    confidence: ArrayLike, right: ArrayLike, bins: int = 15, by: Literal["width", "mass"] = "width"
) -> Calibration:
    """Whether answers of confidence c are right c of the time (Guo et al., 2017, "On Calibration of Modern Neural
    Networks").

    ``confidence`` (n,) in 0 .. 1: the probability of the model's own answers; ``right`` (n,) bool. ``by``: bins of
    equal "width", ((b - 1) / bins, b / bins], or of equal "mass", as many answers in each, in order of confidence. The
    error is the mean over the answers of |share that is right - mean confidence| of their bin. A row of the table:
    {"low", "high": of the bin, or of the answers in it; "n", "confidence", "accuracy"}.
    """
    sure, good = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    if sure.ndim != 1 or sure.shape != good.shape or not len(sure):
        raise ValueError(f"right: got shape {good.shape} for {sure.shape}, must be as many, and at least one")
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError(f"confidence: got {sure.min()} .. {sure.max()}, must be in 0 .. 1")
    if bins < 1:
        raise ValueError(f"bins: got {bins}, must be at least 1")
    if by == "width":
        edges = np.arange(bins + 1) / bins
        place = np.digitize(sure, edges[1:-1], right=True)
        members = [np.flatnonzero(place == number) for number in range(bins)]
    elif by == "mass":
        members = np.array_split(np.argsort(sure, kind="stable"), bins)
    else:
        raise ValueError(f"by: got {by!r}, must be 'width' or 'mass'")
    table, error = [], 0.0
    for number, mine in enumerate(members):
        if not len(mine):
            continue
        low, high = (edges[number], edges[number + 1]) if by == "width" else (sure[mine].min(), sure[mine].max())
        mean, share = float(sure[mine].mean()), float(good[mine].mean())
        error += len(mine) / len(sure) * abs(share - mean)
        table.append({"low": float(low), "high": float(high), "n": len(mine), "confidence": mean, "accuracy": share})
    return Calibration(error, table)


def chrf(said: str, right: str, order: int = 6, beta: float = 2.0) -> float:
    """chrF of one text, 0 .. 100 (Popovic, 2015, "chrF: character n-gram F-score for automatic MT evaluation").

    The F-score of the precision and recall of character n-grams, each a mean over n = 1 .. ``order``, white space
    removed; n for which one of the texts is too short are left out. As sacrebleu's sentence score with its defaults.
    """
    a, b = ("".join(text.split()) for text in (said, right))
    precision, recall, orders = 0.0, 0.0, 0
    for n in range(1, order + 1):
        mine, wanted = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (a, b))
        if mine and wanted:
            common = (mine & wanted).total()
            precision, recall, orders = precision + common / mine.total(), recall + common / wanted.total(), orders + 1
    if precision + recall == 0:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _last_logits(model: PreTrainedModel, count: int, inputs: Mapping[str, Any]) -> tuple[Tensor, Cache]:
    """(B, count, V): the logits of the last tokens of a forward, which ``generate`` prepares as for an answer; and the
    cache that it leaves."""
    caught: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: caught.append(output.logits[:, -count:]))
    try:
        how = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
        read = model.generate(**inputs, **how, logits_to_keep=count)
    finally:
        hook.remove()
    return caught[0], read.past_key_values


def _check_equally_many(name: str, values: Sequence[Any], others: Sequence[Any]) -> None:
    if len(values) != len(others):
        raise ValueError(f"{name}: got {len(values)} for {len(others)}, must be as many")

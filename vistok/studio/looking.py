"""A question put to a model once for each method, and all that is to be seen of it. Knows nothing of Gradio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vistok import catalogue
from vistok.bench.measure import DENSE, Case, Cost, applied, cost_all, fit_of, mean_recall, resized
from vistok.bench.pictures import Unusable
from vistok.host import Reducer, Session
from vistok.host.attending import AnswerAttention
from vistok.host.effort import Effort
from vistok.host.watch import Choice, Watched
from vistok.studio.sessions import Stop
from vistok.studio.state import Loaded
from vistok.zoo.asking import encode, is_diffusion, is_right, picture_token

if TYPE_CHECKING:
    from PIL import Image

    from vistok.host import Picture as Seen

ANSWER_TOKENS = 64
SIDE = 448
"""Pixels of a shown picture's longer side, about."""
REPEATS = 5


@dataclass(frozen=True)
class Stage:
    """What a method chose by at one place. All over the N tokens of the picture."""

    layer: int | None
    """The decoder layer before which it was, None: before the language model."""
    scores: np.ndarray | None
    """(N,) float64, NaN where a token was not there; None: the method gives its tokens no score here."""
    ranks: np.ndarray | None
    """(N,) int64, 1 is the best, 0 where a token was not there; None without scores."""
    of: np.ndarray
    """(N,) int64: among how many tokens each was ranked (in a picture that was cut, those of its part)."""
    order: np.ndarray | None
    """(N,) int64: as which one a token was picked, 0: it was not; None where the method names no order."""


@dataclass(frozen=True)
class Sight:
    """What one method made of the question. N visual tokens, L decoder layers."""

    method: str
    answer: str
    correct: bool | None
    tokens_kept: float
    """Mean over the decoder's layers."""
    recall: float | None
    """Share of the answer's pixels under a token that was kept, mean over the layers; None: not known."""
    places: np.ndarray
    """(L, N) int64: the token at whose place each decoder layer was given this one: its own, or that of the slot that
    it was merged into; -1 where it was gone."""
    stages: tuple[Stage, ...]
    attention: np.ndarray | None
    """(L, N) float32: attention of the answer's tokens, mean over them and over heads, NaN where a token was gone; None
    where the method or the model does not let it be read."""
    cost: Cost | None = None
    """None until it was measured."""


@dataclass(frozen=True)
class Failed:
    """A method that cannot work here, and why."""

    method: str
    reason: str


@dataclass(frozen=True)
class Run:
    """A question so far. ``sights``: by method, the dense model first; those of ``waiting`` are still to come."""

    model: str
    case: Case
    keep: float
    waiting: tuple[str, ...]
    sights: tuple[Sight | Failed, ...] = ()
    grid: tuple[int, int] | None = None
    """Of the visual tokens; None where the model cuts the picture, so that they form no one grid."""
    tokens: int = 0
    """Visual tokens of the picture."""
    fit: str = "stretch"
    """How the processor brings the picture to a square: "stretch" or centre "crop"."""
    overlays: tuple[Image.Image, ...] = ()
    """Without a ``grid``, the kept tokens of each sight over the picture."""
    timed: bool = False

    @property
    def done(self) -> bool:
        return self.timed and not self.waiting

    @property
    def seen(self) -> tuple[Sight, ...]:
        """The sights that are no failures."""
        return tuple(sight for sight in self.sights if isinstance(sight, Sight))


def look(
    loaded: Loaded, model: str, case: Case, methods: Sequence[str], keep: float, seed: int, stop: Stop
) -> Iterator[Run]:
    """Ask with all tokens, then with each of ``methods``; a longer Run after each answer, then one with the costs,
    which are measured in turn. The model is held for one answer at a time, so that others come in between.

    Raises Unusable for a question that cannot be put, ValueError for a model or picture that the host does not take,
    and Stopped.
    """
    check(loaded, case)
    names = (DENSE, *(name for name in dict.fromkeys(methods) if name != DENSE))
    run = Run(model, case, keep, names)
    yield run
    made: dict[str, list[Reducer] | None] = {}
    for name in names:
        made[name] = None if name == DENSE else [catalogue.create_seeded(name, seed)]
        with stop.holding(loaded.lock), stop.inside(loaded.model):
            try:
                run = _with(run, *_answer(loaded, name, made[name], keep, case))
            except ValueError as error:
                if name == DENSE:
                    raise
                run = replace(run, sights=(*run.sights, Failed(name, str(error))), waiting=run.waiting[1:])
                run = replace(run, overlays=(*run.overlays, *run.overlays[:1]))
        yield run
    settings = [(made[sight.method], 1.0 if sight.method == DENSE else keep) for sight in run.seen]
    with stop.holding(loaded.lock), stop.inside(loaded.model):
        costs = iter(cost_all(loaded.model, loaded.processor, settings, case, repeats=REPEATS))
    timed = (replace(sight, cost=next(costs)) if isinstance(sight, Sight) else sight for sight in run.sights)
    yield replace(run, sights=tuple(timed), timed=True)


def check(loaded: Loaded, case: Case) -> None:
    """Raises Unusable for what this model cannot be asked."""
    if is_diffusion(loaded.model):
        raise Unusable("model", "must answer token by token; this one answers by masked diffusion")
    token = picture_token(loaded.model, loaded.processor)
    if token is not None and token in loaded.processor.tokenizer.tokenize(case.question):
        raise Unusable("question", f"must not hold {token}, which stands for a picture")


def _with(run: Run, sight: Sight, seen: Seen, fit: str, overlay: Image.Image | None) -> Run:
    overlays = run.overlays if overlay is None else (*run.overlays, overlay)
    return replace(
        run,
        waiting=run.waiting[1:],
        sights=(*run.sights, sight),
        grid=seen.grid,
        tokens=seen.tokens_in,
        fit=fit,
        overlays=overlays,
    )


@torch.inference_mode()
def _answer(
    loaded: Loaded, name: str, reducers: Sequence[Reducer] | None, keep: float, case: Case
) -> tuple[Sight, Seen, str, Image.Image | None]:
    model, processor = loaded.model, loaded.processor
    watched = [method if isinstance(method, Effort) else Watched(method) for method in reducers or ()]
    inputs = encode(processor, [case.picture], [case.question]).to(model.device)
    with applied(model, watched or None, keep) as session, _attention(session) as attention:
        made = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        seen = session.pictures[0]
        fit = fit_of(processor, seen)
        overlay = None if seen.grid else session.overlay(resized(case.picture, SIDE), 0, fit)
    new = made[:, inputs["input_ids"].shape[1] :]
    answer = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    depth = model.config.get_text_config().num_hidden_layers
    choices = [method.seen for method in watched if isinstance(method, Watched)]
    sight = Sight(
        method=name,
        answer=answer,
        correct=is_right(case.truth, answer) if case.truth else None,
        tokens_kept=seen.mean_tokens(depth),
        recall=mean_recall(case.truth.evidence, seen, depth) if case.truth else None,
        places=_places([choice for chosen in choices for choice in chosen], seen, depth),
        stages=tuple(stage for chosen in choices for stage in _stages(chosen, seen)),
        attention=None if attention is None else attention.rows.mean(1).numpy(),
    )
    return sight, seen, fit, overlay


def _attention(session: Session) -> Any:
    try:
        return AnswerAttention(session)
    except ValueError:  # says that it cannot be read
        return nullcontext()


def _places(seen: Sequence[Choice], picture: Seen, depth: int) -> np.ndarray:
    """(L, N) int64, see ``Sight.places``."""
    own = np.arange(picture.tokens_in)
    source, keep = picture.source.cpu().numpy(), picture.keep.cpu().numpy()
    now = np.where(source < 0, -1, keep[np.maximum(source, 0)])
    count, rows = len(keep), []
    for layer in range(depth):
        if layer in picture.layer_keep:
            left = picture.layer_keep[layer].cpu().numpy()
            if len(left) > count:  # all are back
                now = own
            for choice in seen:
                if choice.layer == layer:
                    into = np.full(len(own) + 1, -1)  # the last is where -1 reads
                    into[choice.index[0].numpy()] = choice.into[0].numpy()
                    now = into[now]
            now, count = np.where(np.isin(now, left), now, -1), len(left)
        rows.append(now)
    return np.stack(rows)


def _stages(seen: Sequence[Choice], picture: Seen) -> list[Stage]:
    """The choices of one method, those of the parts of a cut picture put together."""
    stages: dict[int | None, Stage] = {}
    n = picture.tokens_in
    for choice in seen:
        index, ranks = choice.index[0].numpy(), choice.ranks
        blank = Stage(choice.layer, None, None, np.zeros(n, np.int64), None)
        stage = stages.get(choice.layer, blank)
        stage.of[index] = len(index)
        scores, placed, order = stage.scores, stage.ranks, stage.order
        if choice.scores is not None and ranks is not None:
            scores = np.full(n, np.nan) if scores is None else scores
            placed = np.zeros(n, np.int64) if placed is None else placed
            scores[index], placed[index] = choice.scores[0].double().numpy(), ranks[0].numpy()
        if choice.order is not None:
            order = np.zeros(n, np.int64) if order is None else order
            order[choice.order[0].numpy()] = np.arange(1, choice.order.shape[1] + 1)
        stages[choice.layer] = Stage(choice.layer, scores, placed, stage.of, order)
    return list(stages.values())


def last_places(places: np.ndarray) -> np.ndarray:
    """(N,) the place of each token in the last layer that was given it, -1: in none."""
    last = np.full(places.shape[1], -1)
    for row in places:
        last = np.where(row >= 0, row, last)
    return last


def sizes(places: np.ndarray) -> np.ndarray:
    """(N,) how many tokens share each token's place, 0 where it is gone."""
    counts = np.bincount(places[places >= 0], minlength=len(places))
    return np.where(places < 0, 0, counts[np.maximum(places, 0)])

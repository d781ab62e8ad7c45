"""A system's card: what the catalogue says of it. Pure data; this module imports neither torch nor a system."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["training-free", "calibrated", "trained", "control", "measurement"]
"""calibrated: no weights are trained, but something is fitted or searched once per model."""
Mechanism = Literal["transformation", "similarity", "attention", "query"]
Modality = Literal["image", "video", "3d", "audio"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a system is, where it acts and where it comes from.

    A system's module states its card once, as ``CARD = Card(...)`` with literal arguments, so that the catalogue can
    read it from the source text without importing the module (and torch with it). ``slug``, ``family`` and ``hyper``
    are filled in by the registry: the first two from the file's place, ``hyper`` from the fields of the system's class.
    """

    title: str
    kind: Kind
    site: str
    """Where it acts, e.g. "projector output, before the language model"."""
    paper: str
    """Citation, or "" for a control."""
    repository: str = ""
    """The authors' repository as owner/name, or "" where none was released."""
    needs: tuple[str, ...] = ()
    """What it asks of the host, in words: "class-token attention", "question embeddings", ..."""
    mechanism: tuple[Mechanism, ...] = ()
    """What decides which tokens stay, one or more: transformation (a fixed map such as pooling), similarity of visual
    tokens, attention weights, query (the question's text). () for a control."""
    modality: Modality = "image"
    """What the method was made for."""
    score: str = ""
    allocate: str = ""
    select: str = ""
    merge: str = ""
    """The recipe's choice for each slot (see vistok.reduce); "" where the slot is not used."""
    claim: str = ""
    """The one sentence of the paper that ``vistok try`` measures on this machine."""
    departures: tuple[str, ...] = ()
    """Where the default rightly departs from the released code; ``parity="authors"`` gives the released behaviour."""
    slug: str = ""
    family: str = ""
    hyper: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What measuring a claim gave: one figure with the system, one without it, and whether the claim held."""

    metric: str
    baseline: float
    value: float
    holds: bool
    note: str = ""


class Trial(Protocol):
    """What a claim is measured with; ``vistok.bench`` implements it on the embedded model and the world.

    ``method`` is an instance of a reducer, or None for the model as it is. ``keep`` counts as in ``vistok.apply``.
    The same pictures and questions are used by every call of one trial.
    """

    def accuracy(self, method: Any, keep: float | int = 1.0, tasks: tuple[str, ...] = ()) -> float:
        """Share of the world's questions answered right, in [0, 1]; ``tasks`` are question families, () is all."""
        ...

    def evidence_recall(self, method: Any, keep: float | int, tasks: tuple[str, ...] = ()) -> float:
        """Mean share of the answer's pixels that lie under a token that was kept, in [0, 1]."""
        ...

    def ttft_ms(self, method: Any, keep: float | int = 1.0) -> float:
        """Median milliseconds to the first token, picture encoding included, interleaved with the dense model."""
        ...

    def diffusion_accuracy(self, prune: Any) -> float:
        """As ``accuracy``, of the zoo's masked-diffusion model; ``prune``: a StepPrune of dmllm-redundancy, or None."""
        ...

    def diffusion_ms(self, prune: Any) -> float:
        """Median milliseconds to its whole answer, picture encoding included, interleaved with the dense model."""
        ...


class ViTTrial(Protocol):
    """What a claim about vision transformers is measured with; ``vistok.bench.vit_trial`` implements it.

    ``method``: what ``vistok.apply`` takes, or None for the model as it is. ``model``: a module in place of the zoo's.
    """

    pictures: int
    """How many held-out pictures there are."""
    seed: int
    """Of trainings."""
    size: int
    """Pixels of a picture's side."""

    def accuracy(self, method: Any = None, keep: Any = None, *, model: Any = None, **hyper: Any) -> float:
        """Share of held-out pictures whose object is named right, in [0, 1]."""
        ...

    def miou(self, method: Any = None, keep: Any = None, *, model: Any = None, **hyper: Any) -> float:
        """Mean intersection over union of a segmenter's maps of held-out scenes, in [0, 1]."""
        ...

    def recall(self, method: Any = None, keep: Any = None, *, k: int = 1, model: Any = None, **hyper: Any) -> float:
        """Share of views for which one of the ``k`` nearest others is of the same place, in [0, 1]."""
        ...

    def mask_score(self, method: Any, keep: Any = None, *, model: Any = None, **hyper: Any) -> Any:
        """``precision``, ``recall`` and ``chance`` of the kept patches against the object's mask, each in [0, 1]."""
        ...

    def milliseconds(self, method: Any = None, keep: Any = None, *, batch: int = 1, **hyper: Any) -> float:
        """Median milliseconds of a forward pass, taken in turn with the plain model."""
        ...

    @property
    def classifier(self) -> Any:
        """The zoo's classifier of objects, not to be trained."""
        ...

    @property
    def segmenter(self) -> Any:
        """The zoo's segmenter of scenes, not to be trained."""
        ...

    def score(self, task: Any, model: Any) -> dict[str, float]:
        """What ``model`` gets on held-out pictures of ``task``, each figure in [0, 1]."""
        ...

    def draw(self, task: Any, n: int) -> Any:
        """A batch of the first ``n`` pictures that ``fit`` trains on: ``images``, ``pixels``, ``label``, ``truth``."""
        ...

    def fresh(self, task: Any = "objects") -> Any:
        """A copy of the zoo's model for ``task`` ("objects", "scenes", "places"), to be trained."""
        ...

    def fit(self, model: Any, steps: int, **how: Any) -> list[float]:
        """Train ``model`` in place with, if given, ``method`` in it; the losses. Equal seeds see equal pictures."""
        ...


class AttendTrial(Protocol):
    """What a claim about an attention operator is measured with; ``vistok.bench.attend_trial`` implements it."""

    seed: int
    """Of tensors and trainings."""

    def milliseconds(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Median milliseconds of each of ``runs``, all taken in turn."""
        ...

    def draw(self, rng: Any, count: int = 64) -> tuple[Any, Any]:
        """Handwritten digits to train on: pictures (count, 1, 8, 8) in -1 .. 1 and labels (count,)."""
        ...

    def fit(self, model: Any, steps: int, *, loss: Any = None, peak_lr: float = 2e-3) -> list[float]:
        """Train ``model`` in place on digits, or on what ``loss``, (model, rng) -> scalar, draws; the losses."""
        ...

    def accuracy(self, model: Any, change: Any = None) -> float:
        """Share of digits by other writers that ``model`` tells right, in [0, 1]; ``change``: of the pictures."""
        ...


class TokenizeTrial(Protocol):
    """What a claim about a tokenizer is measured with; ``vistok.bench.tokenize_trial`` implements it."""

    pictures: int
    """How many held-out pictures there are."""
    seed: int
    """Of trainings."""
    size: int
    """Side of a picture in pixels."""

    def fit(self, model: Any, steps: int, *, loss: Any = None, **how: Any) -> list[float]:
        """Train ``model`` in place on pictures of the world; the losses. Equal seeds see equal pictures.

        ``loss``: (model, pictures, labels) -> scalar, in place of the tokenizer's ``objective``.
        """
        ...

    def vision(self, prefix: bool = False) -> Any:
        """The zoo's frozen vision transformer: pictures (B, 3, S, S) in [0, 1] to patch features (B, 144, 96)."""
        ...

    def psnr(self, model: Any, k: int | None = None) -> float:
        """Mean over held-out pictures, in dB, of all tokens or of the first ``k``."""
        ...

    def probe(self, features: Any, ridge: float = 1e-2) -> float:
        """Share of held-out pictures whose object a linear read-out of ``features(pictures)`` (B, D) names right."""
        ...

    def code_loss(self, model: Any, generator: Any, steps: int, *, peak_lr: float = 2e-3) -> float:
        """Nats that a held-out picture's ids cost a causal model that was trained on ids of others."""
        ...

    def usage(self, model: Any) -> float:
        """Share of the codes that held-out pictures use, in [0, 1]; mean over columns of ids."""
        ...

    def held_out(self) -> Iterator[tuple[Any, Any]]:
        """Batches of held-out pictures (B, 3, S, S) in [0, 1] and which of 18 objects each shows, (B,)."""
        ...


Claim = (
    Callable[[Trial], Outcome]
    | Callable[[ViTTrial], Outcome]
    | Callable[[AttendTrial], Outcome]
    | Callable[[TokenizeTrial], Outcome]
)
"""A system's module defines ``claim(trial: Trial) -> Outcome``; vit, attend and tokenize have trials of their own."""

"""Attention debiasing: a pruner's attention scores without what they owe to a token's place and to padding.

What: attention from text to visual tokens grows with a token's place in the sequence and is inflated on the padding of
a letterboxed picture, so that pruners keep bottom rows and bars. The trend of a pruner's mean score over many pictures
is fitted once for a model (``calibrate``) by f(x) = mu * exp(sigma * x), x = i / L for token i of L; then the pruner
sees its attention divided by f, and 0 at padding. Its own choice follows. Source: Zhao et al., arXiv 2508.17807,
intcomp/attention-bias. Where: wherever ``method`` acts, of which this is a wrapper; by default ``fastv``.

Which attention: every field of attention to single tokens that the method reads (``FIELDS``). One fit is of one layer,
so only a method's first reduction is corrected, as in the authors' patches of PyramidDrop and SparseVLM
(``first_only``). mu scales all scores alike and decides nothing. The least squares are those of the scores themselves;
the release has weights (exactly 1 / f, with f(0) = 1; for FastV a spline), not the fit. The default sigma is that of
the study of LLaVA-1.5-7B for FastV: calibrate for other models, layers and methods.

Departures: the count is kept. The released code keeps fewer tokens where fewer than ``keep`` are not padding; here
padding fills up, after all else. The letterbox is that of ``size``, one for all pictures of a session.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, Trial
from vistok.core.score import received
from vistok.core.tensors import upcast
from vistok.host import apply
from vistok.host.reducer import Evidence, Reducer
from vistok.host.wrapper import Wrapper

CARD = Card(
    title="Attention Debiasing for Token Pruning in Vision Language Models",
    kind="calibrated",
    site="wherever the method acts that it wraps (FastV: one early decoder layer)",
    paper="Zhao et al., 2025, arXiv 2508.17807",
    repository="intcomp/attention-bias",
    needs=("what its base method asks for, attention among it",),
    mechanism=("attention", "query"),
    score="attention / fitted trend of the position, 0 at padding",
    select="that of the base method (FastV)",
    claim="Attention without its trend makes FastV more accurate, at 2/9 of the visual tokens.",
    departures=("padding fills up the count where fewer tokens than that are not padding",),
)

FIELDS = (
    *("llm_attention", "llm_received", "llm_importance", "cls_attention", "wide_cls_attention"),
    *("received_attention", "encoder_attention"),
)
"""The fields of Evidence that are corrected; the tokens that receive the attention are the last axis of each."""


def fit_recency(scores: Tensor) -> tuple[float, float]:
    """(mu, sigma) of the trend ``mu * exp(sigma * i / L)`` in ``scores`` (M, L) of M pictures of L tokens.

    Least squares on the mean over the pictures, in float64; exact where the mean is such a curve. ValueError for fewer
    than two tokens or a mean that is not positive.
    """
    if scores.ndim != 2 or scores.shape[0] < 1 or scores.shape[1] < 2:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, must be (pictures, tokens) with two tokens or more")
    y = scores.double().mean(0)
    if not bool((y > 0).all()) or not bool(y.isfinite().all()):
        raise ValueError("scores: their mean over the pictures must be positive and finite at every token")
    x = torch.arange(len(y), dtype=torch.float64, device=y.device) / len(y)
    basis = torch.stack([torch.ones_like(x), x], 1)

    def error(fit: Tensor) -> float:
        return float((y - (basis @ fit).exp()).square().sum())

    fit = torch.linalg.lstsq(basis, y.log()[:, None]).solution[:, 0]  # (log mu, sigma)
    for _ in range(100):  # Gauss-Newton; a step is halved until it helps
        curve = (basis @ fit).exp()
        step = torch.linalg.lstsq(curve[:, None] * basis, (y - curve)[:, None]).solution[:, 0]
        while error(fit + step) > error(fit) and float(step.abs().max()) > 1e-12:
            step = step / 2
        fit = fit + step
        if float(step.abs().max()) <= 1e-12:
            break
    return float(fit[0].exp()), float(fit[1])


def padding_mask(
    width: int, height: int, grid: int = 24, threshold: float = 0.5, rule: Literal["area", "whole"] = "area"
) -> Tensor:
    """(grid, grid) bool, True at padding: a picture of ``width`` x ``height`` pixels padded to a square and resized.

    "area": a patch is padding if more than ``threshold`` of its area is. "whole": only rows or columns that are padding
    altogether, as many on either side (the rule of the authors' uncorrected runs).
    """
    for name, value in (("width", width), ("height", height), ("grid", grid)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, must be 1 or more")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, must be in [0, 1]")
    short, long = sorted((width, height))
    if rule == "whole":
        bar = float((grid - int(short * (grid / long))) // 2)
    elif rule == "area":
        bar = (long - short) / (2 * long) * grid
    else:
        raise ValueError(f"rule: got {rule!r}, must be 'area' or 'whole'")
    line = torch.arange(grid, dtype=torch.float64)
    seen = ((line + 1).clamp_max(grid - bar) - line.clamp_min(bar)).clamp_min(0)
    padded = 1 - seen > threshold
    return (padded[:, None] if width >= height else padded[None]).expand(grid, grid)


def debias(scores: Tensor, mu: float, sigma: float, pad: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """``scores`` (..., L) >= 0 without the trend ``mu * exp(sigma * i / L)``, in float32 at least.

    ``pad`` (L,) bool: 0 there, and above 0 elsewhere, so that padding comes after all else. ``index`` (..., L) int64:
    the tokens' places in the picture, the largest taken for the last; by default all places, in order.
    """
    scores = upcast(scores)
    if index is None:
        index = torch.arange(scores.shape[-1], device=scores.device)
    x = index.to(scores.dtype) / (index.amax(-1, keepdim=True) + 1)
    fair = scores / (mu * (sigma * x).exp())
    return fair if pad is None else fair.clamp_min(torch.finfo(fair.dtype).tiny).masked_fill(pad, 0)


@dataclass(frozen=True)
class _Recorder(Wrapper):
    """Leaves the method as it is and notes its scores of whole pictures."""

    method: str | Reducer = "fastv"
    scores: list[Tensor] = field(default_factory=list, compare=False, repr=False)
    """(B, N) of each call."""
    number: int = field(default_factory=count().__next__)
    """Two recorders are never the same method, which a result that was measured earlier would be taken for."""

    def see(self, evidence: Evidence) -> Evidence:
        if whole(evidence):
            self.scores.append(token_scores(evidence).detach().cpu())
        return evidence


@dataclass(frozen=True)
class AttentionDebias(Wrapper):
    """Divides the attention that a pruner sees by the trend of the position, and takes padding out of it."""

    method: str | Reducer = "fastv"
    """The pruner: the name of a system that scores by attention, or a Reducer."""
    mu: float = 1.0
    """Scale of the trend; decides nothing."""
    sigma: float = 0.91
    """Strength of the trend: attention grows by exp(sigma) from the first to the last token. 0: no correction."""
    size: tuple[int, int] | None = None
    """(width, height) in pixels of the pictures before they were padded to a square; None: they were not."""
    threshold: float = 0.5
    """Share of a patch's area above which it is padding."""
    first_only: bool = True
    """True: corrected only while no token of the picture is gone; False: in all stages, also behind other methods."""

    def __post_init__(self) -> None:
        if not self.mu > 0:
            raise ValueError(f"mu: got {self.mu}, must be greater than 0")
        if not {*self.base.needs, *self.base.layer_needs} & {*FIELDS}:
            raise ValueError(f"method: got {self.method!r}, must score by attention ({', '.join(FIELDS)})")
        if self.size is not None:
            padding_mask(*self.size, threshold=self.threshold)

    def see(self, evidence: Evidence) -> Evidence:
        if self.first_only and not whole(evidence):
            return evidence
        pad = self.padding(evidence)
        index = None if whole(evidence) else evidence.index

        def fair(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(fair, value))
            places = None if index is None else index.view(len(value), *[1] * (value.ndim - 2), -1)
            return debias(value, self.mu, self.sigma, pad, places)

        given = {name: value for name in FIELDS if (value := getattr(evidence, name)) is not None}
        return replace(evidence, **{name: fair(value) for name, value in given.items()})

    def padding(self, evidence: Evidence) -> Tensor | None:
        """(N,) bool of a picture on one square grid, or None where there is no padding or nothing else."""
        if self.size is None or evidence.grid is None or evidence.grid[0] != evidence.grid[1]:
            return None
        mask = padding_mask(*self.size, evidence.grid[0], self.threshold).flatten()
        return mask.to(evidence.features.device) if mask.any() and not mask.all() else None


def whole(evidence: Evidence) -> bool:
    """Whether no token of the pictures (or of these parts of them) is gone: what is left of one has no layout."""
    return evidence.grid is not None or bool(evidence.crops)


def token_scores(evidence: Evidence) -> Tensor:
    """(B, N): the first of ``FIELDS`` that is given, mean over layers, heads and (real) queries."""
    name = next(name for name in FIELDS if getattr(evidence, name) is not None)
    value = getattr(evidence, name)
    parts = [upcast(part) for part in (value if isinstance(value, tuple) else (value,))]
    if name == "llm_attention" and evidence.text_mask is not None and evidence.text_mask.shape[1] == value.shape[2]:
        return received(parts[0], evidence.text_mask)
    return torch.stack([part.flatten(1, -2).mean(1) if part.ndim > 2 else part for part in parts]).mean(0)


def calibrate(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], method: str | Reducer = "fastv", keep: float | int = 0.5
) -> tuple[float, float]:
    """(mu, sigma) of ``method``'s scores in ``model``, over the pictures of ``batches``.

    ``batches``: keyword arguments of ``model``, such as a processor gives them; pictures of one size, without padding,
    the more the better (the authors average over data sets). ``keep``: as for ``vistok.apply``; any that makes the
    method reduce. ValueError if it never did, or if pictures had different numbers of tokens.
    """
    recorder = _Recorder(method)
    with torch.no_grad(), apply(model, recorder, keep):
        for inputs in batches:
            model(**inputs)
    lengths = sorted({scores.shape[1] for scores in recorder.scores})
    if len(lengths) != 1:
        raise ValueError(f"batches: gave pictures of {lengths or 'no'} tokens that were scored, must be of one number")
    return fit_recency(torch.cat(recorder.scores))


def claim(trial: Trial) -> Outcome:
    """The gain on FastV at 128 of 576 tokens (59.6 to 62.5 on LLaVA-1.5-7B), calibrated on the same pictures."""
    recorder = _Recorder()
    plain = trial.accuracy(recorder, keep=2 / 9)
    system, note = AttentionDebias(), "sigma not calibrated"
    if recorder.scores:
        mu, sigma = fit_recency(torch.cat(recorder.scores))
        system, note = AttentionDebias(mu=mu, sigma=sigma), f"sigma {sigma:.2f} (paper: 0.91)"
    value = trial.accuracy(system, keep=2 / 9)
    return Outcome(
        "accuracy of FastV with 2/9 of the tokens", baseline=plain, value=value, holds=value > plain, note=note
    )

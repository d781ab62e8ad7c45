"""ImAge: a place's descriptor from a few learned tokens that join the patches half-way, and no aggregator.

What: before a middle block some learned tokens go into the sequence; the blocks from there on, which alone are trained,
fill them by their own attention; of the last norm's output they are taken, put end to end and made one long unit
vector. They begin at centres of the backbone's patch features (k-means), made unit and scaled so that a feature's share
in its nearest centre is on average a hundred times that in the second (NetVLAD's rule). Trained with the
multi-similarity loss on the pairs that its miner leaves. Source: Lu et al., arXiv 2511.06024, Lu-Feng/ImAge. Where:
input of a middle block of a ViT, and its output.

Departures: the tokens are put in behind the patches, not in front (attention sees no order, and the class token stays
first); rotary positions do not turn them. k-means begins with k-means++. Without features to begin at, the tokens are
noise of 0.02: the released 1e-6 makes them all but equal, and equal tokens get equal gradients for ever.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.cluster import k_means
from vistok.host import apply
from vistok.host.vit import ViTReducer
from vistok.host.vit.models import vit_of
from vistok.host.vit.reducer import AddTokens, TokenStep

CARD = Card(
    title="Towards Implicit Aggregation: Robust Image Representation for Place Recognition (ImAge)",
    kind="trained",
    site="input of a middle encoder block (learned tokens), and the descriptor made of them",
    paper="Lu et al., 2025, arXiv 2511.06024",
    repository="Lu-Feng/ImAge",
    mechanism=("attention",),
    needs=("patch features of the backbone, to begin at", "pictures of places, several views of each"),
    merge="self-attention of the later blocks fills the added tokens",
    claim="A dedicated aggregator is not necessary: descriptors from the backbone alone are the more robust.",
    departures=("tokens that begin as noise begin far enough apart to become different",),
)


class _Insert(ViTReducer):
    """Adds ``tokens`` (1, M, C) before block ``layer``."""

    def __init__(self, tokens: Tensor, layer: int) -> None:
        self.tokens, self.layer = tokens, layer

    @property
    def steps(self) -> Sequence[TokenStep]:
        return (AddTokens(self.tokens, self.layer),)


class _Descriptor(nn.Module):
    """A copy of ``backbone`` whose blocks from ``train_from`` on, and no other parts, can be trained.

    ``forward`` leaves unit descriptors (B, D). ``forward_features`` gives them as the one row of a picture, for code
    that pools a model's rows.
    """

    num_prefix_tokens = 0

    def __init__(self, backbone: nn.Module, train_from: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(False)
        blocks = vit_of(self.backbone).blocks
        if train_from not in range(len(blocks)):
            raise ValueError(f"insert_at: got {train_from}, but the model has the blocks 0..{len(blocks) - 1}")
        for block in blocks[train_from:]:
            block.module.requires_grad_(True)
        self.width: int = blocks[0].norm.weight.shape[0]

    def forward_features(self, pixels: Tensor) -> Tensor:
        """(B, 1, D)"""
        rows: Tensor = self(pixels)[:, None]
        return rows


class ImplicitAggregator(_Descriptor):
    """Descriptors (B, n_tokens * C) of pictures (B, 3, H, W): chunk i of ``C`` values is what token i came to hold.

    ``backbone``: a ViT of timm, or a tower of transformers; it is copied. ``tokens`` (1, n_tokens, C) are a parameter.
    """

    def __init__(self, backbone: nn.Module, n_tokens: int = 8, insert_at: int = 8) -> None:
        super().__init__(backbone, insert_at)
        if n_tokens < 0:
            raise ValueError(f"n_tokens: got {n_tokens}, must be 0 or more")
        self.insert_at = insert_at
        self.tokens = nn.Parameter(0.02 * torch.randn(1, n_tokens, self.width))

    def features(self, pixels: Tensor) -> Tensor:
        """(B, P + N + n_tokens, C): the last norm's output; the added tokens are the last."""
        with apply(self.backbone, _Insert(self.tokens, self.insert_at)):
            return dense(self.backbone, pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.features(pixels)
        first = features.shape[1] - self.tokens.shape[1]
        return normalize(features[:, first:].flatten(1).float(), dim=1)


class PooledDescriptor(_Descriptor):
    """What it is held against: patches pooled by their mean, or by the generalised mean (GeM, power 3). (B, C)"""

    def __init__(self, backbone: nn.Module, train_from: int = 8, pooling: Literal["gem", "mean"] = "gem") -> None:
        super().__init__(backbone, train_from)
        if pooling not in ("gem", "mean"):
            raise ValueError(f"pooling: got {pooling!r}, must be 'gem' or 'mean'")
        self.pooling = pooling

    def forward(self, pixels: Tensor) -> Tensor:
        rows = dense(self.backbone, pixels)[:, vit_of(self.backbone).prefix :].float()
        pooled = rows.mean(1) if self.pooling == "mean" else rows.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
        return normalize(pooled, dim=1)


def dense(backbone: Any, pixels: Tensor) -> Tensor:
    """(B, P + N, C): the last norm's output of a timm model, or the last hidden state of a tower of transformers."""
    timm = hasattr(backbone, "forward_features")
    rows: Tensor = backbone.forward_features(pixels) if timm else backbone(pixels).last_hidden_state
    return rows


@torch.no_grad()
def sample_features(backbone: nn.Module, pixels: Tensor, per_image: int = 100, seed: int = 0) -> Tensor:
    """(B * per_image, C) unit rows: the final features of so many patches of each of ``pixels`` (B, 3, H, W), drawn
    without replacement; of all patches where there are fewer."""
    rows = normalize(dense(backbone, pixels)[:, vit_of(backbone).prefix :].float(), dim=2)
    odds = torch.rand(rows.shape[:2], generator=torch.Generator().manual_seed(seed))
    index = odds.topk(min(per_image, rows.shape[1]), 1).indices.to(rows.device)
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1)


def scale_centres(centres: Tensor, features: Tensor) -> Tensor:
    """``centres`` (k, C), of any length, made unit and then all of the length alpha = -ln(0.01) / mean(top1 - top2).

    top1 and top2: a feature's largest and second largest product with the unit centres, over ``features`` (n, C). With
    one centre, alpha is -ln(0.01) over the mean product.
    """
    unit = normalize(centres, dim=1)
    top = (features @ unit.T).topk(min(2, len(unit)), 1).values
    lead = top[:, 0] - top[:, 1] if len(unit) > 1 else top[:, 0]
    return unit * (-log(0.01) / lead.mean())


def init_tokens(features: Tensor, k: int, iterations: int = 100, seed: int = 0) -> Tensor:
    """(k, C): scaled k-means centres of ``features`` (n, C), which are unit rows as of ``sample_features``."""
    return scale_centres(k_means(features, k, iterations, seed), features.float())


def multi_similarity(
    found: Tensor,
    label: Tensor,
    alpha: float = 1.0,
    beta: float = 50.0,
    base: float = 0.0,
    epsilon: float | None = 0.1,
) -> Tensor:
    """The multi-similarity loss of unit descriptors ``found`` (B, D) of the places ``label`` (B,) int64, a scalar.

    Mean over the rows of log(1 + sum exp(-alpha (s - base))) / alpha over the cosines s to others of its place, plus
    log(1 + sum exp(beta (s - base))) / beta over those to other places. Of these pairs, where ``epsilon`` is given,
    those that the miner leaves: the first below the row's largest of the second plus epsilon, the second above its
    least of the first minus epsilon. Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019.
    """
    with torch.autocast(found.device.type, enabled=False):  # exp(50 s) does not bear bfloat16
        cosine = found.float() @ found.float().T
    same = label[:, None] == label
    alike, other = same & ~torch.eye(len(label), dtype=torch.bool, device=label.device), ~same
    if epsilon is not None:
        least = cosine.masked_fill(~alike, torch.inf).amin(1, keepdim=True)
        most = cosine.masked_fill(~other, -torch.inf).amax(1, keepdim=True)
        alike, other = alike & (cosine - epsilon < most), other & (cosine + epsilon > least)
    one = cosine.new_zeros(len(cosine), 1)

    def summed(weight: float, pairs: Tensor) -> Tensor:
        logits = (weight * (cosine - base)).masked_fill(~pairs, -torch.inf)
        return torch.cat([one, logits], 1).logsumexp(1) / abs(weight)

    return (summed(-alpha, alike) + summed(beta, other)).mean()


@dataclass(frozen=True)
class ImAge:
    """Aggregation tokens, and the loss of their training."""

    n_tokens: int = 8
    """Learned tokens; the descriptor is so many times as long as a token."""
    insert_at: int = 8
    """The block before which they come in, the first that is trained (of 12)."""
    alpha: float = 1.0
    """How sharply the loss pulls views of a place together."""
    beta: float = 50.0
    """How sharply it pushes places apart."""
    base: float = 0.0
    """The cosine that it does both about."""
    epsilon: float = 0.1
    """The miner's margin."""

    def build(self, backbone: nn.Module, features: Tensor | None = None, seed: int = 0) -> ImplicitAggregator:
        """A copy of ``backbone`` with tokens that begin at centres of ``features`` (``sample_features``), or as noise
        (of torch's generator) where there are none."""
        made = ImplicitAggregator(backbone, self.n_tokens, self.insert_at)
        if features is not None and self.n_tokens:
            with torch.no_grad():
                made.tokens.copy_(init_tokens(features, self.n_tokens, seed=seed)[None])
        return made

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Loss, and the share of the batch's views whose nearest other is of their place. ``batch``: ``pixels``
        (B, 3, H, W) and ``label`` (B,)."""
        found = model(batch.pixels)
        loss = multi_similarity(found, batch.label, self.alpha, self.beta, self.base, self.epsilon)
        nearest = (found @ found.T).fill_diagonal_(-torch.inf).argmax(1)
        return loss, (batch.label[nearest] == batch.label).float().mean()


def claim(trial: ViTTrial, steps: int = 60) -> Outcome:
    """The abstract: robust descriptors without an aggregator. Here against GeM pooling of the same backbone, the zoo's
    model for places: the same blocks trained for ``steps`` steps on the same views with the same loss."""
    system, start = ImAge(), trial.fresh("places").eval()
    torch.manual_seed(trial.seed)
    features = sample_features(start, trial.draw("places", 32).pixels, seed=trial.seed)
    models = [PooledDescriptor(start, system.insert_at), system.build(start, features, trial.seed)]
    for model in models:
        trial.fit(model, steps, task="places", loss=system.loss)
    gem, ours = (trial.recall(model=model, pooling="mean", change=1.0) for model in models)
    note = f"{steps} steps each; {models[0].width} and {system.n_tokens * models[0].width} values a descriptor"
    return Outcome("recall@1 under viewpoint change, of GeM pooling and of ImAge", gem, ours, ours > gem, note)

"""DynamicViT: small predictors choose which patches go on, learnt together with the network, in three steps.

What: before three blocks a predictor reads each token and the mean of those that are left, and gives the probability
that the token is kept. While training, a choice is drawn from it (Gumbel softmax, straight through) and no token goes:
the others merely do not see those that were not chosen, so that all pictures keep their shape, and a token's gradient
tells what it would have given. In evaluation the most probable stay, a fixed number. The loss adds to the labels' that
of a teacher, the same network unpruned (its logits, and its last tokens at the places kept to the end), and the squared
distance of the share that was kept from the one wanted. Source: Rao et al., arXiv 2106.02034, raoyongming/DynamicViT;
the predictors' parameters bear the authors' names. Where: before blocks 4, 7 and 10 of 12.

The divergence of the logits is taken from the teacher's, as released. Departures: in training a hidden token is hidden
from itself too, which changes nothing for those that are left, and lets one mask row (B, 1, 1, T) do in place of a map;
numbers of tokens follow the picture's patches, not 14 x 14. A head that averages patches averages the hidden ones as
well while it is trained; one that reads the class token does not see them.

    system = DynamicViT(keep=0.7)
    model = system.build(vit)       # in evaluation: logits = model(pixels)
    step = lesson(system, vit)      # in training: loss, right = step(model, batch)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gumbel_softmax, kl_div

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.select import topk
from vistok.core.tensors import upcast
from vistok.host import apply
from vistok.host.vit import Stage, TokenState, ViTEvidence, ViTReducer
from vistok.host.vit.joined import Joined
from vistok.host.vit.models import vit_of

CARD = Card(
    title="DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
    kind="trained",
    site="before three encoder blocks",
    paper="Rao et al., NeurIPS 2021, arXiv 2106.02034",
    repository="raoyongming/DynamicViT",
    mechanism=("transformation",),
    needs=("a trained vision transformer, teacher and start of the student",),
    score="probability to be kept, by a predictor on the token and the mean of all",
    allocate="a power of the keep rate at each step",
    select="drawn while training, top-k in evaluation",
    claim="Pruning 66% of the tokens in three steps costs at most 0.5 points of accuracy.",
)


class Predictor(nn.Module):
    """(B, K, 2): log-probabilities that each token is kept (0) and dropped (1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        sizes = (dim, dim // 2, dim // 4, 2)
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.GELU())]
        self.out_conv = nn.Sequential(*layers[:-1], nn.LogSoftmax(-1))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """``x`` (B, K, C); ``visible`` (B, K): what each token counts in the mean."""
        local, whole = self.in_conv(x).chunk(2, -1)
        weight = visible[..., None].to(x.dtype)
        mean = (whole * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(0.5)  # all may be hidden
        return self.out_conv(torch.cat([local, mean.expand_as(whole)], -1))


class DynamicPruning(nn.Module, ViTReducer):
    """The predictors, as a method for ``vistok.apply``. In training mode all tokens stay and some are hidden."""

    place: ClassVar[Literal["mid", "after"]] = "after"

    def __init__(self, dim: int, keep: float = 0.7, layers: Sequence[int] = (3, 6, 9)) -> None:
        super().__init__()
        self.keep, self.layers = _checked(keep, layers)
        self.score_predictor = nn.ModuleList(Predictor(dim) for _ in self.layers)

    def stages(self, depth: int) -> Sequence[int]:
        if self.layers[-1] >= depth:
            raise ValueError(f"layers: got {self.layers[-1]}, but the model has the blocks 0..{depth - 1}")
        return [layer - 1 for layer in self.layers]

    def count(self, tokens: int, stage: Stage) -> int:
        step = self.layers.index(stage.layer + 1) + 1
        return min(tokens, max(1, int(stage.patches * self.keep**step)))

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        seen = state.x.new_ones(state.anchor.shape) if state.visible is None else state.visible
        predictor = self.score_predictor[self.layers.index(evidence.stage.layer + 1)]
        score = upcast(predictor(state.slots, seen))
        if self.training:
            return replace(state, visible=gumbel_softmax(score, hard=True)[..., 0] * seen)
        return state.keep(topk(score[..., 0], count))

    def decisions(self, states: Sequence[TokenState]) -> list[Tensor]:
        """Of each step (B, N): 1 where the patch was kept, 0 where not; with gradient. ``states``: the session's.

        RuntimeError where nothing was hidden: in evaluation mode, and where ``keep`` is 1.
        """
        found = [states[layer].visible for layer in self.layers]
        if any(one is None for one in found):
            raise RuntimeError("decisions: nothing was hidden; the method must be in training mode, with keep below 1")
        return [one for one in found if one is not None]


@dataclass(frozen=True)
class Losses:
    """Parts of the loss, scalars, each with its weight in it; ``total`` is their sum."""

    labels: Tensor
    logits: Tensor
    tokens: Tensor
    ratio: Tensor

    @property
    def total(self) -> Tensor:
        return self.labels + self.logits + self.tokens + self.ratio


@dataclass(frozen=True)
class DynamicViT:
    """Predictors before a few blocks, and the loss of the training."""

    keep: float = 0.7
    """Share of the tokens that stays each time: of all patches ``keep``, then its square, its cube (rounded down)."""
    layers: tuple[int, ...] | None = None
    """Blocks, from 0, before which tokens go; None: after each quarter of the depth, the paper's 3, 6, 9 of 12."""
    lambda_distill: float = 0.5
    """Weight of the teacher's logits and of its tokens."""
    lambda_ratio: float = 2.0
    """Weight of the squared distance of the share kept from the share wanted."""

    def __post_init__(self) -> None:
        keep, layers = _checked(self.keep, (1,) if self.layers is None else self.layers)
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "layers", None if self.layers is None else layers)

    def method(self, vit: nn.Module) -> DynamicPruning:
        """Untrained predictors for ``vit``, of its width, device, dtype and mode."""
        host, like = vit_of(vit), next(vit.parameters())
        depth = len(host.blocks)
        layers = [depth * quarter // 4 for quarter in (1, 2, 3)] if self.layers is None else self.layers
        made = DynamicPruning(host.width, self.keep, layers)
        return made.to(like.device, like.dtype).train(vit.training)

    def build(self, vit: nn.Module) -> Joined:
        """A copy of ``vit`` with untrained predictors in it."""
        return Joined(copy.deepcopy(vit), self.method(vit))

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        tokens: Tensor,
        decisions: Sequence[Tensor],
        teacher_logits: Tensor,
        teacher_tokens: Tensor,
    ) -> Losses:
        """``logits`` (B, n), ``labels`` (B) int64; ``tokens`` (B, N, C) of the last block, normed; ``decisions``: what
        ``DynamicPruning.decisions`` gives. Nothing of the teacher gets a gradient."""
        wanted = [self.keep ** (step + 1) for step in range(len(decisions))]
        ratio = [(one.mean(1) - share).square().mean() for one, share in zip(decisions, wanted, strict=True)]
        target = teacher_logits.detach().log_softmax(1)
        soft = kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
        kept = decisions[-1].detach()
        error = (tokens - teacher_tokens.detach()).square().mean(2)
        return Losses(
            cross_entropy(logits, labels),
            self.lambda_distill * soft,
            self.lambda_distill * (error * kept).sum() / kept.sum().clamp_min(1),
            self.lambda_ratio * torch.stack(ratio).mean(),
        )


def _checked(keep: float, layers: Sequence[int]) -> tuple[float, tuple[int, ...]]:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"keep: got {keep!r}, must be greater than 0 and at most 1")
    if not layers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in layers):
        raise ValueError(f"layers: got {layers}, must be block numbers from 1, as many as there are steps")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"layers: got {layers}, must rise")
    return float(keep), tuple(layers)


def lesson(system: DynamicViT, teacher: Any) -> Any:
    """The loss of a training step of a ``Joined`` timm ViT: (model, batch) -> (loss, share that is right).

    ``teacher``: the same network, unpruned. ``batch``: as ``vistok.zoo.vit_tasks.ViTBatch``.
    """

    def loss(model: Joined, batch: Any) -> tuple[Tensor, Tensor]:
        vit: Any = model.vit
        method: Any = model.method
        pixels = batch.pixels
        with torch.no_grad():
            known = teacher.forward_features(pixels)
            target = teacher.forward_head(known).float()
        session: Any
        with apply(vit, method) as session:
            tokens = vit.forward_features(pixels)
        logits = vit.forward_head(tokens).float()
        ours, theirs = (t[:, vit.num_prefix_tokens :] for t in (tokens, known))
        parts = system.loss(logits, batch.label, ours, method.decisions(session.states), target, theirs)
        return parts.total, (logits.argmax(1) == batch.label).float().mean()

    return loss


def train(trial: ViTTrial, system: DynamicViT, model: Joined, steps: int, **pace: Any) -> None:
    """Train ``model`` in place under the trial's classifier: half of ``steps`` the predictors alone, then all of it.

    As released, where the network waits for the predictors and is moved at a hundredth of their learning rate: here at
    a tenth. ``pace``: more for ``trial.fit``.
    """
    step = lesson(system, trial.classifier)
    model.vit.requires_grad_(False)
    trial.fit(model, steps // 2, loss=step, peak_lr=3e-3, **pace)
    model.vit.requires_grad_(True)
    trial.fit(model, steps - steps // 2, loss=step, **pace)


def claim(trial: ViTTrial, steps: int = 60) -> Outcome:
    """The abstract: 66% of the tokens pruned, within 0.5 points of the whole network's accuracy.

    Two copies of the zoo's classifier are trained for ``steps`` steps, one as it is and one with predictors, under the
    classifier itself.
    """
    system, teacher = DynamicViT(), trial.classifier
    plain = copy.deepcopy(teacher)
    torch.manual_seed(trial.seed)
    model: Any = system.build(teacher)
    trial.fit(plain, steps)
    train(trial, system, model, steps)
    whole, ours = trial.accuracy(model=plain), trial.accuracy(model=model)
    patches, depth = teacher.patch_embed.num_patches, len(teacher.blocks)
    left = model.method.plan(patches, depth)[-1]
    note = f"{left} of {patches} tokens left, {steps} steps each; before them: {trial.accuracy():.3f}"
    return Outcome("accuracy with 66% of the tokens pruned", whole, ours, ours >= whole - 0.005, note)

"""SiT: tokens are mixed into fewer by a learned soft matrix, and the slim network learns every layer of the whole one.

What: a token slimming module makes half as many tokens, each a convex combination of all, by logits that an MLP reads
off each token. In training a reverse module makes the full map again from the slim tokens of every layer, and is held
against the same layer of a frozen teacher: the same network, unslimmed, from which the student starts. Source: Zong et
al., arXiv 2111.12624, Sense-X/SiT; parameters bear the authors' names. Where: between blocks of a ViT, patch tokens
only (class and distillation tokens go past).

How many tokens come out is fixed with the weights; how many go in is free. In the released code the modules exist only
if a distillation is chosen; here slimming needs none. The recovery is for training alone: evaluation never runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.soft import aggregate, gather_weights

CARD = Card(
    title="Self-slimmed Vision Transformer (SiT)",
    kind="trained",
    site="between the blocks of a vision transformer, patch tokens only",
    paper="Zong et al., 2021, arXiv 2111.12624",
    repository="Sense-X/SiT",
    mechanism=("attention",),
    needs=("a trained vision transformer, teacher and start of the student",),
    merge="softmax over all tokens of logits that an MLP reads off each",
    claim="Distillation of every layer leads to better convergence than labels alone, at equal tokens.",
    departures=("slimming does not hang on a distillation being chosen",),
)


class TokenSlimming(nn.Module):
    """(B, N, C) to (B, n_out, C): convex combinations of the tokens, whatever their order."""

    def __init__(self, dim: int, n_out: int) -> None:
        super().__init__()
        if n_out < 1:
            raise ValueError(f"n_out: got {n_out}, must be 1 or more")
        self.weight = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, n_out))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def weights(self, x: Tensor) -> Tensor:
        """(B, n_out, N): rows sum to 1. The learned ``scale`` sharpens them."""
        return gather_weights((self.weight(x) * self.scale).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return aggregate(x, self.weights(x))


class ReverseSlimming(nn.Module):
    """(B, n_in, C) back to (B, n_out, C): an MLP along the tokens, then a residual one along the channels."""

    def __init__(self, dim: int, n_in: int, n_out: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp1 = Mlp(n_in, int(n_out * ratio), n_out)
        self.mlp2 = Mlp(dim, int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp2(self.norm2(x))


@dataclass(frozen=True)
class Losses:
    """Parts of the loss, scalars, each with its weight in it; ``total`` is their sum."""

    labels: Tensor
    tokens: Tensor
    logits: Tensor
    hard: Tensor

    @property
    def total(self) -> Tensor:
        return self.labels + self.tokens + self.logits + self.hard


class FRDLoss(nn.Module):
    """Feature reconstruction distillation: labels, the teacher's tokens of every layer, its logits."""

    def __init__(self, lambda_token: float = 2.0, lambda_logits: float = 2.0, tau: float = 1.0) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau: got {tau}, must be greater than 0")
        self.lambda_token, self.lambda_logits, self.tau = lambda_token, lambda_logits, tau

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        tokens: Sequence[Tensor],
        teacher_logits: Tensor,
        teacher_tokens: Sequence[Tensor],
        hard: tuple[Tensor, Tensor] | None = None,
    ) -> Losses:
        """``logits`` (B, n) and ``labels`` (B) int64; ``tokens``: (B, N, C) a layer, of student and teacher alike.

        ``hard``: logits of a distillation token and the labels that another teacher gives, if there is one. Nothing of
        the teacher gets a gradient. Raises ValueError for different numbers of layers.
        """
        if len(tokens) != len(teacher_tokens):
            raise ValueError(f"tokens: got {len(tokens)} layers, must be the teacher's {len(teacher_tokens)}")
        layers = [mse_loss(s, t.detach()) for s, t in zip(tokens, teacher_tokens, strict=True)]
        target = (teacher_logits.detach() / self.tau).log_softmax(1)
        soft = kl_div((logits / self.tau).log_softmax(1), target, reduction="batchmean", log_target=True)
        return Losses(
            cross_entropy(logits, labels),
            self.lambda_token * torch.stack(layers).mean() if layers else logits.new_zeros(()),
            self.lambda_logits * self.tau**2 * soft,
            logits.new_zeros(()) if hard is None else cross_entropy(*hard),
        )


class SlimViT(nn.Module):
    """A copy of a timm ViT that slims its patch tokens before the first block of every stage but the first.

    ``stage_blocks``: how many blocks each stage has but the last, which has the rest. A stage has ``keep`` times the
    tokens of the one before: ``slim_counts``. ``ratio``: hidden units of the recovery. Raises ValueError where the
    stages leave no block for the last.
    """

    def __init__(
        self, vit: VisionTransformer, stage_blocks: Sequence[int] = (1, 1, 1), keep: float = 0.5, ratio: float = 4.0
    ) -> None:
        super().__init__()
        last = len(vit.blocks) - sum(stage_blocks)
        if last < 1 or min(stage_blocks, default=1) < 1:
            raise ValueError(
                f"stage_blocks: got {tuple(stage_blocks)}, must be 1 or more each, and in all less than "
                f"the {len(vit.blocks)} blocks of the model"
            )
        self.vit = copy.deepcopy(vit)
        whole = vit.patch_embed.num_patches
        counts = slim_counts(whole, keep, len(stage_blocks) + 1)
        self.counts = [
            count for count, blocks in zip(counts, [*stage_blocks, last], strict=True) for _ in range(blocks)
        ]
        self.slim, self.recover = nn.ModuleDict(), nn.ModuleDict()
        for layer, count in enumerate(self.counts):
            if layer and count != self.counts[layer - 1]:
                self.slim[str(layer)] = TokenSlimming(vit.embed_dim, count)
            if count != whole:
                self.recover[str(layer)] = ReverseSlimming(vit.embed_dim, count, whole, ratio)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        x = _embed(self.vit, pictures)
        for layer in range(len(self.counts)):
            x = self._block(layer, x)
        return self.vit.forward_head(self.vit.norm(x))

    def learn(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the patch tokens after every block made whole again: (B, N, C) each, for ``FRDLoss``."""
        x, tokens = _embed(self.vit, pictures), []
        for layer in range(len(self.counts)):
            x = self._block(layer, x)
            slim = x[:, self.vit.num_prefix_tokens :]
            tokens.append(self.recover[str(layer)](slim) if str(layer) in self.recover else slim)
        return self.vit.forward_head(self.vit.norm(x)), tokens

    def _block(self, layer: int, x: Tensor) -> Tensor:
        if str(layer) in self.slim:
            prefix = self.vit.num_prefix_tokens
            x = torch.cat([x[:, :prefix], self.slim[str(layer)](x[:, prefix:])], 1)
        return self.vit.blocks[layer](x)


@dataclass(frozen=True)
class SiT:
    """Half as many tokens a stage, and the loss of the training."""

    stage_blocks: tuple[int, ...] = (1, 1, 1)
    """Blocks of each stage but the last (SiT-T and XS; S: 9, 3, 2; M and L: 10, 4, 3)."""
    keep: float = 0.5
    """Share of the tokens that a stage leaves."""
    lambda_token: float = 2.0
    """Weight of the squared error of the recovered tokens."""
    lambda_logits: float = 2.0
    """Weight of the divergence of the logits."""
    tau: float = 1.0
    """Temperature of the logits in that."""

    def build(self, vit: VisionTransformer) -> SlimViT:
        """The student: a slim copy of ``vit``."""
        return SlimViT(vit, self.stage_blocks, self.keep)

    def loss(self) -> FRDLoss:
        """The distillation's loss."""
        return FRDLoss(self.lambda_token, self.lambda_logits, self.tau)


@torch.no_grad()
def teach(vit: VisionTransformer, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of the whole ViT and its patch tokens (B, N, C) after every block, without gradient."""
    x, tokens = _embed(vit, pictures), []
    for block in vit.blocks:
        x = block(x)
        tokens.append(x[:, vit.num_prefix_tokens :])
    return vit.forward_head(vit.norm(x)), tokens


def slim_counts(tokens: int, keep: float = 0.5, stages: int = 4) -> list[int]:
    """Tokens of each stage: ``tokens`` times a power of ``keep``, rounded down, at least 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep: got {keep}, must be greater than 0 and at most 1")
    return [max(1, int(tokens * keep**i)) for i in range(stages)]


def _embed(vit: VisionTransformer, pictures: Tensor) -> Tensor:
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pictures))))


def claim(trial: ViTTrial, steps: int = 120) -> Outcome:
    """The abstract: distillation of every layer makes use of what a teacher of the same structure knows.

    Two copies of the zoo's classifier, slim after each quarter of the depth, equal in all but the loss, each trained
    for ``steps`` steps.
    """
    teacher = trial.classifier
    system = SiT(stage_blocks=(len(teacher.blocks) // 4,) * 3)
    found = []
    for distil in (False, True):
        torch.manual_seed(trial.seed)
        student = system.build(teacher)
        trial.fit(student, steps, loss=lesson(system.loss(), teacher) if distil else labels_alone, peak_lr=1e-3)
        found.append(trial.accuracy(model=student))
    labels, distilled = found
    note = (
        f"{student.counts[-1]} of {student.counts[0]} tokens, {steps} steps; the whole teacher: {trial.accuracy():.3f}"
    )
    return Outcome("accuracy, distilled against labels alone", labels, distilled, distilled > labels, note)


def labels_alone(student: SlimViT, batch: Any) -> tuple[Tensor, Tensor]:
    """A training step by cross-entropy: loss and share that is right. ``batch``: ``pixels`` and ``label``."""
    logits = student(batch.pixels).float()
    return cross_entropy(logits, batch.label), (logits.argmax(1) == batch.label).float().mean()


def lesson(loss: FRDLoss, teacher: VisionTransformer) -> Any:
    """The same by ``loss`` under ``teacher``: (student, batch) -> (loss, share that is right)."""

    def step(student: SlimViT, batch: Any) -> tuple[Tensor, Tensor]:
        logits, tokens = student.learn(batch.pixels)
        parts = loss(logits.float(), batch.label, tokens, *teach(teacher, batch.pixels))
        return parts.total, (logits.argmax(1) == batch.label).float().mean()

    return step

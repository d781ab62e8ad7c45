"""TCPA: in prompt tuning, the class token has prompts of its own, and every patch picks its own out of a pool.

What: before each block of a frozen ViT two pools of prompts are put beside the tokens, one for the class token, one for
the patches, each prompt with a key. A token may attend to all other tokens, but of the prompts only to those of its
pool whose keys are nearest to it by cosine. The prompts go after the attention, so that the MLP never sees them.
Prompts, keys and a new head are trained. Source: Liu et al., arXiv 2505.02406, zhoujiahuan1991/ICML2025-TCPA. Where:
keys and values of every block's attention.

Departures. The paper writes each role as attention with its prompts alone: a row sums to 1. The released code masks
the weights after the softmax, so that a row lacks the share of the masked prompts: ``renormalise=False``. Its models
also send the prompts through a Fourier transform, the base method's: ``fourier=True``. Its default sizes differ from
its scripts', which are taken here. Distillation tokens and registers choose from the class token's pool.

How it stays on fused attention: values of real tokens are mixed by one SDPA over all keys, whose values have two more
columns, marks of what is real and what is a prompt. Their means are the shares of both in each row, so that the softmax
over the few prompts alone, (T, prompts), says all that is missing. The whole map is never written out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, pad, scaled_dot_product_attention

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.score import cosine
from vistok.core.soft import aggregate, gather_weights
from vistok.world import COLOUR_NAMES

CARD = Card(
    title="Token Coordinated Prompt Attention is Needed for Visual Prompting (TCPA)",
    kind="trained",
    site="keys and values of every block's attention, in a frozen vision transformer",
    paper="Liu et al., 2025, arXiv 2505.02406",
    repository="zhoujiahuan1991/ICML2025-TCPA",
    mechanism=("similarity", "attention"),
    needs=("a trained vision transformer, which stays frozen", "training on the task"),
    score="cosine of each token and the prompts' keys",
    select="top-k prompts of a pool, one pool for the class token and one for the patches",
    claim="Prompts of its own for each token give better features than the same prompts for all, at equal size.",
    departures=("attention is normalised over what a token may see", "no Fourier transform of the prompts"),
)

_MARKS = 8
"""Columns added for the two marks: fused attention on a GPU wants widths in eights."""


class PromptPool(nn.Module):
    """For each of ``layers`` blocks ``size`` groups of ``length`` prompts, with a key each if ``topk`` is not 0."""

    def __init__(self, layers: int, size: int, length: int, dim: int, topk: int) -> None:
        super().__init__()
        if not 0 <= topk <= size or min(size, length) < 1:
            raise ValueError(f"topk: got {topk} of {size} x {length} prompts, must be 0 to size, both 1 or more")
        self.size, self.length, self.topk = size, length, topk
        self.prompts = nn.Parameter(torch.empty(layers, size, length, dim).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(layers, size, dim).uniform_(-1, 1)) if topk else None

    def match(self, x: Tensor, layer: int, random: bool = False) -> tuple[Tensor, Tensor]:
        """The groups (B, T, topk) int64 of the tokens ``x`` (B, T, D), and their mean distance, 1 - cosine, a scalar.

        ``random``: any groups, whatever the keys. Only the distance gives the keys a gradient.
        """
        if self.keys is None:
            raise ValueError("topk: got 0, must be 1 or more for tokens to choose")
        near = cosine(x, self.keys[layer].expand(len(x), -1, -1))
        index = (torch.rand_like(near) if random else near).topk(self.topk).indices
        return index, 1 - near.gather(2, index).mean()


class PromptedAttention(nn.Module):
    """A block's own attention, whose tokens also see the prompts that it ``holds`` for this call."""

    def __init__(self, attn: nn.Module, renormalise: bool) -> None:
        super().__init__()
        self.attn, self.renormalise = attn, renormalise
        self.holds: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask, is_causal: got one, must be left out: all tokens see each other")
        if self.holds is None:
            raise RuntimeError("prompts: a block was called by itself; call the PromptedViT, which gives it prompts")
        (prompts, mask), self.holds = self.holds, None
        return attend_with_prompts(self.attn, x, prompts, mask, self.renormalise)


class PromptedViT(nn.Module):
    """A frozen copy of a timm ViT with prompts before every block, and a new head for ``num_classes`` classes.

    Arguments: as in ``TCPA``. Pictures (B, 3, H, W) to logits. Raises ValueError for a ViT without a class token, or
    with another attention than timm's ``Attention``.
    """

    def __init__(self, vit: VisionTransformer, num_classes: int, system: TCPA) -> None:
        super().__init__()
        kinds = {type(getattr(block, "attn", None)).__name__ for block in vit.blocks}
        if vit.cls_token is None or kinds != {"Attention"}:
            raise ValueError(
                f"vit: got attention {', '.join(kinds)} and {'no' if vit.cls_token is None else 'a'} class token, must "
                "be a timm VisionTransformer with a class token and blocks of Attention"
            )
        self.system, self.prefix = system, vit.num_prefix_tokens
        self.vit = copy.deepcopy(vit).requires_grad_(False)
        blocks: list[Any] = list(self.vit.blocks)
        for block in blocks:
            block.attn = PromptedAttention(block.attn, system.renormalise)
        shape = (len(blocks), system.size, system.length, vit.embed_dim, system.topk if system.coordinated else 0)
        self.for_class, self.for_patches = PromptPool(*shape), PromptPool(*shape)
        self.head = nn.Linear(vit.num_features, num_classes)
        self.train()

    def train(self, mode: bool = True) -> PromptedViT:
        """The frozen ViT stays in evaluation mode."""
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, pictures: Tensor) -> Tensor:
        return self.learn(pictures)[0]

    def learn(self, pictures: Tensor, random: bool = False) -> tuple[Tensor, Tensor]:
        """Logits, and the distance of tokens and chosen keys, summed over both pools and the blocks (0 without keys).

        ``random``: the prompts are chosen at random.
        """
        vit = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pictures))))
        distance = x.new_zeros(())
        blocks: list[Any] = list(vit.blocks)
        for layer, block in enumerate(blocks):
            mask = None
            if self.system.coordinated:
                index, far = zip(
                    self.for_class.match(x[:, : self.prefix], layer, random),
                    self.for_patches.match(x[:, self.prefix :], layer, random),
                    strict=True,
                )
                mask, distance = role_mask(*index, self.system.size, self.system.length), distance + sum(far)
            block.attn.holds = block.norm1(self.prompts(layer, len(x))), mask
            x = block(x)
        return self.head(vit.forward_head(vit.norm(x), pre_logits=True)), distance

    def prompts(self, layer: int, batch: int) -> Tensor:
        """(1, M, D) prompts of block ``layer``, those for the class token first; (batch, M, D) while dropout acts."""
        rows = torch.cat([pool.prompts[layer].flatten(0, 1) for pool in (self.for_class, self.for_patches)])[None]
        if self.training and self.system.dropout:
            rows = dropout(rows.expand(batch, -1, -1), self.system.dropout)
        return torch.fft.fft2(rows.float()).real.to(rows.dtype) if self.system.fourier else rows


@dataclass(frozen=True)
class TCPA:
    """The prompts and their training; sizes are those of the released scripts."""

    size: int = 18
    """Groups of prompts in each of a block's two pools."""
    length: int = 1
    """Prompts of a group."""
    topk: int = 10
    """Groups that a token attends to."""
    coordinated: bool = True
    """False: every token sees all prompts, and there are no keys; that is VPT-deep (arXiv 2203.12119)."""
    renormalise: bool = True
    """Whether the weights of what a token may see sum to 1; False as released: masked after the softmax."""
    fourier: bool = False
    """Whether prompts go through a 2-D Fourier transform, real part (VFPT, the released models' base)."""
    dropout: float = 0.1
    """Of the prompts, in training."""
    match_weight: float = 0.01
    """Weight of the distance of tokens and chosen keys in the loss."""
    warm: float = 0.1
    """Share of the training in which prompts are chosen at random, so that all learn."""

    def build(self, vit: VisionTransformer, num_classes: int) -> PromptedViT:
        """``vit``, copied and frozen, with untrained prompts and head."""
        return PromptedViT(vit, num_classes, self)

    def loss(self, steps: int) -> Callable[[PromptedViT, Any], tuple[Tensor, Tensor]]:
        """The loss of a training of ``steps`` steps, to be called once a step: (model, batch) to loss and the share
        that is right. ``batch``: ``pixels`` (B, 3, H, W), ``label`` (B,) int64."""
        step = count()

        def loss(model: PromptedViT, batch: Any) -> tuple[Tensor, Tensor]:
            logits, distance = model.learn(batch.pixels, random=next(step) < self.warm * steps)
            right = (logits.argmax(1) == batch.label).float().mean()
            return cross_entropy(logits.float(), batch.label) + self.match_weight * distance, right

        return loss


def role_mask(for_class: Tensor, for_patches: Tensor, size: int, length: int) -> Tensor:
    """(B, P + N, 2 * size * length) bool: which prompts each token may see, the class token's pool first.

    ``for_class`` (B, P, k) and ``for_patches`` (B, N, k) int64 name groups of ``length`` prompts in pools of ``size``.
    Columns of tokens are left out: all are open.
    """

    def of_pool(index: Tensor) -> Tensor:
        return index.new_zeros(*index.shape[:2], size, dtype=torch.bool).scatter(2, index, True)

    rows = torch.cat([pad(of_pool(for_class), (0, size)), pad(of_pool(for_patches), (size, 0))], 1)
    return rows.repeat_interleave(length, 2)


def attend_with_prompts(
    attn: Any, x: Tensor, prompts: Tensor, mask: Tensor | None = None, renormalise: bool = True
) -> Tensor:
    """(B, T, D): a timm ``Attention`` on ``x`` (B, T, D), whose keys and values also are those of ``prompts`` (B or 1,
    M, D); both normed.

    ``mask`` (B, T, M) bool: which prompts a token may see, None for all. Without ``renormalise`` a row's weights sum to
    1 less the share of the prompts that it may not see.
    """
    q, k, v = _heads(attn, x)
    _, prompt_k, prompt_v = (t.expand(len(x), -1, -1, -1) for t in _heads(attn, prompts))
    keys = torch.cat([k, prompt_k], 2)
    if mask is None:
        mixed = scaled_dot_product_attention(q, keys, torch.cat([v, prompt_v], 2), scale=attn.scale)
    else:
        tokens, width = v.shape[2:]
        marks = v.new_zeros(*keys.shape[:3], _MARKS)
        marks[:, :, :tokens, 0] = marks[:, :, tokens:, 1] = 1
        values = torch.cat([torch.cat([v, torch.zeros_like(prompt_v)], 2), marks], 3)
        found = scaled_dot_product_attention(pad(q, (0, _MARKS)), pad(keys, (0, _MARKS)), values, scale=attn.scale)
        real, of_prompts = found[..., width, None], found[..., width + 1, None]
        seen = gather_weights(q @ prompt_k.transpose(2, 3) * attn.scale).masked_fill(~mask[:, None], 0)
        mixed = found[..., :width] + of_prompts * aggregate(prompt_v, seen)
        if renormalise:
            mixed = mixed / (real + of_prompts * seen.sum(3, keepdim=True))
    out = attn.norm(mixed.to(v.dtype).transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    return attn.proj_drop(attn.proj(out if gate is None else out * gate(x).sigmoid()))


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, H, T, d) each."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


# The claim ------------------------------------------------------------------------------------------------------------


def transfer(trial: ViTTrial, model: nn.Module, loss: Any, steps: int, seed: int, peak_lr: float = 1e-1) -> float:
    """Train ``model``, with eight classes, to name the colour of the thing in a scene; accuracy on held-out scenes.

    ``loss``: (model, batch) to loss and share that is right. Equal seeds see equal pictures. Prompts begin in -1 .. 1
    and are normed: they want a learning rate far above that of a network.
    """
    trial.fit(model, steps, task="colours", loss=loss, batch_size=16, peak_lr=peak_lr, seed=seed)
    accuracy: float = trial.score("colours", model)["accuracy"]
    return accuracy


def vpt_deep(system: TCPA) -> TCPA:
    """VPT-deep of as many parameters as ``system``: it has a prompt for each of its keys."""
    return TCPA(system.size, system.length + 1, coordinated=False, dropout=system.dropout, match_weight=0)


def claim(trial: ViTTrial, steps: int = 100) -> Outcome:
    """The abstract: features of a frozen ViT discriminate better than with the same prompts for all tokens.

    The zoo's classifier is to name colours; both have the same number of parameters, steps and pictures.
    """
    found = []
    for system in (vpt_deep(TCPA()), TCPA()):
        torch.manual_seed(trial.seed)
        model = system.build(trial.classifier, len(COLOUR_NAMES))
        found.append(transfer(trial, model, system.loss(steps), steps, trial.seed))
    vpt, ours = found
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    note = f"{steps} steps of 16 pictures each, {size} trained parameters each"
    return Outcome("accuracy on colours, against VPT-deep", vpt, ours, ours > vpt, note)

"""ToP-ViM: tokens of a vision state space model are pruned, and its scans stay aligned with the places that are gone.

What: a scan hands a state from token to token; when tokens are dropped, it jumps between tokens that were no
neighbours. A token is scored by what the scan puts out at it, positive values alone, summed over channels. After some
of the blocks the best stay, in raster order, the class token in the middle. At a place that is gone the state gets no
input but goes on decaying, so that the next token sees it as it would be there. Source: Zhan et al., arXiv 2409.18962,
ZLKong/ToP-ViM. Where: between the blocks of Vim (Zhu et al., arXiv 2401.09417), which scans forward and backward.

The alignment was not released, and what step a place takes that is gone is not said: here that of zero input, the
softplus of the step's bias. The class token has no place: either scan meets it right behind the patch before it. One
residual stream is kept, the sum of the released two. Pruning still moves what the causal convolution before the scan
sees.

``parity="authors"``: the score as released, from the backward scan alone, not turned round again (so that it is that of
the mirrored token) and without the clip. Not taken over: the class token is kept out of the choice in every picture,
not in a batch's first alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn.functional import pad, silu, softplus

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.scan import gaps, selective_scan, step_bias
from vistok.core.select import topk
from vistok.core.tensors import take, upcast

CARD = Card(
    title="Exploring Token Pruning in Vision State Space Models (ToP-ViM)",
    kind="trained",
    site="between the blocks of a vision state space model",
    paper="Zhan et al., 2024, arXiv 2409.18962",
    repository="ZLKong/ToP-ViM",
    mechanism=("attention",),
    score="positive outputs of the scan, summed over channels",
    select="top-k, the class token kept in the middle",
    claim="Aligned scans lose less accuracy to pruning than naive ones.",
    departures=(
        "the score is of both scans, each token's own, and clipped",
        "scans are aligned (described, not released)",
    ),
)


class Direction(nn.Module):
    """One of a mixer's two ways along the sequence: causal convolution, steps, input and output maps, scan."""

    def __init__(self, inner: int, state: int, rank: int, conv: int = 4) -> None:
        super().__init__()
        self.rank, self.state = rank, state
        self.conv1d = nn.Conv1d(inner, inner, conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state + 1.0).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step_bias(inner))

    def forward(self, x: Tensor, z: Tensor, gap: Tensor | None) -> Tensor:
        """(B, D, L) of ``x`` and its gate ``z`` (B, D, L) in the scan's order; ``gap`` as in ``selective_scan``."""
        x = silu(self.conv1d(pad(x, (self.conv1d.kernel_size[0] - 1, 0))))
        dt, b, c = self.x_proj(x.transpose(1, 2)).split((self.rank, self.state, self.state), 2)
        step = (dt @ self.dt_proj.weight.T).transpose(1, 2)
        b, c, a = b.transpose(1, 2), c.transpose(1, 2), -upcast(self.A_log).exp()
        return selective_scan(x, step, a, b, c, self.D, z, self.dt_proj.bias, delta_softplus=True, gap=gap)[0]

    @property
    def empty_step(self) -> Tensor:
        """(D): the step at zero input."""
        return softplus(self.dt_proj.bias)


class BidirectionalMixer(nn.Module):
    """(B, L, C) to the same: one projection in and out, a scan each way, summed."""

    def __init__(self, dim: int, state: int = 16, expand: int = 2) -> None:
        super().__init__()
        inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.forwards, self.backwards = (Direction(inner, state, math.ceil(dim / 16)) for _ in range(2))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, places: Tensor | None = None, patches: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens, and what both scans put out at each, before the projection: (B, D, L) forward and backward.

        ``places`` (B, L - 1): where the patches of ``patches`` in all stood, for scans aligned with them; the class
        token stands in the middle of the L. Without it the tokens are taken for neighbours.
        """
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, 1)
        gap = [None, None] if places is None else [self._gap(places, patches, way) for way in ("forward", "backward")]
        ahead = self.forwards(u, z, gap[0])
        back = self.backwards(u.flip(2), z.flip(2), None if gap[1] is None else gap[1].flip(2)).flip(2)
        return self.out_proj((ahead + back).transpose(1, 2)), ahead, back

    def _gap(self, places: Tensor, patches: int, way: Literal["forward", "backward"]) -> Tensor:
        direction = self.forwards if way == "forward" else self.backwards
        gap = gaps(places, direction.empty_step, way, patches)
        middle = places.shape[1] // 2
        return torch.cat([gap[:, :, :middle], gap.new_zeros(*gap.shape[:2], 1), gap[:, :, middle:]], 2)


def ssm_importance(y: Tensor, clip: bool = True) -> Tensor:
    """(B, L): the sum over channels of the scan's output ``y`` (B, D, L), of its positive values with ``clip``."""
    return (y.clamp_min(0) if clip else y).sum(1)


def prune_sequence(x: Tensor, places: Tensor, score: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """The best patches of ``x`` (B, L, C) around its middle, which stays, and their places.

    ``places`` (B, L - 1): where each patch stands; ``score`` (B, L). ``kept_patches`` of them stay, in raster order,
    half of them before the class token.
    """
    middle, count = places.shape[1] // 2, kept_patches(places.shape[1], keep)
    alone = torch.cat([score[:, :middle], score[:, middle + 1 :]], 1)
    patches = torch.cat([x[:, :middle], x[:, middle + 1 :]], 1)
    index = topk(alone, count).sort(1).values
    patches, half = take(patches, index), count // 2
    return torch.cat([patches[:, :half], x[:, middle : middle + 1], patches[:, half:]], 1), take(places, index)


def kept_patches(patches: int, keep: float) -> int:
    """How many of ``patches`` stay: the share ``keep``, rounded up, and on to an even number where there is one."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep: got {keep}, must be greater than 0 and at most 1")
    count = math.ceil(keep * patches)
    return count if count == patches or count % 2 == 0 else count + 1


class PrunedVim(nn.Module):
    """Pictures (B, 3, H, W) to logits (B, num_classes), read from the class token in the middle of the sequence.

    ``prune_after``: the blocks, from 0, after which the share ``keep`` of the patches stays. ``pruning`` and ``align``
    are attributes that may be set: a network is trained whole, then pruned, aligned or not, and trained on.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        num_classes: int = 1000,
        image: int = 224,
        patch: int = 16,
        dim: int = 384,
        depth: int = 24,
        state: int = 16,
        prune_after: Sequence[int] = (5, 10, 15),
        keep: float = 0.8,
        align: bool = True,
        parity: Literal["paper", "authors"] = "paper",
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"patch: got {patch}, must divide image, {image}")
        if not all(0 <= layer < depth for layer in prune_after):
            raise ValueError(f"prune_after: got {tuple(prune_after)}, must be of the blocks 0..{depth - 1}")
        if parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {parity!r}, must be 'paper' or 'authors'")
        self.patches = (image // patch) ** 2
        kept_patches(self.patches, keep)
        self.embed_dim, self.prune_after, self.keep = dim, tuple(prune_after), keep
        self.align, self.parity, self.pruning = align, parity, True
        self.patch_embed = PatchEmbed(image, patch, 3, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, self.patches + 1, dim) * 0.02)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-5) for _ in range(depth))
        self.mixers = nn.ModuleList(BidirectionalMixer(dim, state) for _ in range(depth))
        self.norm_f = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, num_classes)

    def sequence(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, C) after the last block, the class token in the middle, and the patches' places (B, L - 1)."""
        x = self.patch_embed(pictures)
        middle = self.patches // 2
        x = torch.cat([x[:, :middle], self.cls_token.expand(len(x), -1, -1), x[:, middle:]], 1) + self.pos_embed
        places = torch.arange(self.patches, device=x.device).expand(len(x), -1)
        for layer, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            gone = self.align and places.shape[1] < self.patches
            mixed, ahead, back = mixer(norm(x), places if gone else None, self.patches)
            x = x + mixed
            if self.pruning and layer in self.prune_after:
                x, places = prune_sequence(x, places, self._score(ahead, back), self.keep)
        return x, places

    def forward_features(self, pictures: Tensor) -> Tensor:
        """(B, 1 + K, C): the class token, then the patches that are left, normed."""
        x, places = self.sequence(pictures)
        middle = places.shape[1] // 2
        return self.norm_f(torch.cat([x[:, middle : middle + 1], x[:, :middle], x[:, middle + 1 :]], 1))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Logits of what ``forward_features`` gives."""
        return self.head(tokens[:, 0])

    def forward(self, pictures: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pictures))

    def _score(self, ahead: Tensor, back: Tensor) -> Tensor:
        if self.parity == "authors":
            return ssm_importance(back.flip(2), clip=False)
        return ssm_importance(ahead + back)


@dataclass(frozen=True)
class TopViM:
    """A pruned Vim: Vim-S of the paper by default."""

    image: int = 224
    """Side of a picture in pixels."""
    patch: int = 16
    """Side of a patch in pixels."""
    dim: int = 384
    """Channels (Vim-T: 192)."""
    depth: int = 24
    """Blocks."""
    state: int = 16
    """Numbers of the state of a channel."""
    prune_after: tuple[int, ...] = (5, 10, 15)
    """Blocks, from 0, after which tokens are pruned (Vim-T: 10, 20)."""
    keep: float = 0.8
    """Share of the patches that stays each time (Vim-T: 0.75)."""
    align: bool = True
    """Whether scans go on decaying over places that are gone."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": the released score, mirrored and without the clip."""

    def build(self, num_classes: int = 1000) -> PrunedVim:
        """An untrained network."""
        shape = (self.image, self.patch, self.dim, self.depth, self.state)
        return PrunedVim(num_classes, *shape, self.prune_after, self.keep, self.align, self.parity)


CLAIMED_ON, CLASSES = "colours", 8
"""A task that a small Vim learns in a few hundred steps: which colour the one thing in a scene has."""


def claim(trial: ViTTrial, steps: int = 300) -> Outcome:
    """The abstract: naive pruning disrupts the sequence, and alignment steadies what is left of it.

    A small Vim is trained whole for ``steps`` steps, then a fifth of its patches is pruned twice, with naive and with
    aligned scans, without further training. Holds from a gain of 2 points, more than a few pictures.
    """
    torch.manual_seed(trial.seed)
    model = small(trial)
    model.pruning = False
    trial.fit(model, steps, task=CLAIMED_ON, batch_size=16, peak_lr=2e-3)
    whole, found = trial.score(CLAIMED_ON, model)["accuracy"], []
    model.pruning = True
    for model.align in (False, True):
        found.append(trial.score(CLAIMED_ON, model)["accuracy"])
    naive, aligned = found
    left = kept_patches(kept_patches(model.patches, model.keep), model.keep)
    note = f"{left} of {model.patches} patches left; the whole model: {whole:.3f}; {steps} steps"
    return Outcome("accuracy pruned, aligned against naive scans", naive, aligned, aligned >= naive + 0.02, note)


def small(trial: ViTTrial) -> PrunedVim:
    """An untrained Vim: 6 blocks of width 64 on 8 x 8 patches of a picture, pruned after blocks 1 and 3."""
    image = trial.classifier.patch_embed.img_size[0]
    return TopViM(image, image // 8, 64, 6, 4, prune_after=(1, 3)).build(CLASSES)

"""PatchMerger: in the middle of the network a learned matrix merges all patches into a few tokens.

What: each of the few tokens is a convex combination of all patches, by a softmax over the patches of their products
with a learned vector. It takes any number of patches and leaves as many tokens as there are vectors. Nothing else is
added, and no loss: the module is trained, or fine-tuned, with the network. Source: Renggli et al., arXiv 2202.12015; no
authors' code. Where: between the two middle blocks.

The class token and other prefix tokens go past it. The formula of the paper has no norm and no scale before the softmax
(the port in lucidrains/vit-pytorch has both): so here. The vectors start as the rows of a linear layer do, of length
about 1. A patch counts to the token that has the largest share of it, for maps and overlays; a token that has the
largest share of no patch stands for none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.soft import aggregate, gather_weights
from vistok.host import apply
from vistok.host.vit import Stage, TokenState, ViTEvidence, ViTReducer
from vistok.host.vit.joined import Joined
from vistok.host.vit.models import vit_of

CARD = Card(
    title="Learning to Merge Tokens in Vision Transformers (PatchMerger)",
    kind="trained",
    site="between the two middle encoder blocks",
    paper="Renggli et al., 2022, arXiv 2202.12015",
    mechanism=("transformation",),
    needs=("a vision transformer, trained or not",),
    allocate="a fixed number of tokens",
    merge="softmax over all patches of their products with a learned vector for each token",
    claim="Matches the original's accuracy after fine-tuning, at a fraction of its operations.",
)


class Merging(nn.Module, ViTReducer):
    """The learned vectors, as a method for ``vistok.apply``. ``after``: the block it follows, None for the middle."""

    place: ClassVar[Literal["mid", "after"]] = "after"

    def __init__(self, dim: int, keep: int = 8, after: int | None = None) -> None:
        super().__init__()
        self.keep, self.after = _checked(keep, after)
        self.queries = nn.Parameter(torch.randn(keep, dim) * dim**-0.5)

    def stages(self, depth: int) -> Sequence[int]:
        block = (depth - 1) // 2 if self.after is None else self.after
        if block >= depth:
            raise ValueError(f"after: got {block}, but the model has the blocks 0..{depth - 1}")
        return [block]

    def count(self, tokens: int, stage: Stage) -> int:
        return min(self.keep, tokens)

    def weights(self, x: Tensor) -> Tensor:
        """(B, keep, K) of ``x`` (B, K, C): rows sum to 1, float32 at least."""
        return gather_weights(self.queries @ x.transpose(1, 2))

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        weights = self.weights(state.slots)
        into = weights.argmax(1)
        slots = torch.arange(count, device=into.device)[:, None]
        share, at = weights.masked_fill(into[:, None] != slots, -1).max(2)
        return state.regroup(aggregate(state.slots, weights), into, torch.where(share < 0, -1, at))


@dataclass(frozen=True)
class PatchMerger:
    """How many tokens all patches become, and where."""

    keep: int = 8
    """Tokens that are left."""
    after: int | None = None
    """The block, from 0, that it follows; None: the first half of them."""

    def __post_init__(self) -> None:
        _checked(self.keep, self.after)

    def method(self, vit: nn.Module) -> Merging:
        """An untrained module for ``vit``, of its width, device, dtype and mode."""
        like = next(vit.parameters())
        return Merging(vit_of(vit).width, self.keep, self.after).to(like.device, like.dtype).train(vit.training)

    def build(self, vit: nn.Module) -> Joined:
        """A copy of ``vit`` with an untrained module in it."""
        return Joined(copy.deepcopy(vit), self.method(vit))


def _checked(keep: int, after: int | None) -> tuple[int, int | None]:
    for name, value, least in (("keep", keep, 1), ("after", after, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name}: got {value!r}, must be a whole number, {least} or more")
    return keep, after


def claim(trial: ViTTrial, steps: int = 100) -> Outcome:
    """The abstract: a significant speed-up, and the original's accuracy after fine-tuning.

    Two copies of the zoo's classifier are trained for ``steps`` steps, one as it is and one with 8 tokens from its
    middle on. Holds within 1 point.
    """
    plain = copy.deepcopy(trial.classifier)
    torch.manual_seed(trial.seed)
    model = PatchMerger().build(trial.classifier)
    for one in (plain, model):
        trial.fit(one, steps)
    whole, ours = trial.accuracy(model=plain), trial.accuracy(model=model)
    note = f"{_share(model):.0%} of the operations, {steps} steps each; before them: {trial.accuracy():.3f}"
    return Outcome("accuracy with 8 tokens from the middle on", whole, ours, ours >= whole - 0.01, note)


def _share(model: Joined) -> float:
    """Operations of the blocks and the patches with the method over those without it."""
    vit: Any = model.vit
    method: Any = model.method
    pixels = next(vit.parameters()).new_zeros(1, 3, *vit.patch_embed.img_size)
    spent = []
    for one in (Merging(vit.embed_dim, vit.patch_embed.num_patches), method):
        session: Any
        with torch.no_grad(), apply(vit, one) as session:
            vit(pixels)
        spent.append(session.flops)
    return spent[1] / spent[0]

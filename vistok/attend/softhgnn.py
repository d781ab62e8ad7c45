"""SoftHGNN: tokens gather in soft hyperedges, each a group that all join with a weight, and read the groups back.

What: attention relates tokens in pairs. Here M prototypes, shifted by what the picture is (mean and maximum of its
tokens), are M hyperedges; how much a token takes part in one is a softmax over the tokens of its product with the
prototype, heads averaged. Each hyperedge is the sum of its members, mapped, and each token gets the hyperedges back by
the same weights, mapped and added. Sparse variant: of further dynamic hyperedges each picture uses the ``topk`` whose
sum of products is largest, and a loss keeps their use even. Source: Lei et al., arXiv 2505.15325, Mengqi-Lei/SoftHGNN;
parameters bear the authors' names. Where: a module after the tokens of an encoder. Cost linear in the tokens.

The released loss has no gradient: it is that of the 0/1 choice. Here its value is the same, and its gradient that of
``topk`` times a softmax of the mean products, as in mixtures of experts (``parity="authors"``: none). Hyperedges that
are not chosen are not computed, where the released code computes and zeroes them; a sum of products over tokens is one
product with the sum of the tokens. Dropout falls on the products of the chosen alone, after the choice. Left out: the
``gate`` of the sparse variant, which nothing uses. Since weights sum to 1 over tokens, what a token gets back shrinks
as tokens grow in number: the paper's, and a reason not to change the size of pictures after training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.tensors import ranking, take

Parity = Literal["paper", "authors"]
CARD = Card(
    title="SoftHGNN: Soft Hypergraph Neural Networks for General Visual Recognition",
    kind="trained",
    site="a module after the tokens of an encoder",
    paper="Lei et al., 2025, arXiv 2505.15325",
    repository="Mengqi-Lei/SoftHGNN",
    mechanism=("similarity",),
    score="products of tokens with prototypes that the picture shifts",
    select="sparse variant: fixed hyperedges and the k best of the others",
    merge="sum of the tokens of a hyperedge, weighed by softmax over tokens",
    claim="After a vision transformer's encoder, hyperedges add more accuracy than one more self-attention.",
    departures=("the loss of balance has a gradient", "hyperedges that are not chosen are not computed"),
)


@dataclass(frozen=True)
class Hyperedges:
    """Who takes part in what."""

    incidence: Tensor
    """(B, N, E): weights of the tokens in each of the picture's hyperedges, summing to 1 over tokens."""
    index: Tensor
    """(B, E) int64 ascending: which of all hyperedges they are, the fixed ones first."""
    balance: Tensor
    """Scalar: mean over dynamic hyperedges of (share of pictures that use it - topk / dynamic)^2; 0 without any."""

    def dense(self, edges: int) -> Tensor:
        """(B, N, edges): the weights in all of ``edges`` hyperedges, 0 in those that were not chosen."""
        out = self.incidence.new_zeros(*self.incidence.shape[:2], edges)
        return out.scatter(2, self.index[:, None].expand_as(self.incidence), self.incidence)


class HyperedgeGenerator(nn.Module):
    """(B, N, dim) to its ``Hyperedges``."""

    def __init__(
        self,
        dim: int,
        edges: int,
        heads: int,
        dynamic: int = 0,
        topk: int = 0,
        rate: float = 0.1,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        if not 0 <= topk <= dynamic or edges + topk < 1:
            raise ValueError(f"topk: got {topk}, must be within the {dynamic} dynamic hyperedges, and one be used")
        if parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {parity!r}, must be 'paper' or 'authors'")
        self.heads, self.fixed, self.dynamic, self.topk = heads, edges, dynamic, topk
        self.rate, self.parity = rate, parity
        every = edges + dynamic
        self.prototype_base = nn.Parameter(nn.init.xavier_uniform_(torch.empty(every, dim)))
        self.context_net = nn.Linear(2 * dim, every * dim)
        self.pre_head_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Hyperedges:
        """``mask`` (B, N) bool: False at tokens that are padding."""
        real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        share = real / real.sum(1, keepdim=True)
        most = x if mask is None else x.masked_fill(~mask[..., None], -torch.inf)
        context = torch.cat([(share[:, None] @ x)[:, 0], most.amax(1)], 1)
        prototypes = self.prototype_base + self.context_net(context).unflatten(1, self.prototype_base.shape)
        z = self.pre_head_proj(x)
        # The mean over heads of products by head is the product of the whole over heads * sqrt(width of a head).
        scale = 1 / (self.heads * (x.shape[2] / self.heads) ** 0.5)
        scores = prototypes[:, self.fixed :] @ (share[:, None] @ z).transpose(1, 2) * scale
        index, balance = self._choose(scores[..., 0])
        logits = z @ take(prototypes, index).transpose(1, 2) * scale
        logits = dropout(logits, self.rate, self.training)
        if mask is not None:
            logits = logits.masked_fill(~mask[..., None], -torch.inf)
        return Hyperedges(logits.softmax(1), index, balance)

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mean products (B, dynamic): the hyperedges to use, and the loss of balance."""
        fixed = torch.arange(self.fixed, device=scores.device).expand(len(scores), -1)
        if not self.dynamic:
            return fixed, scores.new_zeros(())
        best = ranking(scores.detach())[:, : self.topk].sort(1).values
        usage = torch.zeros_like(scores).scatter(1, best, 1.0).detach()
        if self.parity == "paper":
            soft = self.topk * scores.softmax(1)
            usage = usage + soft - soft.detach()
        balance = (usage.mean(0) - self.topk / self.dynamic).square().mean()
        return torch.cat([fixed, best + self.fixed], 1), balance


class SoftHypergraph(nn.Module):
    """Tokens (B, N, dim) plus what they get back from their hyperedges; the same shape, any N."""

    def __init__(self, dim: int, edges: int = 16, heads: int = 4, **generator: Any) -> None:
        super().__init__()
        self.edge_generator = HyperedgeGenerator(dim, edges, heads, **generator)
        self.edge_proj = nn.Sequential(nn.Linear(dim, dim), nn.GELU())
        self.node_proj = nn.Sequential(nn.Linear(dim, dim), nn.GELU())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` (B, N) bool: False at tokens that are padding; they take part in nothing and stay finite."""
        weights = self.edge_generator(x, mask).incidence
        edges = self.edge_proj(weights.transpose(1, 2) @ x)
        return x + self.node_proj(weights @ edges)


@contextmanager
def balances(net: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every forward pass of ``net`` adds the loss of balance of each of its generators to the list."""
    found: list[Tensor] = []
    generators = [module for module in net.modules() if isinstance(module, HyperedgeGenerator)]
    hooks = [module.register_forward_hook(lambda _, given, out: found.append(out.balance)) for module in generators]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class SoftHGNN:
    """Hyperedges after an encoder. The sparse variant of the paper is edges=8, dynamic=64, topk=16."""

    edges: int = 16
    """Hyperedges that every picture uses."""
    heads: int = 4
    """Parts of a vector whose products are averaged; the sparse variant's default is 8."""
    dynamic: int = 0
    """Hyperedges of which a picture uses ``topk``."""
    topk: int = 0
    """Dynamic hyperedges that a picture uses."""
    dropout: float = 0.1
    """Of the products, in training."""
    balance_weight: float = 0.01
    """Of the loss of balance, beside cross-entropy."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": the loss of balance has no gradient."""

    def build(self, dim: int) -> SoftHypergraph:
        """An untrained module for tokens of ``dim`` channels."""
        how: dict[str, Any] = dict(dynamic=self.dynamic, topk=self.topk, rate=self.dropout, parity=self.parity)
        return SoftHypergraph(dim, self.edges, self.heads, **how)

    def after(self, vit: VisionTransformer) -> VisionTransformer:
        """A copy of timm's ``vit`` with an untrained module after its last block."""
        net = copy.deepcopy(vit)
        net.blocks.append(self.build(net.embed_dim))
        return net

    def loss(self, net: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of ``labels`` (B,) plus the weighed mean of the losses of balance of ``net``'s modules."""
        with balances(net) as found:
            loss = cross_entropy(net(pictures), labels)
        return loss + self.balance_weight * torch.stack(found).mean() if found else loss


def claim(trial: AttendTrial, steps: int = 500, seeds: int = 2) -> Outcome:
    """The table of CIFAR: more accurate than the same encoder with one more block of self-attention.

    A small vision transformer on digits, mean of ``seeds`` starts, ``steps`` steps each. A module is larger than a
    block of self-attention, by the layer that shifts prototypes; the note counts parameters.
    """
    system, found, size = SoftHGNN(), dict.fromkeys(("plain", "attention", "hyperedges"), 0.0), {}
    for seed in range(trial.seed, trial.seed + seeds):
        for name in found:
            torch.manual_seed(seed)
            vit = VisionTransformer(8, 2, 1, 10, "avg", 48, 2, 3, class_token=False)
            if name == "attention":
                vit.blocks.append(Block(48, 3, qkv_bias=True))
            net = system.after(vit) if name == "hyperedges" else vit
            size[name] = sum(p.numel() for p in net.parameters())
            trial.fit(net, steps, loss=lambda of, rng: system.loss(of, *trial.draw(rng)))
            found[name] += trial.accuracy(net) / seeds
    note = f"{found['plain']:.1%} with neither; parameters {size['plain']}, {size['attention']} with self-attention, "
    note += f"{size['hyperedges']} with hyperedges; {steps} steps, {seeds} starts"
    baseline, value = found["attention"], found["hyperedges"]
    return Outcome("accuracy on digits", baseline, value, value > baseline, note)

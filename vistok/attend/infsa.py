"""InfSA: attention as a graph, in which what counts is the sum of walks, or the graph's dominant eigenvector.

What: the map is relu of the products, divided by its Frobenius norm and times rho < 1, so that walks of any length have
a finite sum. "pure": one hop of it. "neumann": all hops, (1 - A)^-1 A v, or the first ``steps``. "linear": the energies
of the queries weigh a mean query, relu of the keys' products with it, divided by its sum, weighs the values: one
vector, the same for every token. "power": that again and again, the weights of the keys taken for those of the queries.
Source: Roffo et al., arXiv 2603.00175, giorgioroffo/infinite-self-attention. Where: in place of the self-attention of a
vision transformer.

Products have scale 1 / d: in the release q and k are each scaled by d ** -0.5. It is one hop, or one product with the
mean query; "neumann" and "power" are what the paper describes. Many hops give u (w' v), w the left eigenvector of the
map: weights of keys are to be held against w, not the right one, u. "power" follows q k' without the relu of each
product, because relu(q k') has no factors: where products have mixed signs it need not find w. In "linear" and "power"
tokens meet in one vector a head alone, as in squeeze-and-excitation; what is local must come from elsewhere. The
release reads rho as a number, so that it is not trained; here it is (``parity="authors"``: not), and a padding mask is
kept, which the release takes and ignores. The norm couples all tokens, so there is no causal form. Where all products
are negative, output and gradient are 0. Maps are made in blocks of queries, twice where gradients are needed.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.tensors import length, upcast

Variant = Literal["pure", "neumann", "linear", "power"]
Parity = Literal["paper", "authors"]
CARD = Card(
    title="Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention",
    kind="trained",
    site="in place of the self-attention of a vision transformer",
    paper="Roffo et al., 2026, arXiv 2603.00175",
    repository="giorgioroffo/infinite-self-attention",
    mechanism=("attention",),
    score="relu of products; of keys with the mean query, weighed by energy",
    merge="linear: one sum of values a head, for all tokens",
    claim="The linear form's weights are close to the dominant eigenvector of the quadratic map.",
    departures=("rho is trained", "padding is masked", "causal attention is refused"),
)
EPS = 1e-6
POWER_STEPS = 8


def infsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: Variant = "linear",
    rho: float | Tensor = 0.95,
    steps: int | None = None,
    mask: Tensor | None = None,
    block: int = 256,
) -> Tensor:
    """(B, H, N, dv) of ``q``, ``k`` (B, H, N, d) and ``v`` (B, H, N, dv); memory O(block N), of "neumann" O(N^2).

    ``steps``: of "neumann", the hops (None: all of them, by solving); of "power" iterations (None: 8). ``mask`` (B, N)
    bool: False at padding, which neither sends nor gets anything. "linear" and "power" give all tokens one vector.
    """
    if variant == "linear":
        steps = 1
    if steps is not None and steps < 1:
        raise ValueError(f"steps: got {steps}, must be 1 or more")
    if variant in ("linear", "power"):
        weights = rho * key_weights(q, k, POWER_STEPS if steps is None else steps, mask)
        out = (weights[:, :, None] @ upcast(v)).to(v.dtype).expand(v.shape)
        return out if mask is None else out * mask[:, None, :, None]
    if variant == "neumann":
        walks = walk_map(q, k, rho, mask)
        hop = total = walks @ upcast(v)
        if steps is None:
            eye = torch.eye(len(walks[0, 0]), dtype=walks.dtype, device=walks.device)
            total = torch.linalg.solve(eye - walks, hop)
        for _ in range((steps or 1) - 1):
            hop = walks @ hop
            total = total + hop
        return total.to(v.dtype)
    if variant != "pure":
        raise ValueError(f"variant: got {variant!r}, must be 'pure', 'neumann', 'linear' or 'power'")
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    starts = range(0, q.shape[2], block)
    # Places to write to are made first: small tensors made between large ones would keep a CPU's memory in pieces.
    total, norms = (upcast(v).new_empty(*q.shape[:2], n, d) for n, d in ((q.shape[2], v.shape[3]), (len(starts), 1)))
    for i, start in enumerate(starts):
        rows = slice(start, start + block)
        given = q[:, :, rows], k, v, mask, None if mask is None else mask[:, rows]
        total[:, :, rows], norms[:, :, i] = checkpoint(_hop, *given, use_reentrant=False) if needed else _hop(*given)
    return (total * (rho / (torch.linalg.vector_norm(norms, dim=2, keepdim=True) + EPS))).to(v.dtype)


def _products(q: Tensor, k: Tensor, keys: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
    """relu(q k' / d), 0 where a mask says so."""
    found = (upcast(q) / q.shape[3] @ upcast(k).transpose(2, 3)).relu()
    if keys is not None and queries is not None:
        found = found * (queries[:, None, :, None] & keys[:, None, None])
    return found


def _hop(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None = None, queries: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Some rows of the map times the values, and the Frobenius norm of these rows, (B, H, 1)."""
    found = _products(q, k, keys, queries)
    return found @ upcast(v), torch.linalg.matrix_norm(found)[..., None]


def walk_map(q: Tensor, k: Tensor, rho: float | Tensor = 0.95, mask: Tensor | None = None) -> Tensor:
    """The map A (B, H, N, N), of Frobenius norm rho (and so of spectral radius rho at most), not below 0."""
    found = _products(q, k, mask, mask)
    return rho * found / (torch.linalg.matrix_norm(found, keepdim=True) + EPS)


def key_weights(q: Tensor, k: Tensor, steps: int = 1, mask: Tensor | None = None) -> Tensor:
    """(B, H, N) weights of the keys, not below 0, of sum 1; ``steps`` 1 is the linear form.

    Time O(N d) a step, and nothing of the size of the map.
    """
    q, k = (upcast(t) * q.shape[3] ** -0.5 for t in (q, k))
    weights = length(q)
    real = torch.ones_like(weights) if mask is None else mask[:, None]
    weights = weights * real
    for _ in range(steps):
        mean = (weights / (weights.sum(2, keepdim=True) + EPS))[:, :, None] @ q
        weights = (k @ mean.transpose(2, 3))[..., 0].relu() * real
    return weights / (weights.sum(2, keepdim=True) + EPS)


@torch.no_grad()
def dominant(q: Tensor, k: Tensor, left: bool = True, steps: int = 50, block: int = 256) -> Tensor:
    """(B, H, N) of length 1: the true dominant eigenvector of relu(q k'), by ``steps`` of power iteration.

    ``left``: of keys, w' A = c w'; else of queries, A u = c u. Memory O(block N).
    """
    found = q.new_full(q.shape[:3], q.shape[2] ** -0.5)
    for _ in range(steps):
        total = torch.zeros_like(found)
        for start in range(0, q.shape[2], block):
            rows = slice(start, start + block)
            part = _products(q[:, :, rows], k)
            if left:
                total += (found[:, :, None, rows] @ part)[:, :, 0]
            else:
                total[:, :, rows] = (part @ found[..., None])[..., 0]
        found = total / length(total)[..., None].clamp_min(torch.finfo(total.dtype).tiny)
    return found


class InfSAAttention(nn.Module):
    """(B, N, dim) to the same, in the place of timm's attention. ``rho`` starts at ``rho_init``, one a layer."""

    def __init__(
        self,
        dim: int,
        heads: int,
        variant: Variant = "linear",
        rho_init: float = 0.95,
        steps: int | None = None,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        if not 0 < rho_init < 1:
            raise ValueError(f"rho_init: got {rho_init}, must be between 0 and 1")
        if parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {parity!r}, must be 'paper' or 'authors'")
        self.heads, self.variant, self.steps, self.parity = heads, variant, steps, parity
        self.rho_logit = nn.Parameter(torch.tensor(math.log(rho_init / (1 - rho_init))))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        for layer in (*self.qkv.weight.detach().chunk(3), self.proj.weight):
            nn.init.xavier_uniform_(layer)
        for bias in (self.qkv.bias, self.proj.bias):
            nn.init.zeros_(bias)

    @property
    def rho(self) -> Tensor:
        logit = self.rho_logit.detach() if self.parity == "authors" else self.rho_logit
        return logit.sigmoid()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, heads, N, d) of ``x`` (B, N, dim)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``attn_mask`` (B, N) bool: False at padding."""
        if is_causal:
            raise ValueError("is_causal: got True, must be False: the norm of the map couples all tokens")
        if attn_mask is not None and attn_mask.shape != x.shape[:2]:
            raise ValueError(f"attn_mask: got shape {tuple(attn_mask.shape)}, must be {tuple(x.shape[:2])}")
        out = infsa(*self.split(x), self.variant, self.rho, self.steps, attn_mask)
        return self.proj(out.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class InfSA:
    """Infinite self-attention in a vision transformer."""

    variant: Literal["pure", "neumann", "linear", "power"] = "linear"
    """One hop, all hops, one product with the mean query, or several."""
    rho: float = 0.95
    """What a hop keeps, at the start of training."""
    steps: int | None = None
    """Of "neumann", the hops (None: all); of "power", the iterations (None: 8)."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": rho is not trained."""

    def build(self, vit: VisionTransformer) -> VisionTransformer:
        """A copy of timm's ``vit`` with this attention in every block, and the weights of the old one in it."""
        net = copy.deepcopy(vit)
        for block in net.blocks:
            old = block.attn
            if not isinstance(old.q_norm, nn.Identity) or old.gate is not None:
                raise ValueError("vit: must have no norm of queries and keys, and no gate")
            new = InfSAAttention(net.embed_dim, old.num_heads, self.variant, self.rho, self.steps, self.parity)
            with torch.no_grad():
                for to, of in ((new.qkv, old.qkv), (new.proj, old.proj)):
                    to.weight.copy_(of.weight)
                    if of.bias is not None:
                        to.bias.copy_(of.bias)
            block.attn = new
        return net


def claim(trial: AttendTrial, steps: int = 300) -> Outcome:
    """The abstract: cosine of 0.985 with the eigenvector. Holds at 0.95 if equal weights are not as close.

    A small vision transformer of the linear form learns digits; mean over its layers, heads and 64 digits. The note
    has the cosine of "power" too, and accuracy beside softmax attention trained alike.
    """
    torch.manual_seed(trial.seed)
    plain = VisionTransformer(8, 1, 1, 10, "avg", 48, 3, 3, class_token=False)
    net = InfSA().build(plain)
    for model in (plain, net):
        trial.fit(model, steps)
    pictures, _ = trial.draw(torch.Generator().manual_seed(trial.seed), 64)
    found = dict.fromkeys(("equal", "linear", "power", "right"), 0.0)
    hooks, seen = [], []
    for block in net.blocks:
        hooks.append(block.attn.register_forward_pre_hook(lambda attn, given: seen.append(attn.split(given[0]))))
    with torch.no_grad():
        net(pictures)
    for hook in hooks:
        hook.remove()
    for q, k, _ in seen:
        true, linear = dominant(q, k), key_weights(q, k)
        kinds = (("equal", torch.ones_like(true)), ("linear", linear), ("power", key_weights(q, k, POWER_STEPS)))
        for name, weights in kinds:
            found[name] += cosine_similarity(weights, true, dim=2).mean().item() / len(seen)
        found["right"] += cosine_similarity(linear, dominant(q, k, left=False), dim=2).mean().item() / len(seen)
    note = f"power {found['power']:.3f}; with the right eigenvector {found['right']:.3f}; accuracy on digits "
    note += f"{trial.accuracy(net):.1%}, {trial.accuracy(plain):.1%} with softmax attention, {steps} steps each"
    holds = found["linear"] >= 0.95 and found["linear"] > found["equal"]
    return Outcome("cosine with the dominant eigenvector", found["equal"], found["linear"], holds, note)

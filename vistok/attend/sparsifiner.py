"""Sparsifiner: a low-rank guess of the attention map says which few keys each query attends to.

What: a small predictor makes, for each picture, head and patch, a score of every key: q and k are cut to fewer
channels, the keys to r summaries, and softmax weights over these, times a learned basis of r rows, are the
connectivity. The K best keys of a query are attended to, exactly; the class token attends to all. Trained from a vision
transformer that is also its teacher: first the predictor learns the teacher's maps while attention is dense, then
attention is sparse. Source: Wei et al., arXiv 2303.13755, lim142857/Sparsifiner; the predictor's parameters bear the
authors' names. Where: every self-attention of a vision transformer with a fixed number of tokens. Optional pruning
drops the patches that the class token attends to least.

After the first phase the basis is its absolute value with small entries 0, and a patch keeps its largest coefficients
alone. No gradient goes through the choice of keys. The released code scales the predictor by the number of heads, not
by its width, and runs dense attention under a mask; here keys are gathered, or masked by ``executor="dense"``. Fewer
operations, but no less time: on a CPU both take longer than dense attention, at 17 to 1,025 tokens. Patches that are
pruned are dropped: where the released code sets them to zero and masks them, the result is the same. It sums the
reconstruction over the batch, where here pictures are averaged. Left out: its phases of self-distillation, one table
for summaries and basis, and tables for another number of tokens.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from vistok.catalogue.card import AttendTrial, Card, Outcome
from vistok.core.attention import Dense, Executor, TokenIndex, attend, attention_rows, class_row
from vistok.core.tensors import ranking, take

Parity = Literal["paper", "authors"]
CARD = Card(
    title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    kind="trained",
    site="in place of every self-attention of a vision transformer with a class token",
    paper="Wei et al., 2023, arXiv 2303.13755",
    repository="lim142857/Sparsifiner",
    mechanism=("attention",),
    needs=("a trained vision transformer, its teacher",),
    score="low-rank prediction of the attention map, by head",
    select="the k best keys of each query",
    claim="Attending to a quarter of the keys costs at most 0.4 points of accuracy.",
    departures=("the predictor's scale is that of its width", "pruned tokens are dropped, not masked"),
)


class ConnectivityPredictor(nn.Module):
    """Scores of all N keys for each patch, from q and k.

    ``head_dim``: of q and k; ``tokens`` N, the class token first; r = N // ``n_factor`` summaries of the keys, in
    head_dim // ``c_factor`` channels. ``reconstructs``, in the first phase: the basis as it is, all coefficients.
    Else basis entries up to ``basis_threshold`` are 0, and of the coefficients the ``coef_topk`` largest stay; with 0
    those above ``coef_threshold``.
    """

    def __init__(
        self,
        head_dim: int,
        heads: int,
        tokens: int,
        n_factor: int = 6,
        c_factor: int = 2,
        basis_threshold: float = 0.02,
        coef_topk: int = 8,
        coef_threshold: float = 0.05,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        rank, width = tokens // n_factor, head_dim // c_factor
        if rank < 1 or width < 1:
            raise ValueError(f"n_factor, c_factor: got {n_factor}, {c_factor}, at most {tokens}, {head_dim} are right")
        if parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {parity!r}, must be 'paper' or 'authors'")
        self.basis_threshold, self.coef_topk, self.coef_threshold = basis_threshold, coef_topk, coef_threshold
        self.scale = heads**-0.5 if parity == "authors" else width**-0.5
        self.reconstructs = False
        self.proj_c_q, self.proj_c_k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.proj_n, self.proj_back_n = (nn.Parameter(torch.empty(tokens, rank)) for _ in range(2))
        for parameter in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(parameter, std=0.02)

    def coefficients(self, q: Tensor, k: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, heads, n - 1, r): how much each patch's row of the map is of each row of the basis."""
        summaries = self.proj_c_k(k).transpose(2, 3) @ _rows_of(self.proj_n, keep)
        coef = (self.proj_c_q(q[:, :, 1:]) @ summaries * self.scale).softmax(3)
        if self.reconstructs:
            return coef
        if not self.coef_topk:
            return coef * (coef > self.coef_threshold)
        return coef * _largest(coef.detach(), min(self.coef_topk, coef.shape[3]))

    def basis(self, keep: Tensor | None = None) -> Tensor:
        """(r, N), or of the tokens ``keep`` (B, n) alone, (B, 1, r, n)."""
        basis = self.proj_back_n if self.reconstructs else self.proj_back_n.abs()
        basis = basis if self.reconstructs else basis * (basis > self.basis_threshold)
        return _rows_of(basis, keep).transpose(-1, -2)

    def forward(self, q: Tensor, k: Tensor, keep: Tensor | None = None) -> Tensor:
        """The connectivity (B, heads, n - 1, n): rows are patches, columns all tokens, the class token first.

        ``q``, ``k`` (B, heads, n, head_dim); ``keep`` (B, n) int64: which of the N tokens they are, if not all.
        """
        return self.coefficients(q, k, keep) @ self.basis(keep)


class SparsifinerAttention(nn.Module):
    """Self-attention of n tokens, the class token first, each patch over its K = ceil(keep_rate * N) best keys.

    ``keep_rate`` 0: over the keys whose score is above ``score_threshold`` instead.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int,
        keep_rate: float = 0.25,
        score_threshold: float = 1e-4,
        qkv_bias: bool = True,
        executor: Executor = "auto",
        **predictor: Any,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, must divide dim, {dim}")
        if not 0 <= keep_rate <= 1:
            raise ValueError(f"keep_rate: got {keep_rate}, must be in 0..1")
        self.heads, self.budget, self.score_threshold = heads, math.ceil(keep_rate * tokens), score_threshold
        self.executor = executor
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.mask_predictor = ConnectivityPredictor(dim // heads, heads, tokens, **predictor)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, heads, n, d) of ``x`` (B, n, dim)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def pattern(self, scores: Tensor, pruned: bool = False) -> TokenIndex:
        """Which keys each patch sees, by ``scores`` (B, heads, n - 1, n)."""
        b, heads, patches, n = scores.shape
        if self.budget:
            most = min(self.budget, patches) if pruned else self.budget
            index = _largest(scores.detach(), most).nonzero()[:, 3].view(b, heads, patches, most)
            return TokenIndex(index, patches, n)
        seen = scores.detach() > self.score_threshold
        return TokenIndex(torch.where(seen, torch.arange(n, device=seen.device), -1), patches, n)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The output (B, n, dim), the connectivity (B, heads, n - 1, n), and what each token may see, (B, heads, n, n)
        bool; while the predictor reconstructs, attention is dense all the same. ``keep`` as in the predictor."""
        q, k, v = self.split(x)
        n = x.shape[1]
        scores = self.mask_predictor(q, k, keep)
        pattern = self.pattern(scores, keep is not None)
        if self.mask_predictor.reconstructs:
            out = attend(q, k, v, Dense(n, n))
        else:
            first = attend(q[:, :, :1], k, v, Dense(1, n))
            out = torch.cat([first, attend(q[:, :, 1:], k, v, pattern, executor=self.executor)], 2)
        mask = torch.cat([torch.ones_like(scores[:, :, :1], dtype=torch.bool), pattern.to_dense(x.device)], 2)
        return self.proj(out.transpose(1, 2).flatten(2)), scores, mask


def _largest(x: Tensor, k: int) -> Tensor:
    """Where the ``k`` largest of each row of ``x`` (..., n) are, bool; ties to the lower index. No row is sorted."""
    least = x.topk(k, dim=-1).values[..., -1:]
    above, level = x > least, x == least
    return above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def _rows_of(table: Tensor, keep: Tensor | None) -> Tensor:
    return table if keep is None else table[keep][:, None]


def prune(q: Tensor, k: Tensor, patches: int) -> Tensor:
    """(B, 1 + patches) int64 ascending: the class token, and the patches that it attends to most, heads averaged.

    ``q``, ``k`` (B, heads, n, d), the class token first.
    """
    best = ranking(class_row(q, k).mean(1))[:, :patches].sort(1).values
    return torch.cat([torch.zeros_like(best[:, :1]), best + 1], 1)


@dataclass(frozen=True)
class Trace:
    """What a forward pass leaves for the losses."""

    logits: Tensor
    """(B, classes)"""
    tokens: Tensor
    """(B, n, dim): after the last norm."""
    maps: list[Tensor]
    """A layer each, (B, heads, n - 1, n): rows of patches; of the teacher attention, of the student connectivity."""
    keep: Tensor | None = None
    """(B, n) int64: the tokens that were not pruned, if some were."""


def trace_teacher(vit: VisionTransformer, x: Tensor) -> Trace:
    """Of a timm ViT on pictures ``x``, without gradients."""
    maps: list[Tensor] = []

    def see(attention: Any, _: Any, qkv: Tensor) -> None:
        q, k, _ = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        maps.append(attention_rows(q[:, :, 1:], k, attention.scale))

    hooks = [
        block.attn.qkv.register_forward_hook(lambda _, given, qkv, of=block.attn: see(of, given, qkv))
        for block in vit.blocks
    ]
    try:
        with torch.no_grad():
            tokens = vit.forward_features(x)
            return Trace(vit.forward_head(tokens), tokens, maps)
    finally:
        for hook in hooks:
            hook.remove()


def sparsifiner_losses(student: Trace, teacher: Trace, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, KL to the teacher's logits, mean square of the tokens, and of the maps the sum of squares of a
    picture, mean over layers; weighed 1, 0.5, 0.5 and 0.01 in the paper. Maps count where nothing was pruned."""
    tokens = teacher.tokens if student.keep is None else take(teacher.tokens, student.keep)
    both = [(a, b) for a, b in zip(student.maps, teacher.maps, strict=True) if a.shape == b.shape]
    logs = log_softmax(student.logits, 1), log_softmax(teacher.logits, 1)
    return {
        "classes": cross_entropy(student.logits, labels),
        "logits": kl_div(*logs, reduction="batchmean", log_target=True),
        "tokens": (student.tokens - tokens).square().mean(),
        "maps": torch.stack([(a - b).square().sum((1, 2, 3)).mean() for a, b in both]).sum() / len(student.maps),
    }


class SparseViT(nn.Module):
    """A timm ViT with a class token whose attention is sparse: pictures to logits. See ``Sparsifiner.build``."""

    def __init__(self, vit: VisionTransformer, pruning: dict[int, float], **attention: Any) -> None:
        super().__init__()
        if vit.num_prefix_tokens != 1 or not isinstance(vit.blocks[0].attn.q_norm, nn.Identity):
            raise ValueError("vit: must have a class token, no registers, and no norm of queries and keys")
        if any(not 0 <= block < len(vit.blocks) for block in pruning):
            raise ValueError(f"prune_at: got block {max(pruning)}, must be within the {len(vit.blocks)} blocks")
        self.vit, self.pruning = copy.deepcopy(vit), pruning
        tokens = vit.patch_embed.num_patches + 1
        for block in self.vit.blocks:
            old = block.attn
            new = SparsifinerAttention(
                vit.embed_dim, old.num_heads, tokens, qkv_bias=old.qkv.bias is not None, **attention
            )
            new.qkv, new.proj = old.qkv, old.proj
            block.attn = new

    @property
    def predictors(self) -> list[ConnectivityPredictor]:
        return [block.attn.mask_predictor for block in self.vit.blocks]

    def reconstruct(self, yes: bool) -> None:
        """Whether the predictors are in their first phase: attention is dense then, and nothing is pruned."""
        for predictor in self.predictors:
            predictor.reconstructs = yes

    def trace(self, x: Tensor) -> Trace:
        vit, maps, keep = self.vit, [], None
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
        patches = x.shape[1] - 1
        for i, block in enumerate(vit.blocks):
            given = block.norm1(x)
            out, scores, _ = block.attn(given, keep)
            maps.append(scores)
            x = x + block.drop_path1(block.ls1(out))
            if i in self.pruning and not block.attn.mask_predictor.reconstructs:
                q, k, _ = block.attn.split(given)
                kept = prune(q, k, math.ceil(self.pruning[i] * patches))
                x, keep = take(x, kept), kept if keep is None else take(keep, kept)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        tokens = vit.norm(x)
        return Trace(vit.forward_head(tokens), tokens, maps, keep)

    def forward(self, x: Tensor) -> Tensor:
        return self.trace(x).logits


@dataclass(frozen=True)
class Sparsifiner:
    """Sparse attention in a trained vision transformer."""

    keep_rate: float = 0.25
    """Share of all keys that a patch sees; 0: those whose score is above 1e-4."""
    n_factor: int = 6
    """Tokens to a summary of the predictor."""
    c_factor: int = 2
    """Channels of a head to one of the predictor."""
    coef_topk: int = 8
    """Rows of the basis that a patch's row is made of."""
    token_keep: float = 1.0
    """Share of the patches that pruning leaves at the first of its blocks, its square at the second, and so on."""
    prune_at: tuple[int, ...] = (3, 6, 9)
    """Blocks that prune, after their attention, counted from 0."""
    executor: Executor = "auto"
    """Of attend: gathered keys by default; "dense" masks the map."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": the predictor is scaled by the number of heads."""

    def build(self, vit: VisionTransformer) -> SparseViT:
        """A copy of timm's ``vit``, with untrained predictors in their second phase."""
        pruning = {block: self.token_keep ** (i + 1) for i, block in enumerate(self.prune_at)}
        how: dict[str, Any] = dict(n_factor=self.n_factor, c_factor=self.c_factor, coef_topk=self.coef_topk)
        how |= dict(keep_rate=self.keep_rate, executor=self.executor, parity=self.parity)
        return SparseViT(vit, pruning if self.token_keep < 1 else {}, **how)

    def flops(self, tokens: int, head_dim: int) -> tuple[int, int]:
        """Of one head: of dense attention between its projections, and of the predictor and sparse attention.

        The connectivity counts with ``coef_topk`` coefficients a patch, and a basis without zeros.
        """
        rank, width, keys = tokens // self.n_factor, head_dim // self.c_factor, math.ceil(self.keep_rate * tokens)
        predictor = 2 * width * (2 * tokens * head_dim + 2 * tokens * rank)
        predictor += 2 * tokens * tokens * min(self.coef_topk or rank, rank)
        return 4 * tokens * tokens * head_dim, predictor + 4 * (tokens * keys + tokens) * head_dim


def claim(trial: AttendTrial, steps: int = 250) -> Outcome:
    """The abstract: at most 0.4 points lost. Its 48 to 69% fewer operations are counted for the note, at 197 tokens and
    heads of 64.

    A small vision transformer learns digits; its sparse copy learns its maps, then to do as it does. The dense one
    learns on for as many steps, so that both have seen as much.
    """
    torch.manual_seed(trial.seed)
    teacher = VisionTransformer(8, 2, 1, embed_dim=48, depth=3, num_heads=3, num_classes=10)
    trial.fit(teacher, steps)
    system = Sparsifiner(n_factor=2, executor="dense")
    student = system.build(teacher)
    teach(trial, student, teacher, steps // 5, 3 * steps // 5)
    dense = copy.deepcopy(teacher)
    trial.fit(dense, 4 * steps // 5, peak_lr=1e-3)
    before, after = trial.accuracy(dense), trial.accuracy(student)
    full, sparse = Sparsifiner().flops(197, 64)
    seen = student.vit.blocks[0].attn.budget
    note = f"{seen} of 17 keys a patch; at 197 tokens {1 - sparse / full:.0%} fewer operations, predictor included"
    return Outcome("accuracy on digits", before, after, after >= before - 0.004, note)


def teach(trial: AttendTrial, student: SparseViT, teacher: VisionTransformer, first: int, second: int) -> None:
    """Train ``student`` in place: ``first`` steps of its predictors alone, then ``second`` of all of it."""

    def losses(net: Any, rng: Any) -> dict[str, Tensor]:
        pictures, labels = trial.draw(rng)
        return sparsifiner_losses(net.trace(pictures), trace_teacher(teacher, pictures), labels)

    def distill(net: Any, rng: Any) -> Tensor:
        found = losses(net, rng)
        return found["classes"] + 0.5 * found["logits"] + 0.5 * found["tokens"] + 0.01 * found["maps"]

    teacher.eval()
    student.reconstruct(True)
    student.vit.requires_grad_(False)
    for predictor in student.predictors:
        predictor.requires_grad_(True)
    trial.fit(student, first, loss=lambda net, rng: losses(net, rng)["maps"], peak_lr=1e-2)
    student.reconstruct(False)
    student.requires_grad_(True)
    trial.fit(student, second, loss=distill, peak_lr=1e-3)

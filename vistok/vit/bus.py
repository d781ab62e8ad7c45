"""BUS: a text chooses patches inside the vision transformer, and a small decoder sums up what is left.

What: in the middle of a ViT each patch is scored by an MLP on its value and the text's vector. The patches of highest
score stay, the others become one token, their mean weighted by the scores (TSPS). On top of the ViT a transformer
decoder writes a summary of fixed length (PAD): its queries are the patches that fit the text best, its keys and values
all tokens that came out. The choice is hard, so that the scorer learns from labels of patches (PTM), 1 where a box that
the text names overlaps the patch, and through the weights of the mean. Source: Jiang et al., arXiv 2307.08504; no
authors' code. Where: after a middle block, and after the last.

The constants of the paper could not be checked: the share that stays, the block, the decoder's size. Its other losses
(contrastive, matching, language modelling) belong to the language side and are not here; the text's vector is given.
PAD's queries also have a learned part, so that a summary has its length where fewer tokens came out. Without a text the
class token's attention chooses, and the queries are the learned part alone.

    with selector.given(text) as given, vistok.apply(vit, selector):
        tokens = vit.forward_features(pixels)
    loss = ptm_loss(given.logits, boxes_to_patch_labels(boxes, grid))
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, pad

from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.core.position import order, rest
from vistok.core.select import topk
from vistok.core.soft import aggregate, gather_weights
from vistok.core.tensors import take, upcast
from vistok.host import apply
from vistok.host.keep import Keep
from vistok.host.vit import KeepRate, TokenState, ViTEvidence
from vistok.world import VOCABULARY, Thing, derive_seed, make

CARD = Card(
    title="BUS: Efficient and Effective Vision-language Pre-training with Bottom-Up Patch Summarization",
    kind="trained",
    site="after a middle block of a vision transformer, and a decoder after its last",
    paper="Jiang et al., 2023, arXiv 2307.08504",
    mechanism=("query", "attention"),
    needs=("a vector of the text", "boxes of what the text names, in training"),
    score="an MLP on each patch and the text's vector",
    allocate="a fixed share",
    select="top-k",
    merge="one token, the mean of the others weighted by their scores; then a decoder's summary of all",
    claim="The patches that stay are those that the text is about.",
)


@dataclass(eq=False)
class Given:
    """A text and, after a forward pass, what it chose."""

    text: Tensor
    """(B, Dt)"""
    logits: Tensor | None = None
    """(B, N): before the sigmoid, for ``ptm_loss``; None where nothing had to go."""
    index: Tensor | None = None
    """(B, K) int64: the patches that stayed, ascending."""


class TextPatchSelector(nn.Module, KeepRate):
    """TSPS, to be put into a ViT of width ``dim`` by ``vistok.apply``, inside ``given(text)``.

    ``keep``: share of the patches that stay, or their number. ``layer``: the block, from 0, after which they are
    chosen. It trains with the model that it is in; its parameters are its own.
    """

    place: ClassVar[Literal["mid", "after"]] = "after"

    def __init__(self, dim: int, text_dim: int, keep: Keep = 0.6, layer: int = 5) -> None:
        super().__init__()
        self.keep, self.layers = keep, (layer,)
        self.__post_init__()
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Sequential(nn.Linear(dim + text_dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, 1))
        self._given: Given | None = None

    @property
    def extra(self) -> int:
        return 1

    @contextmanager
    def given(self, text: Tensor) -> Iterator[Given]:
        """``text`` (B, Dt), a row a picture, chooses in every forward pass inside the ``with``; what it chose is told.

        Raises RuntimeError inside another one.
        """
        if self._given is not None:
            raise RuntimeError("given: this selector has a text already; leave that `with` first")
        self._given = Given(text)
        try:
            yield self._given
        finally:
            self._given = None

    def logits(self, v: Tensor, text: Tensor) -> Tensor:
        """(B, N): how well the patches ``v`` (B, N, D) fit their picture's ``text`` (B, Dt), before the sigmoid."""
        if len(text) != len(v):
            raise ValueError(f"text: got {len(text)} rows for {len(v)} pictures, must be one each")
        both = torch.cat([self.norm(v), text[:, None].expand(-1, v.shape[1], -1)], 2)
        return self.score(both)[:, :, 0]

    def forward(self, v: Tensor, text: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, keep + 1, D), the fused one last; the patches kept (B, keep) int64, ascending; logits (B, N).

        ``keep`` = N: ``v`` itself, and no fused one.
        """
        logits = self.logits(v, text)
        if keep == v.shape[1]:
            return v, torch.arange(keep, device=v.device).expand(len(v), -1), logits
        index, others, weights = _split(logsigmoid(upcast(logits)), keep)
        return _fused(v, index, others, weights), index, logits

    def reduce(self, state: TokenState, evidence: ViTEvidence, count: int) -> TokenState:
        if self._given is None:
            log_score = evidence.class_row.mean(1).clamp_min(1e-20).log()
        else:
            self._given.logits = self.logits(state.slots, self._given.text)
            log_score = logsigmoid(upcast(self._given.logits))
        index, others, weights = _split(log_score, count)
        if self._given is not None:
            self._given.index = index
        into = torch.full_like(state.anchor, count)
        into = into.scatter(1, index, torch.arange(count, device=index.device).expand_as(index))
        best = others.gather(1, weights.argmax(1, keepdim=True))
        return state.regroup(_fused(state.slots, index, others, weights), into, torch.cat([index, best], 1))


def _split(log_score: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` best and the others of (B, N), ascending, and weights (B, N - count) of these, which sum to 1."""
    index = order(topk(log_score, count))
    others = rest(index, log_score.shape[1])
    return index, others, gather_weights(take(log_score, others))


def _fused(v: Tensor, index: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    return torch.cat([take(v, index), aggregate(take(v, others), weights[:, None])], 1)


class PatchAbstractionDecoder(nn.Module):
    """PAD: (B, L, D) tokens to a summary (B, n, D), whatever L is."""

    def __init__(self, dim: int, layers: int = 2, n: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(n, dim) * 0.02)
        shape: dict[str, Any] = dict(dim_feedforward=4 * dim, dropout=0.0, activation="gelu")
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(dim, heads, batch_first=True, norm_first=True, **shape) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, scores: Tensor | None = None) -> Tensor:
        """``scores`` (B, L): the tokens of highest score begin as queries, in falling order, added to the learned ones;
        those of score -inf never. Without it the learned ones are all."""
        queries = self.queries.expand(len(tokens), -1, -1)
        if scores is not None:
            best = topk(scores, min(queries.shape[1], scores.shape[1]))
            first = take(tokens, best) * take(scores, best).isfinite()[:, :, None]
            queries = queries + pad(first, (0, 0, 0, queries.shape[1] - best.shape[1]))
        for layer in self.layers:
            queries = layer(queries, tokens)
        return self.norm(queries)


class PatchSummarizer(nn.Module):
    """A copy of a timm ViT, the selector in it and the decoder on it: pictures and a text's vector to a summary."""

    def __init__(self, vit: Any, selector: TextPatchSelector, decoder: PatchAbstractionDecoder) -> None:
        super().__init__()
        self.vit, self.selector, self.decoder = copy.deepcopy(vit), selector, decoder

    def forward(self, pictures: Tensor, text: Tensor | None = None) -> tuple[Tensor, Given | None]:
        """(B, n, D) of ``pictures`` (B, 3, H, W) and ``text`` (B, Dt), and what the text chose; None: no text."""
        with nullcontext() if text is None else self.selector.given(text) as given, apply(self.vit, self.selector):
            x = self.vit.forward_features(pictures)
        if given is None or given.logits is None or given.index is None:
            return self.decoder(x), given
        prefix = self.vit.num_prefix_tokens
        scores = pad(upcast(take(given.logits, given.index)), (prefix, 1), value=-torch.inf)
        return self.decoder(x, scores), given


@dataclass(frozen=True)
class BUS:
    """A selector and a decoder by size; all constants are ours (see above)."""

    keep: Keep = 0.6
    """Share of the patches that stay, rounded up, or their number; the fused one is not counted."""
    layer: int = 5
    """Block, from 0, after which the text chooses: the middle of 12."""
    summary: int = 16
    """Tokens of the summary."""
    decoder_layers: int = 2
    """Layers of the decoder."""

    def build(self, vit: Any, text_dim: int) -> PatchSummarizer:
        """A copy of ``vit`` (timm) with an untrained selector and decoder."""
        dim, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
        return PatchSummarizer(
            vit,
            TextPatchSelector(dim, text_dim, self.keep, self.layer),
            PatchAbstractionDecoder(dim, self.decoder_layers, self.summary, heads),
        )


def boxes_to_patch_labels(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h * w) bool, raster order: which patches overlap one of their picture's ``boxes``.

    ``boxes`` (B, M, 4): x0, y0, x1, y1 as shares of the picture's sides; one without area fills up and counts nowhere.
    """
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes: got shape {tuple(boxes.shape)}, must be (B, M, 4)")

    def overlap(low: Tensor, high: Tensor, parts: int) -> Tensor:
        edges = torch.arange(parts + 1, device=boxes.device, dtype=low.dtype) / parts
        return (low[..., None] < edges[1:]) & (high[..., None] > edges[:-1]) & (low < high)[..., None]

    x0, y0, x1, y1 = upcast(boxes).unbind(2)
    down, across = overlap(y0, y1, grid[0]), overlap(x0, x1, grid[1])
    return (down[..., :, None] & across[..., None, :]).any(1).flatten(1)


def ptm_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of ``logits`` (B, N) and patch ``labels`` (B, N), mean over the samples that count.

    ``mask`` (B,) bool: which do; by default those with a positive patch, since one without boxes says nothing. 0 where
    none does.
    """
    mask = labels.any(1) if mask is None else mask
    each = binary_cross_entropy_with_logits(upcast(logits), labels.to(upcast(logits).dtype), reduction="none").mean(1)
    return (each * mask).sum() / mask.sum().clamp_min(1)


# The claim ------------------------------------------------------------------------------------------------------------

KEPT = 4
"""Patches that the trial keeps: the smallest thing has as many."""
_WIDTH = 64
_STREAM = 1 << 24


@dataclass(frozen=True)
class _Named:
    """B pictures, each with a caption that names one of the things in it."""

    images: Tensor
    """(B, H, W, 3) uint8"""
    words: Tensor
    """(B, W) int64: places in the world's vocabulary."""
    boxes: Tensor
    """(B, 1, 4): of the thing, as shares of the sides."""

    def to(self, device: str) -> _Named:
        return _Named(self.images.to(device), self.words.to(device), self.boxes.to(device))


@dataclass(frozen=True)
class _NamedThings:
    """Scenes of two to five things, and the words "the red star" for one that is the only red star there."""

    name: str = "named things"

    def draw(self, start: int, n: int, *, seed: int = 0, split: str = "train", size: int = 96) -> _Named:
        images, words, boxes = [], [], []
        for number in range(start, start + n):
            image, thing = _scene(number, seed, split, size)
            images.append(image)
            words.append([VOCABULARY.index(w) for w in ("the", thing.attributes["colour"], thing.attributes["shape"])])
            boxes.append([[edge / size for edge in thing.box]])
        return _Named(torch.from_numpy(np.stack(images)), torch.tensor(words), torch.tensor(boxes))


def _scene(number: int, seed: int, split: str, size: int) -> tuple[Any, Thing]:
    """The image, and a thing whose name no other thing there has; scenes without one are passed over."""
    while True:
        picture = make("scenes", derive_seed(seed, number, split), size, 0)
        names = [(thing.attributes["colour"], thing.attributes["shape"]) for thing in picture.things]
        only = [thing for thing, name in zip(picture.things, names, strict=True) if names.count(name) == 1]
        if len(names) > 1 and only:
            return picture.image, only[number % len(only)]
        number += _STREAM


class _Pointer(nn.Module):
    """A frozen ViT, an embedding of words whose mean is the text's vector, and a selector of ``KEPT`` patches."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = copy.deepcopy(vit).requires_grad_(False)
        self.words = nn.Embedding(len(VOCABULARY), _WIDTH)
        self.selector = TextPatchSelector(vit.embed_dim, _WIDTH, KEPT, len(vit.blocks) // 2 - 1)

    def forward(self, batch: _Named, blind: bool = False) -> tuple[Tensor, Tensor | None]:
        """Patches that stay (B, KEPT) and the logits that chose them; ``blind``: the class token chooses."""
        pixels = batch.images.permute(0, 3, 1, 2).float() / 127.5 - 1
        text = nullcontext() if blind else self.selector.given(self.words(batch.words).mean(1))
        session: Any
        with text as given, apply(self.vit, self.selector) as session:
            self.vit(pixels)
            return session.states[-1].anchor[:, :KEPT], given.logits if given else None

    def labels(self, batch: _Named) -> Tensor:
        """(B, N) bool: the patches of the thing that is named."""
        return boxes_to_patch_labels(batch.boxes, self.vit.patch_embed.grid_size)


def learn(trial: ViTTrial, steps: int, seed: int) -> _Pointer:
    """Words and a selector after the middle block of the zoo's segmenter, trained by PTM alone; it stays frozen."""

    def loss(model: _Pointer, batch: _Named) -> tuple[Tensor, Tensor]:
        index, logits = model(batch)
        labels = model.labels(batch)
        return ptm_loss(logits, labels), labels.gather(1, index).float().mean()

    torch.manual_seed(seed)
    model = _Pointer(trial.segmenter)
    trial.fit(model, steps, task=_NamedThings(), loss=loss, batch_size=16, peak_lr=1e-2, seed=seed)
    return model


Chooser = Literal["caption", "another caption", "class token", "chance"]


def precision(trial: ViTTrial, chooser: Chooser, model: _Pointer | None = None) -> float:
    """Share of the ``KEPT`` patches that are of the thing which the caption names, on held-out scenes, in [0, 1].

    ``chooser``: the caption, that of another picture, the attention of the zoo's class token at the same block, or
    chance. ``model``: what ``learn`` trained, for the captions; the class token is the classifier's.
    """
    net, found = model or _Pointer(trial.classifier), []
    net.eval()
    with torch.no_grad():
        for start in range(0, trial.pictures, 64):
            n = min(64, trial.pictures - start)
            batch = _NamedThings().draw(start, n, seed=1, split="test", size=trial.size)
            labels = net.labels(batch).float()
            if chooser != "chance":
                words = batch.words.roll(1, 0) if chooser == "another caption" else batch.words
                index, _ = net(_Named(batch.images, words, batch.boxes), blind=chooser == "class token")
                labels = labels.gather(1, index)
            found.append(labels.mean(1))
    return torch.cat(found).mean().item()


def claim(trial: ViTTrial, steps: int = 400) -> Outcome:
    """The text chooses the patches: those of the thing that the caption names, one of two to five in a scene.

    Against the class token's attention at the same block of the classifier that the segmenter began as, which sees no
    text. Holds if the text's choice is twice as precise.
    """
    blind = precision(trial, "class token")
    found = precision(trial, "caption", learn(trial, steps, trial.seed))
    note = f"{steps} steps of 16 pictures; {KEPT} patches; at random {precision(trial, 'chance'):.3f}"
    return Outcome("precision of the kept patches on the named thing", blind, found, found >= 2 * blind, note)

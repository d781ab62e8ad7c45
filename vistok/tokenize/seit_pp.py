"""SeiT++: train from stored tokens in place of pixels, with masked tokens to predict and augmentations made for them.

What: pictures are kept as ids of a frozen tokenizer (``vistok.parts.token_store``). Masked token modelling: most 2 x 2
patches of ids are replaced by a mask vector, a fixed share of these is not even encoded, and a light decoder predicts
the ids from the class token and what is left (``MaskedTokens``). ColorAdapt (``vistok.core.token_maps``) gives a
picture's codes another one's channel statistics; TokenAdapt (``vistok.parts.token_store``) turns codes into a map that
can be flipped, turned and cropped like a picture, and back into ids. Source: Lee et al., arXiv 2312.10105;
naver-ai/seit.

Departures: the released ColorAdapt changes its input in place and divides by the deviation of flat channels (NaN);
here the input stays, and a flat channel only moves (``parity="authors"`` divides). Augmentations are one affine map
drawn for a picture, the same for pixels and codes, so that the two modules of TokenAdapt can be trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.token_maps import patched
from vistok.parts.token_store import TokenStore, jpeg_bytes, token_blocks
from vistok.tokenize.vq_grid import VQGrid
from vistok.world import photos

CARD = Card(
    title="SeiT++: Masked Token Modeling Improves Storage-efficient Training",
    kind="trained",
    site="stored token ids as the input of a network",
    paper="Lee et al., 2023, arXiv 2312.10105",
    repository="naver-ai/seit",
    mechanism=("transformation",),
    claim="A classifier of stored tokens is better after masked token modelling, at as many steps.",
    departures=("the released ColorAdapt changes its input in place and gives NaN for channels that are flat",),
)


class MaskedTokens(nn.Module):
    """The network: encoder of ids, and the decoder that masked token modelling trains it with."""

    def __init__(self, hyper: SeiTPP) -> None:
        super().__init__()
        self.hyper, h = hyper, hyper
        if h.crop % 2:
            raise ValueError(f"crop: got {h.crop}, must be even")
        half, self.patches = h.crop // 2, (h.crop // 2) ** 2
        self.embed, self.norm = nn.Embedding(h.codes, h.dim), nn.LayerNorm(h.dim)
        self.drop = nn.Dropout(h.dropout)
        self.patch_embed = nn.Linear(4 * h.dim, h.width)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, h.width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(h.width))
        self.positions: Tensor
        self.register_buffer("positions", build_sincos2d_pos_embed([half, half], dim=h.width), persistent=False)
        self.encoder = token_blocks(h.width, h.depth, h.heads)
        self.into = nn.Linear(h.width, h.decoder_width)
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(1 + self.patches, h.decoder_width))
        self.decoder = token_blocks(h.decoder_width, h.decoder_depth, h.decoder_heads)
        self.split, self.split_norm = nn.Linear(h.decoder_width, 4 * h.dim), nn.LayerNorm(h.dim)
        self.bias = nn.Parameter(torch.zeros(h.codes))
        nn.init.trunc_normal_(self.embed.weight, std=0.02)  # also what ids are told apart by: not sure of any yet

    def tokens(self, ids: Tensor) -> Tensor:
        """(B, N, width): patches of ids (B, crop, crop), with positions."""
        x = patched(self.drop(self.norm(self.embed(ids)))).flatten(2)
        return self.patch_embed(x) + self.positions

    def features(self, ids: Tensor) -> Tensor:
        """(B, width): the class token of ids (B, crop, crop), nothing masked: what a classifier is trained on."""
        x = torch.cat([self.class_token.expand(len(ids), -1, -1), self.tokens(ids)], 1)
        return self.encoder(x)[:, 0]

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(count, N) bool each: which patches are masked, and which of these are dropped. One ratio for all."""
        h = self.hyper
        low, high = (0.5 * (1 + math.erf((e - h.mean) / h.std / 2**0.5)) for e in (h.least, h.most))
        u = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
        ratio = h.mean + h.std * 2**0.5 * float(torch.erfinv(torch.tensor(2 * u - 1, dtype=torch.float64)))
        ratio = min(max(ratio, h.least), h.most)
        rank = torch.rand(count, self.patches, generator=generator).argsort(1).argsort(1)
        return rank < math.ceil(ratio * self.patches), rank < math.ceil(h.least * self.patches)

    def logits(self, ids: Tensor, masked: Tensor, dropped: Tensor) -> Tensor:
        """(B, N, 4, K): of every patch's ids; ``dropped`` has equally many True in each row."""
        x = self.tokens(ids)
        x = torch.where(masked[..., None], self.mask_token + self.positions, x)
        kept = (~dropped).nonzero()[:, 1].view(len(ids), -1)
        few = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        seen = self.into(self.encoder(torch.cat([self.class_token.expand(len(ids), -1, -1), few], 1)))
        whole = seen[:, :1].expand(-1, self.patches, -1)
        place = kept[..., None].expand(-1, -1, seen.shape[2])
        back = whole.scatter(1, place, seen[:, 1:])
        back = torch.where(masked[..., None], whole, back)
        x = self.decoder(torch.cat([seen[:, :1], back], 1) + self.decoder_positions)[:, 1:]
        x = self.split_norm(gelu(self.split(x).unflatten(2, (4, -1))))
        return x @ self.embed.weight.detach().t() + self.bias

    def forward(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy of masked patches' ids (B, crop, crop): mean over the four of a patch, then over patches."""
        masked, dropped = (m.to(ids.device) for m in self.draw(len(ids), generator))
        logits = self.logits(ids, masked, dropped)
        each = cross_entropy(
            logits.flatten(0, 2), patched(ids).flatten(), reduction="none", label_smoothing=self.hyper.smoothing
        )
        return each.view(*masked.shape, 4).mean(2)[masked].mean()


@dataclass(frozen=True)
class SeiTPP:
    """The network by its size, and how it is masked."""

    codes: int = 391
    """Codes of the codebook."""
    crop: int = 28
    """Side of a crop of ids; stored maps are 32 x 32."""
    dim: int = 32
    """Channels of the embedding of an id."""
    width: int = 768
    """Of the encoder."""
    depth: int = 12
    """Blocks of the encoder."""
    heads: int = 12
    """Of its attention."""
    decoder_width: int = 512
    """Of the decoder."""
    decoder_depth: int = 4
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Of its attention."""
    mean: float = 0.45
    """Of the normal distribution that the masked share is drawn from."""
    std: float = 0.25
    """Its deviation."""
    least: float = 0.4
    """Smallest masked share; so many patches are dropped."""
    most: float = 1.0
    """Largest masked share."""
    dropout: float = 0.1
    """Of embeddings."""
    smoothing: float = 0.0
    """Of labels."""

    def network(self) -> MaskedTokens:
        """An untrained network: ``forward`` is the loss of masked token modelling, ``features`` what it learns."""
        return MaskedTokens(self)


class _Classifier(nn.Module):
    def __init__(self, hyper: SeiTPP, classes: int) -> None:
        super().__init__()
        self.body = hyper.network()
        self.head = nn.Linear(hyper.width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body.features(ids))


def claim(trial: TokenizeTrial, steps: int = 150, stored: int = 32) -> Outcome:
    """Accuracy on held-out pictures of a classifier of ids, at 2 x ``steps`` steps on the same stored pictures.

    Without: all steps with labels. With: half of them masked token modelling, half with labels. Stored are ``stored``
    batches as 8 x 8 ids of 512 codes, of a VQ on a grid that was trained first. Holds if it is better by 0.01.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(model: Any, real: Tensor, label: Tensor) -> Tensor:
        seen.extend([(real, label)] if len(seen) < stored else [])
        return model.objective(real)

    torch.manual_seed(trial.seed)
    tokenizer = VQGrid("T", trial.size, trial.size // 8, 512, 8, 20).build()
    trial.fit(tokenizer, max(steps, stored), loss=watch)
    tokenizer.eval()
    hyper = SeiTPP(512, 8, 32, 96, 4, 3, 64, 2, 4)

    def ids_of(images: Tensor) -> Tensor:
        ids = tokenizer.encode(images).ids
        assert ids is not None
        return ids.unflatten(1, (8, 8))

    with torch.no_grad():
        store, labels = TokenStore(torch.cat([ids_of(x) for x, _ in seen]), 512), torch.cat([y for _, y in seen])
        test = [(ids_of(x), y) for x, y in trial.held_out()]

    def masked(model: _Classifier, *_: Tensor) -> Tensor:
        return model.body(store.crop(torch.randint(len(labels), (32,)), 8))

    def labelled(model: _Classifier, *_: Tensor) -> Tensor:
        which = torch.randint(len(labels), (32,))
        return cross_entropy(model(store.crop(which, 8)), labels[which])

    found = []
    for stages in ((labelled, 2 * steps),), ((masked, steps), (labelled, steps)):
        torch.manual_seed(trial.seed)
        model = _Classifier(hyper, 18)
        for loss, count in stages:
            trial.fit(model, count, batch_size=1, peak_lr=1e-3, loss=loss)  # its own pictures are not looked at
        model.eval()
        with torch.no_grad():
            found.append(float(torch.cat([model(x).argmax(1) == y for x, y in test]).double().mean()))
    note = (
        f"{len(labels)} pictures of {trial.size} px take {store.bytes_per_picture():.0f} bytes each as ids{_storage()}"
    )
    return Outcome("accuracy from stored tokens", found[0], found[1], found[1] >= found[0] + 0.01, note)


def _storage() -> str:
    """What photographs take as JPEG, beside the ids that the paper stores. Nothing where there are none."""
    try:
        found = [p.image for p in photos(256) if not p.name.startswith("digit")]
    except (ModuleNotFoundError, FileNotFoundError):
        return ""
    pixels = torch.stack([torch.tensor(one) for one in found]).permute(0, 3, 1, 2).float() / 255
    ids = TokenStore(torch.zeros(1, 32, 32, dtype=torch.int64), 391).bytes_per_picture(coded=False)
    return (
        f"; {len(found)} photographs of 256 px as JPEG {jpeg_bytes(pixels):.0f}, as 32 x 32 ids of 391 codes {ids:.0f}"
    )

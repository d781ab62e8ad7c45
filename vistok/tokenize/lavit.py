"""LaVIT: as many discrete tokens as a picture needs, the others merged into those that are kept.

What: a selector reads each patch feature of a frozen vision transformer beside the mean of all and says keep or drop
(straight-through Gumbel). The merger's blocks run on all places: causal attention in which only kept ones are seen, and
attention to the features of the dropped ones. Both masks multiply the exponentials, so that they carry the gradient to
the selector. The kept places alone, in the order of the picture, are quantised: ragged codes, with -1 behind them. A
decoder of learned queries gives all features back (cosine); the share that is kept is pulled to ``rate`` by the mean of
the batch, so that pictures may differ. Source: Jin et al., arXiv 2309.04669; jy0205/LaVIT.

Training (``set_stage``): 1 without quantisation; 2 the codes, with the selector as it is; None all at once, which the
authors' other answer says. The first codes are vectors of the batches, not k-means'. A small flow model that reads the
decoder's features takes the place of Stable Diffusion. Known from memory only: the weights of the losses.

Released defects (``parity="authors"``): the choice is drawn in inference too, so that a picture's tokens differ from
call to call, where here the likelier wins; and the softmax subtracts the largest score of all keys, masked and future
ones among them, under which those that are allowed may vanish, where here it is that of the allowed ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes
from vistok.core.flow import NOISE_FIRST, logit_normal
from vistok.core.losses import distillation
from vistok.core.masked import gumbel
from vistok.core.quantize import pass_through
from vistok.core.tensors import take
from vistok.parts.flow_decoder import FlowDecoder, FlowTokenizer, flow_loss
from vistok.parts.query_transformer import QueryTransformer
from vistok.parts.vision import FrozenVision
from vistok.parts.visual_vocabulary import learn
from vistok.tokenize._merger import MergerBlock, RaggedQuantizer, Selector
from vistok.tokenize._objects import objects

CARD = Card(
    title="Unified Language-Vision Pretraining in LLM with Dynamic Discrete Visual Tokenization",
    kind="trained",
    site="features of a frozen vision transformer to a variable number of discrete tokens",
    paper="Jin et al., 2023, arXiv 2309.04669",
    repository="jy0205/LaVIT",
    needs=("features of a frozen vision transformer",),
    mechanism=("transformation", "attention"),
    score="probability to be kept, by a network on the feature and the mean of all",
    allocate="as many as are likelier kept than dropped, a third in the mean of a batch",
    select="the likelier of keep and drop; drawn in training",
    merge="attention of the kept places to the dropped features",
    claim="The number of tokens kept follows how much there is to see in a picture.",
    departures=(
        "the released selector draws its choice in inference too",
        "the released masked softmax subtracts the maximum over forbidden keys as well",
    ),
)


class LaVITNetwork(FlowTokenizer):
    """The tokenizer; ``quantised`` False: vectors of length 1 take the place of codes in ``objective``."""

    flow = NOISE_FIRST
    flexible = True
    bottleneck: RaggedQuantizer

    def __init__(self, recipe: LaVIT, vision: FrozenVision) -> None:
        super().__init__(recipe.image, recipe.patch, recipe.seed)
        dim, (rows, columns) = vision.dim, vision.grid
        if dim % 4 or dim % recipe.heads:
            raise ValueError(f"vision: has {dim} channels, must be a multiple of 4 and of heads, {recipe.heads}")
        self.recipe, self.vision, self.released, self.quantised = recipe, vision, recipe.parity == "authors", True
        self.selector = Selector(dim)
        blocks = (MergerBlock(dim, recipe.heads, self.released, recipe.mlp_ratio) for _ in range(recipe.depth))
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(dim)
        self.down = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, recipe.dim))
        how: dict[str, Any] = dict(norm="input", commitment=recipe.commitment, restart_after=recipe.restart_after)
        self.bottleneck = RaggedQuantizer(recipe.codes, recipe.dim, **how)
        self.up = nn.Linear(recipe.dim, dim)
        self.places = nn.Parameter(0.02 * torch.randn(rows * columns, dim))
        self.decoder = QueryTransformer(dim, recipe.depth, recipe.heads, dim, rows * columns)
        self.restore = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))
        self.adapter = nn.Linear(dim, recipe.drawn[0])
        self.painter = FlowDecoder(3, recipe.patch, *recipe.drawn, zero_init=False)

    @property
    def tokens(self) -> int:
        return len(self.places)

    def set_stage(self, stage: Literal[1, 2] | None) -> None:
        """1: without quantisation; 2: quantised, the selector does not learn; None: all learns at once."""
        if stage not in (1, 2, None):
            raise ValueError(f"stage: got {stage}, must be 1, 2 or None")
        self.quantised = stage != 1
        self.selector.requires_grad_(stage != 2)

    def choose(self, log: Tensor) -> Tensor:
        """(B, N), 0 or 1: what is kept by log-probabilities (B, N, 2), of each picture one place at least.

        Drawn from torch's random state while the selector learns, and always as released; else the likelier.
        """
        if self.released or (self.training and any(p.requires_grad for p in self.selector.parameters())):
            log = log + gumbel(torch.rand(log.shape, device=log.device))
        surest = torch.zeros_like(log[..., 0]).scatter(1, log[..., 0].argmax(1, keepdim=True), 1)
        hard = (log.argmax(-1) == 0).to(log.dtype)
        return pass_through(log.softmax(-1)[..., 0], torch.where(hard.any(1, keepdim=True), hard, surest))

    def merge(self, features: Tensor, keep: Tensor) -> Tensor:
        """(B, N, D): the merged features at all places, of which those of ``keep`` (B, N) count."""
        x = features
        for block in self.blocks:
            x = block(x, features, keep)
        return self.norm(x)

    def continuous(self, images: Tensor) -> list[Tensor]:
        """The kept merged features (n_i, D) of each picture: what a language model reads where it writes text."""
        features = self.vision(images).to(self.dtype)
        keep = self.choose(self.selector(features))
        return [x[k > 0] for x, k in zip(self.merge(features, keep), keep, strict=True)]

    def packed(self, features: Tensor, keep: Tensor) -> Tensor:
        """(B, N, dim): the kept places' vectors to be quantised, in order and in front; zeros behind them."""
        z, kept = self.down(self.merge(features, keep)), keep.detach() > 0
        order = kept.int().sort(dim=1, descending=True, stable=True).indices
        return take(z, order).masked_fill(~kept.gather(1, order)[..., None], 0)

    def latents(self, images: Tensor) -> Tensor:
        features = self.vision(images).to(self.dtype)
        return self.packed(features, self.choose(self.selector(features)))

    def features(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D): the features that codes ``z`` (B, M, dim) give back; ``mask`` (B, M) bool: False is no code."""
        there = z.new_ones(z.shape[:2], dtype=torch.bool) if mask is None else mask
        return self.restore(self.decoder(self.up(z) + self.places[: z.shape[1]], mask=there))

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        told = self.adapter(self.features(z, mask))
        return self.draw(lambda x, t, _: self.painter(x, t, told), len(z), self.recipe.steps)

    def decode(self, codes: Codes) -> Tensor:
        """As every tokenizer's; where ``codes`` bring no mask, ids of -1 tell where no token is."""
        return super().decode(self.codes(codes.ids) if codes.mask is None and codes.ids is not None else codes)

    def lesson(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of frozen ``features`` (B, N, D), a scalar, and the features that came back, (B, N, D)."""
        keep = self.choose(self.selector(features))
        z = self.packed(features, keep)
        there, loss = z.detach().ne(0).any(-1), (self.recipe.rate - keep.mean()).square() * self.recipe.rate_weight
        if self.quantised:
            codes = self.bottleneck(z)
            assert codes.z is not None
            z, loss = codes.z.to(z.dtype), loss + codes.loss
        else:
            z = self.bottleneck.unit(z)
        made = self.features(z, there)
        return loss + distillation(made, features), made

    def objective(self, images: Tensor) -> Tensor:
        loss, made = self.lesson(self.vision(images).to(self.dtype))
        data, told = self.data(images), self.adapter(made.detach())
        t = logit_normal(len(data)).to(data.device)
        return loss + flow_loss(self.flow, lambda x, t: self.painter(x, t, told), data, t, torch.randn_like(data))


@dataclass(frozen=True)
class LaVIT:
    """A tokenizer by its sizes, and what its pictures are to a language model."""

    image: int = 224
    """Side of a picture in pixels."""
    vision: str = "eva_giant_patch14_224"
    """The frozen vision transformer, by its name in timm."""
    vision_arguments: dict[str, Any] | None = None
    """What timm is told besides, e.g. {"img_size": 32}."""
    depth: int = 12
    """Blocks of the merger and of the decoder each."""
    heads: int = 16
    """Heads of a block."""
    mlp_ratio: float = 4.3637
    """Width of the merger's MLPs over that of the features."""
    codes: int = 16384
    """Codes of the codebook."""
    dim: int = 32
    """Channels of a code."""
    commitment: float = 1.0
    """Weight of the commitment's loss."""
    rate: float = 1 / 3
    """Share of the places that are kept, in the mean of a batch."""
    rate_weight: float = 2.0
    """Weight of the squared difference from it."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""
    patch: int = 16
    """Side of a patch of the small flow model, in pixels."""
    drawn: tuple[int, int, int] = (384, 6, 6)
    """Width, blocks and heads of the small flow model."""
    steps: int = 20
    """Steps of its sampling."""
    seed: int = 0
    """Of its noise."""
    text: int = 32000
    """Ids of the language model: begin and end of a picture follow, then the codes."""
    parity: Literal["paper", "authors"] = "paper"
    """ "authors": the choice is drawn in inference too, and the softmax's maximum is of forbidden keys as well."""

    def build(self, vision: FrozenVision | None = None) -> LaVITNetwork:
        """An untrained tokenizer; ``vision`` in place of the named one."""
        return LaVITNetwork(self, vision or FrozenVision.of(self.vision, **self.vision_arguments or {}))

    def words(self, ids: Tensor) -> list[Tensor]:
        """The ids of each picture in a language model: begin, one for each of its codes ``ids`` (B, N), end."""
        edges = ids.new_tensor([self.text, self.text + 1])
        return [torch.cat([edges[:1], row[row >= 0] + self.text + 2, edges[1:]]) for row in ids]


def claim(trial: TokenizeTrial, steps: int = 150) -> Outcome:
    """Correlation of tokens kept with the share of a held-out picture that is shown, before and after training.

    The rest of the picture, from a drawn row on, has one colour. The encoder is the zoo's vision transformer; training
    is its first stage. Holds if the correlation is at least 0.5, and higher than that of the untrained selector.
    """
    vision = trial.vision()
    known, _ = partly("train", 3 * trial.pictures, trial.size, vision)
    held, share = partly("test", trial.pictures, trial.size, vision)
    torch.manual_seed(trial.seed)
    sizes: dict[str, Any] = dict(depth=2, heads=3, codes=256, dim=16, patch=trial.size // 4, drawn=(48, 1, 3))
    model = LaVIT(trial.size, **sizes).build(vision)
    model.set_stage(1)
    model.eval()
    found = [_correlation(_kept(model, held), share)]
    model.train()
    learn(model, lambda: model.lesson(known[torch.randint(len(known), (16,))])[0], steps, 2e-3)
    drawn = _kept(model, held)
    model.eval()
    kept = _kept(model, held)
    found.append(_correlation(kept, share))
    told = f"kept of {held.shape[1]}: {float(kept.min()):.0f} to {float(kept.max()):.0f}, mean {float(kept.mean()):.1f}"
    told += f"; where the choice is drawn {_correlation(drawn, share):.3f}, mean {float(drawn.mean()):.1f}"
    return Outcome("correlation with what is shown", found[0], found[1], found[1] >= max(0.5, found[0]), told)


@torch.no_grad()
def partly(split: str, n: int, size: int, vision: FrozenVision) -> tuple[Tensor, Tensor]:
    """Features (n, N, D) of ``n`` objects of the world of which a share (n,) is shown, the rest in its mean colour."""
    shares = torch.rand(n, generator=torch.Generator().manual_seed(n))
    images, _ = objects(split, n, size)
    shown = torch.arange(size) < (size * shares).round()[:, None]
    images = images.where(shown[:, None, :, None], images.mean((2, 3), keepdim=True))
    return torch.cat([vision(x) for x in images.split(64)]), shares


@torch.no_grad()
def _kept(model: LaVITNetwork, features: Tensor) -> Tensor:
    """(n,): how many tokens each picture has."""
    return model.choose(model.selector(features)).sum(1)


def _correlation(count: Tensor, share: Tensor) -> float:
    """Pearson's; 0 where all counts are the same."""
    return 0.0 if bool((count == count[0]).all()) else float(torch.corrcoef(torch.stack([count, share]))[0, 1])

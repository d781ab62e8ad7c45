"""AToken: one tokenizer for pictures, clips and solids, whose tokens have places in four dimensions.

What: everything is a set of tokens with a time, a row, a column and a depth; a picture is one frame filled up to a
token's four, a solid a set of voxels with what its views show of them. Two transformers with rotary positions on all
four axes encode and decode the set; latents are Gaussian, or quantised by rounding in eight groups; attention pooling
gives one feature for understanding. Trained without an adversary. Source: Lu et al., arXiv 2509.14476; apple/ml-atoken.

Samples of different lengths are padded and attention is masked, which is the same as one by one. The exponent of the
frequencies divides by the width of a head, not by an axis's share of it, as in the released code. Long clips are
encoded in chunks, each with a time of its own; the decoder's cache over chunks, which is off in the released code, is
not here. Departures: solids are given back as voxels, not as Gaussian splats; the encoder starts from random weights;
perceptual, Gram and semantic losses need the frozen networks that ``build`` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from timm.layers import AttentionPoolLatent, RmsNorm
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn.functional import grid_sample, normalize, pad

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes
from vistok.core.losses import Features, distillation, gram, perceptual, pixel
from vistok.parts.quantize import FSQ, Bottleneck, Gaussian
from vistok.parts.tokenizer import Tokenizer
from vistok.tokenize._sparse import (
    PICTURE,
    Shape,
    Sparse,
    Voxels,
    moved,
    patches,
    places,
    restored,
    rotary,
    sparse,
    unpatched,
    voxels,
)
from vistok.world.sampling import derive_seed
from vistok.world.solids import make_solid

CARD = Card(
    title="AToken: A Unified Tokenizer for Vision",
    kind="trained",
    site="pixels of pictures, clips and views of solids to one set of latents, and back",
    paper="Lu et al., 2025, arXiv 2509.14476",
    repository="apple/ml-atoken",
    mechanism=("transformation",),
    merge="a token for each patch of space and time",
    claim="One model of pictures, clips and solids gives them back no worse than one each, trained as long in sum.",
)


def agreement(pictures: Tensor, texts: Tensor, scale: float = 4.8438, bias: float = -15.5625) -> Tensor:
    """(B, T) in [0, 1]: how well features (B, D) and (T, D) fit each other, each pair by itself (SigLIP).

    ``scale`` is a logarithm; both are those of the released weights.
    """
    cosines = normalize(pictures.float(), dim=-1) @ normalize(texts.float(), dim=-1).t()
    return (torch.tensor(scale).exp() * cosines + bias).sigmoid()


class ATokenNetwork(Tokenizer):
    """The tokenizer of pictures of one size, and of all else by ``encode_all`` and ``decode_all``."""

    def __init__(
        self, recipe: AToken, teacher: Callable[[Tensor], Tensor] | None = None, network: Features | None = None
    ) -> None:
        super().__init__()
        image, patch, width, mlp = recipe.image, recipe.patch, recipe.width, recipe.mlp
        if image % patch[1] or image % patch[2] or recipe.chunk % patch[0]:
            raise ValueError(f"patch: got {patch}, must divide image, {image}, and chunk, {recipe.chunk} frames")
        if recipe.levels and recipe.channels % 6:
            raise ValueError(f"channels: got {recipe.channels}, must be a multiple of 6 to be rounded in groups")
        self.recipe, self.image, self.patch, self.chunk = recipe, image, patch, recipe.chunk
        self.grid = (image // patch[1], image // patch[2])
        self.bottleneck: Bottleneck = (
            FSQ([recipe.levels] * 6, recipe.channels // 6) if recipe.levels else Gaussian(recipe.channels, recipe.kl)
        )
        self.head = width // recipe.heads
        rotary(torch.zeros(4), self.head)  # refuses a head that cannot be split
        self.frozen = (teacher, network)  # no parts of the network: they are neither trained nor saved
        size = patch[0] * patch[1] * patch[2] * 3

        def blocks(norm: Callable[..., nn.Module], qk_norm: bool) -> nn.ModuleList:
            ratio = (mlp + 0.5) / width  # the block rounds down
            how = dict(mlp_ratio=ratio, num_prefix_tokens=0, attn_type="rope", qk_norm=qk_norm, norm_layer=norm)
            return nn.ModuleList(EvaBlock(width, recipe.heads, **how) for _ in range(recipe.depth))  # type: ignore[arg-type]

        self.embed = nn.Linear(size, width)
        self.table = nn.Parameter(width**-0.5 * torch.randn(1, width, recipe.table, recipe.table))
        self.encoder, self.norm = blocks(partial(nn.LayerNorm, eps=1e-6), False), nn.LayerNorm(width, eps=1e-6)
        self.down, self.up = nn.Linear(width, self.bottleneck.dim), nn.Linear(recipe.channels, width, bias=False)
        pool = partial(AttentionPoolLatent, width, num_heads=recipe.heads, mlp_ratio=mlp / width)
        self.pool = pool() if recipe.semantic else None
        self.decoder, self.norm_out = blocks(RmsNorm, True), RmsNorm(width)
        self.out = nn.Linear(width, size, bias=False)
        for part in self.decoder.modules():
            if isinstance(part, nn.Linear):
                part.register_parameter("bias", None)

    @property
    def tokens(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def seen(self, x: Sparse) -> Tensor:
        """(S, N, width): what the encoder makes of a set."""
        extent = torch.tensor([(s.columns, s.rows) for s in x.shapes], device=x.where.device)
        at = (x.where[..., [2, 1]] + 0.5) / extent[: len(x.where), None] * 2 - 1
        table = self.table.float().expand(len(at), -1, -1, -1)
        learned = grid_sample(table, at[:, None], padding_mode="border", align_corners=False)[:, :, 0].transpose(1, 2)
        tokens = self.embed(x.features.to(self.dtype)) + learned.to(self.dtype)
        return self.norm(self._run(self.encoder, tokens, x.where, x.mask))

    def pooled(self, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        """(S, width): one feature of a sample, read from what the encoder made of it. ValueError without the head."""
        if self.pool is None:
            raise ValueError("semantic: got False, must be True for a feature of the whole")
        return cast(Tensor, self.pool(seen, attn_mask=None if mask is None else mask[:, None, None]))

    def drawn(self, z: Tensor, where: Tensor, mask: Tensor | None = None) -> Tensor:
        """(S, N, C) in about [-1, 1]: the pixels of latents ``z`` (S, N, channels) at ``where``."""
        x = self._run(self.decoder, self.up(z.to(self.dtype)), where, mask)
        return self.out(self.norm_out(x))

    def encode_all(self, things: Sequence[Tensor | Voxels]) -> tuple[Codes, Sparse]:
        """Codes of pictures (3, H, W), clips (T, 3, H, W) and voxels of any sizes, and what ``decode_all`` needs."""
        x = sparse(things, self.patch, self.chunk)
        return self.bottleneck(self.down(self.seen(x)), x.mask), x

    def decode_all(self, codes: Codes, like: Sparse) -> list[Tensor | Voxels]:
        """What ``encode_all`` was given, in that order, from its codes."""
        z = self.bottleneck.ids_to_z(cast(Tensor, codes.ids)) if codes.z is None else codes.z
        return restored(self.drawn(z, like.where, like.mask), like, self.patch)

    def stills(self, images: Tensor) -> Sparse:
        """Pictures (B, 3, H, W) of the tokenizer's size as a set."""
        assert self.grid is not None
        x = patches(2 * images - 1, (1, *self.patch[1:])).unflatten(0, (len(images), -1))
        filled = pad(x, (0, (self.patch[0] - 1) * x.shape[2]))
        where = places(1, *self.grid)[None].to(images.device)
        return Sparse(filled, where, tuple(Shape(i, PICTURE, *self.grid) for i in range(len(images))))

    def latents(self, images: Tensor) -> Tensor:
        return self.down(self.seen(self.stills(images)))

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        assert self.grid is not None
        x = self.drawn(z, places(1, *self.grid)[None].to(z.device))
        return self._pictures(x)

    def objective(self, images: Tensor) -> Tensor:
        return self.learn(self.stills(images), images)

    def learn(self, x: Sparse, images: Tensor | None = None) -> Tensor:
        """What training minimises for any set; ``images``: the pictures that it is, for the frozen networks' terms."""
        seen = self.seen(x)
        codes = self.bottleneck(self.down(seen), x.mask)
        made = self.drawn(codes.z, x.where, x.mask)
        valid = x.valid(self.patch)
        loss = pixel(made / 2, x.features / 2, "l1", valid) + pixel(made / 2, x.features / 2, "l2", valid) + codes.loss
        teacher, network = self.frozen
        if images is None:
            return loss
        if teacher is not None and self.pool is not None:
            loss = loss + distillation(self.pooled(seen), teacher(images))
        if network is not None:
            drawn = self._pictures(made)
            loss = loss + perceptual(drawn, images, network) + gram(drawn, images, network)
        return loss

    def _run(self, blocks: nn.ModuleList, x: Tensor, where: Tensor, mask: Tensor | None) -> Tensor:
        rope, keys = rotary(where, self.head)[:, None], None if mask is None else mask[:, None, None]
        for block in blocks:
            x = block(x, rope=rope, attn_mask=keys)
        return x

    def _pictures(self, x: Tensor) -> Tensor:
        """(B, 3, H, W): the first frames of tokens (B, N, C) in [-1, 1]."""
        assert self.grid is not None
        first = x[..., : x.shape[2] // self.patch[0]].flatten(0, 1)
        return unpatched(first, *self.grid, (1, *self.patch[1:])) / 2 + 0.5


@dataclass(frozen=True)
class AToken:
    """A tokenizer by its sizes."""

    image: int = 256
    """Side of a picture in pixels, where all are of one size."""
    patch: tuple[int, int, int] = (4, 16, 16)
    """Frames, rows and columns of a token."""
    width: int = 1152
    """Channels of the transformers."""
    depth: int = 27
    """Blocks of encoder and decoder each."""
    heads: int = 16
    """Heads of a block."""
    mlp: int = 4304
    """Hidden channels of a block's MLP."""
    table: int = 16
    """Side of the table of learned positions, which is stretched over a picture."""
    channels: int = 48
    """Channels of a latent."""
    levels: int = 0
    """Levels to which channels are rounded, six of them an id (4 in the paper); 0: latents are Gaussian."""
    kl: float = 1e-6
    """Weight of Gaussian latents' divergence from a normal distribution."""
    chunk: int = 16
    """Frames of a chunk of a long clip."""
    semantic: bool = True
    """Whether there is a head that gives one feature of the whole."""

    def build(
        self, teacher: Callable[[Tensor], Tensor] | None = None, network: Features | None = None
    ) -> ATokenNetwork:
        """An untrained tokenizer. ``teacher``: pictures (B, 3, H, W) to features (B, width), for the head of the
        whole; ``network``: to the maps of perceptual and Gram losses; both frozen. Raises ValueError for sizes that
        cannot be."""
        return ATokenNetwork(self, teacher, network)


def claim(trial: TokenizeTrial, steps: int = 100) -> Outcome:
    """PSNR on held-out pictures, clips and solids, the mean of the three, of a model for each and of one for all.

    Each of three models is trained for ``steps`` steps on its kind, the one for three times as many on all in turn.
    Clips are pictures that move across the frame. Holds if the one is no worse.
    """
    side = trial.size // 4
    solids = {
        split: [voxels(make_solid(derive_seed(0, i, split)), side, 4) for i in range(max(2, trial.pictures // n))]
        for split, n in (("train", 2), ("test", 4))
    }
    pictures = torch.cat([x for x, _ in trial.held_out()])
    held = {
        "pictures": list(pictures),
        "clips": moved(pictures[: len(pictures) // 2], torch.Generator().manual_seed(1)),
        "solids": solids["test"],
    }

    def trained(kinds: tuple[str, ...]) -> ATokenNetwork:
        torch.manual_seed(trial.seed)
        recipe = AToken(trial.size, (4, 4, 4), 96, 2, 3, 384, side, 8, semantic=False)
        model, dice, turn = recipe.build(), torch.Generator().manual_seed(trial.seed), 0

        def loss(model: ATokenNetwork, real: Tensor, label: Tensor) -> Tensor:
            nonlocal turn
            kind, turn = kinds[turn % len(kinds)], turn + 1
            if kind == "pictures":
                return model.learn(model.stills(real))
            drawn = torch.randint(len(solids["train"]), (len(real),), generator=dice).tolist()
            things = moved(real, dice) if kind == "clips" else [solids["train"][i] for i in drawn]
            return model.learn(sparse(things, model.patch))

        trial.fit(model, steps * len(kinds), batch_size=8, loss=loss)
        return model.eval()

    alone = {kind: fidelity(trained((kind,)), things) for kind, things in held.items()}
    joint = trained(tuple(held))
    together = {kind: fidelity(joint, things) for kind, things in held.items()}
    note = "; ".join(f"{kind}: {alone[kind]:.2f} and {together[kind]:.2f} dB" for kind in held)
    found = [sum(each.values()) / len(each) for each in (alone, together)]
    return Outcome("PSNR, mean of three kinds, dB", found[0], found[1], found[1] >= found[0], note)


@torch.no_grad()
def fidelity(model: ATokenNetwork, things: Sequence[Tensor | Voxels]) -> float:
    """Mean PSNR in dB of pictures, clips or voxels, all of one kind, in what is real of them."""
    codes, like = model.encode_all(things)
    assert codes.z is not None
    made, valid = model.drawn(codes.z, like.where, like.mask), like.valid(model.patch)
    wrong = ((made.clamp(-1, 1) - like.features) / 2).square() * valid
    each = wrong.sum((1, 2)) / valid.sum((1, 2))
    return float((-10 * each.clamp_min(1e-10).log10()).mean())

"""GigaTok: a convolutional map to a sequence by a query transformer; the decoder's features follow a frozen teacher's.

What: queries that begin as averages of the map, coarse to fine, read it and are quantised on the sphere, with the
gradient rotated. In the decoder a grid of queries, which all begin as the first token, reads the tokens and becomes the
map that a convolutional decoder draws. Its features after ``align_depth`` blocks are pulled towards a teacher's patches
(cosine), which keeps the codes simple to model while the networks grow. Source: Xiong et al., arXiv 2504.08736;
SilentView/GigaTok.

Besides pixels, the decoder's map learns the encoder's, and for the first ``direct_until`` steps the convolutions learn
to draw from the encoder's map directly. Departures: positions are added to queries and features once, not in every
block; the teacher's patches are averaged to the decoder's grid where theirs differs; the pixel loss is the project's,
perceptual and adversarial losses are the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.losses import distillation, pixel
from vistok.parts.causal import CausalModel
from vistok.parts.conv import ConvDecoder, ConvEncoder
from vistok.parts.quantize import VectorQuantizer
from vistok.parts.query_transformer import QueryTransformer
from vistok.parts.tokenizer import Tokenizer

CARD = Card(
    title="GigaTok: Scaling Visual Tokenizers to 3 Billion Parameters for Autoregressive Image Generation",
    kind="trained",
    site="pixels to discrete tokens without a grid, and back; features inside the decoder",
    paper="Xiong et al., 2025, arXiv 2504.08736",
    repository="SilentView/GigaTok",
    needs=("patch features of a frozen teacher, in training",),
    mechanism=("transformation",),
    merge="queries that begin as averages of the map and read it by attention",
    claim="Aligned to a frozen teacher, codes of equal reconstruction are cheaper for a small autoregressive model.",
)

SIZES = {
    "T": (96, 4, 3),
    "S": (512, 6, 8),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
}
"""Width, blocks and heads of a transformer; T is this project's."""
Size: TypeAlias = Literal["T", "S", "B", "L", "XL", "XXL"]


def multilevel(x: Tensor, levels: int, first: Literal["row", "col"] = "row") -> Tensor:
    """(B, 2^levels, C): averages of a map ``x`` (B, C, H, W) over 1, 1, 2, 4, ... 2^(levels - 1) blocks.

    The number of blocks along the width doubles first with "row", along the height with "col", then in turn. Groups
    follow one another, coarse to fine, each row after row. ValueError where the map has not so many rows and columns.
    """
    found = []
    for level in [0, *range(levels)]:
        more, fewer = 2 ** ((level + 1) // 2), 2 ** (level // 2)
        rows, columns = (fewer, more) if first == "row" else (more, fewer)
        if x.shape[2] % rows or x.shape[3] % columns:
            raise ValueError(f"levels: got {levels}, must split {x.shape[2]} x {x.shape[3]} into equal blocks")
        found.append(avg_pool2d(x, (x.shape[2] // rows, x.shape[3] // columns)).flatten(2))
    return torch.cat(found, 2).transpose(1, 2)


class GigaTokNetwork(Tokenizer):
    """The tokenizer. ``teacher``: pictures (B, 3, H, W) in [0, 1] to patches (B, N, ``align``) of a square."""

    step: Tensor

    def __init__(self, recipe: GigaTok, teacher: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        for name, size in (("encoder", recipe.encoder), ("decoder", recipe.decoder)):
            if size not in SIZES:
                raise ValueError(f"{name}: got {size!r}, must be one of {', '.join(SIZES)}")
        encoder, decoder = SIZES[recipe.encoder], SIZES[recipe.decoder]
        channels, tokens, dim = recipe.channels, recipe.tokens, recipe.dim
        self.encoder = ConvEncoder(channels, recipe.width, recipe.mults, attention=False)
        self.decoder = ConvDecoder(channels, recipe.width, recipe.mults, attention=False, norm="adaptive", shuffle=True)
        side, left = divmod(recipe.image, self.encoder.factor)
        if left:
            raise ValueError(f"image: got {recipe.image}, must be a multiple of {self.encoder.factor}")
        levels = tokens.bit_length() - 1
        if tokens != 2**levels or side % 2 ** (levels // 2):
            raise ValueError(f"tokens: got {tokens}, must be a power of two, {side**2} at most, for blocks of the map")
        if recipe.align and not 1 <= recipe.align_depth <= decoder[1]:
            raise ValueError(f"align_depth: got {recipe.align_depth}, must be between 1 and the {decoder[1]} blocks")
        self.recipe, self.image, self.side, self.levels = recipe, recipe.image, side, levels
        self.bottleneck = VectorQuantizer(
            recipe.codes,
            dim,
            norm="both",
            gradient="rotation",
            entropy=recipe.entropy,
            restart_after=recipe.restart_after,
        )
        self.teacher = (teacher,)  # not a part of the network: it is neither trained nor saved
        (inner, depth, heads), (outer, *_) = encoder, decoder

        def places(n: int, width: int) -> nn.Parameter:
            return nn.Parameter(width**-0.5 * torch.randn(n, width))

        self.embed = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, inner))
        self.begin = nn.Linear(inner, inner)
        self.map_positions, self.token_positions = places(side**2, inner), places(tokens, inner)
        self.reader = QueryTransformer(inner, depth, heads, inner, 0)
        self.down = nn.Sequential(nn.Linear(inner, channels), nn.Linear(channels, dim))
        self.up = nn.Sequential(nn.Linear(dim, channels), nn.LayerNorm(channels), nn.Linear(channels, outer))
        self.read_positions, self.grid_positions = places(tokens, outer), places(side**2, outer)
        self.drawer = QueryTransformer(*decoder, outer, 0)
        self.out = nn.Conv2d(outer, channels, 3, padding=1)
        if recipe.align:
            self.align = nn.Sequential(
                nn.Linear(outer, 4 * outer),
                nn.SiLU(),
                nn.Linear(4 * outer, 4 * outer),
                nn.SiLU(),
                nn.Linear(4 * outer, recipe.align),
            )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def tokens(self) -> int:
        return len(self.token_positions)

    def sequence(self, seen: Tensor) -> Tensor:
        """(B, N, D): the vectors to be quantised, of the convolutions' map (B, channels, h, w)."""
        x = self.embed(seen.flatten(2).transpose(1, 2))
        begin = multilevel(x.transpose(1, 2).unflatten(2, (self.side, self.side)), self.levels)
        return self.down(self.reader(x + self.map_positions, self.begin(begin) + self.token_positions))

    def latents(self, images: Tensor) -> Tensor:
        return self.sequence(self.encoder(2 * images - 1))

    def drawn(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, channels, h, w) of codes (B, N, D), and the features (B, h w, width) that are aligned."""
        tokens = self.up(z.to(self.dtype))
        features = self.drawer.norm_in(tokens + self.read_positions)
        x = tokens[:, :1] + self.grid_positions
        inside = x
        for depth, block in enumerate(self.drawer.blocks, 1):
            x = block(x, features)
            inside = x if depth == self.recipe.align_depth else inside
        x = self.drawer.norm(x).transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.out(x), inside

    def pixels(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) of a map (B, channels, h, w), the encoder's own or that of the codes."""
        return (self.decoder(x) + 1) / 2

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.pixels(self.drawn(z)[0])

    def objective(self, images: Tensor) -> Tensor:
        seen = self.encoder(2 * images - 1)
        codes = self.bottleneck(self.sequence(seen))
        made, inside = self.drawn(codes.z)
        loss = _error(self.pixels(made), images) + codes.loss + (made - seen.detach()).float().square().mean()
        if self.step < self.recipe.direct_until:
            loss = loss + _error(self.pixels(seen), images)
        if self.training:
            self.step.add_(1)
        return loss + self.recipe.align_weight * self.alignment(inside, images)

    def alignment(self, inside: Tensor, images: Tensor) -> Tensor:
        """- mean cosine of the decoder's features (B, h w, width) and the teacher's, in [-1, 1]; 0 without a teacher.

        Raises ValueError for a teacher of other channels.
        """
        (teacher,) = self.teacher
        if teacher is None or "align" not in self._modules:
            return inside.new_zeros(())
        with torch.no_grad():
            wanted = teacher(images)
        found = self.align(inside)
        if wanted.shape[2] != found.shape[2]:
            raise ValueError(f"teacher: got {wanted.shape[2]} channels, must be align, {found.shape[2]}")
        if wanted.shape[1] != self.side**2:
            across = round(wanted.shape[1] ** 0.5)
            square = wanted.transpose(1, 2).unflatten(2, (across, across))
            wanted = adaptive_avg_pool2d(square, self.side).flatten(2).transpose(1, 2)
        return distillation(found, wanted) - 1


def _error(made: Tensor, images: Tensor) -> Tensor:
    return pixel(made, images, "l1") + pixel(made, images)


@dataclass(frozen=True)
class GigaTok:
    """A tokenizer by its sizes."""

    encoder: Size = "B"
    """Of the transformer to the sequence: see ``SIZES``."""
    decoder: Size = "L"
    """Of the transformer back to the map; the larger one of the two."""
    tokens: int = 256
    """How many tokens a picture has, a power of two."""
    image: int = 256
    """Side of a picture in pixels."""
    width: int = 128
    """Channels of the convolutions at full resolution."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Times ``width`` at each level; each level but the last halves the side."""
    channels: int = 256
    """Channels of the map."""
    codes: int = 16384
    """Codes of the codebook."""
    dim: int = 8
    """Channels of a code."""
    entropy: float = 0.0
    """Weight of the entropy regulariser; 0.005 above a billion parameters."""
    align: int = 768
    """Channels of the teacher's features; 0: none is followed."""
    align_depth: int = 3
    """Blocks of the decoder's transformer before the features that are aligned."""
    align_weight: float = 0.5
    """Weight of the alignment."""
    direct_until: int = 15000
    """Training steps in which the convolutions also learn to draw from the encoder's own map."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""

    def build(self, teacher: Callable[[Tensor], Tensor] | None = None) -> GigaTokNetwork:
        """An untrained tokenizer. ``teacher``: pictures (B, 3, H, W) in [0, 1] to patches (B, N, ``align``), of a
        square; frozen. Without one the objective leaves alignment out. Raises ValueError for an unknown size."""
        return GigaTokNetwork(self, teacher)


def claim(trial: TokenizeTrial, steps: int = 120) -> Outcome:
    """Nats that a held-out picture's 32 codes cost a small model, of a tokenizer without and with a teacher.

    The teacher is the zoo's vision transformer; all networks are trained for ``steps`` steps, the convolutions along
    the direct path too: without it neither tokenizer learned more than a mean colour in so few. Holds if the aligned
    codes cost 2% less and the picture is at most 0.2 dB worse.
    """
    recipe = GigaTok("T", "T", 32, trial.size, 20, (1, 1, 2), 32, 256, align=96, restart_after=20)
    vision, found, told = trial.vision(), [], []
    for teacher in (None, vision):
        torch.manual_seed(trial.seed)
        model = recipe.build(teacher)
        trial.fit(model, steps, batch_size=16, peak_lr=1e-3)
        model.eval()
        torch.manual_seed(trial.seed)
        reader = CausalModel(recipe.codes, model.tokens)
        found.append(trial.code_loss(model, reader, steps))
        told.append((trial.psnr(model), trial.usage(model)))
    note = "; ".join(f"{psnr:.2f} dB, {100 * used:.0f}% of the codes in use" for psnr, used in told)
    holds = found[1] <= 0.98 * found[0] and told[1][0] >= told[0][0] - 0.2
    return Outcome("nats a picture", found[0], found[1], holds, note)

"""FlexTok: a picture as ordered tokens, coarse to fine, any beginning of which a flow decoder draws in full.

What: learned registers read the patches through a ViT in which a register sees the patches and the registers before it;
they are quantised by FSQ. In training the tokens from a drawn number on become one learned vector, and some pictures
lose the whole condition (for guidance). The decoder is a transformer over [noisy patches | tokens] that gives a
velocity. Source: Bachmann et al., arXiv 2502.13967; apple/ml-flextok (the model; it has no trainer).

Works on pixels, or on the grid of a frozen tokenizer (``build(vae)``), for which the paper has a KL-VAE. From memory
and not in the released code: the levels, the widths, the share without condition, and the alignment of an early block
of the decoder to a frozen teacher (``build(teacher=...)``). Blocks are plain ViT blocks, begun without muP.

Attention here is over a dense mask and any number of tokens; the released one needs packed lengths and FlexAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.drop import Lengths, draw_lengths, mask_tail
from vistok.core.fidelity import psnr
from vistok.core.flow import FLEXTOK, logit_normal
from vistok.core.visibility import prefix_causal
from vistok.parts.diffusion_transformer import grid_sinusoids
from vistok.parts.flow_decoder import Alignment, FlowDecoder, FlowTokenizer, apg_of, checked_teacher
from vistok.parts.quantize import FSQ
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize.titok import TiTok

CARD = Card(
    title="FlexTok: Resampling Images into 1D Token Sequences of Flexible Length",
    kind="trained",
    site="pixels (or a VAE's latents) to up to N ordered discrete tokens, and back from any beginning by a flow",
    paper="Bachmann et al., 2025, arXiv 2502.13967",
    repository="apple/ml-flextok",
    mechanism=("transformation",),
    merge="learned registers that read the patches by causal attention",
    select="the first k tokens, k a choice at decoding",
    claim="Its error falls with every token shown, and cut to a quarter of them it beats a TiTok cut to as many.",
)

SIZES = {"T": (96, 4, 4), "d12-d12": (768, 12, 12), "d18-d18": (1152, 18, 18), "d18-d28": (1152, 18, 28)}
"""Width of the encoder, its blocks, and the decoder's; T is this project's. The others are 64 wide a block."""


class FlexTokNetwork(FlowTokenizer):
    """The tokenizer; ``recipe`` has its hyper-parameters."""

    flexible = True
    flow = FLEXTOK

    def __init__(self, recipe: FlexTok, vae: Tokenizer | None = None, teacher: FrozenVision | None = None) -> None:
        super().__init__(recipe.image, recipe.patch, recipe.seed, vae)
        self.recipe, self._tokens = recipe, recipe.tokens
        width, depth, deeper = SIZES[recipe.size]
        wide = width if recipe.size == "T" else 64 * deeper
        heads, wide_heads = (3, 3) if recipe.size == "T" else (depth, deeper)
        self.embed = nn.Conv2d(self.channels, width, self.patch, self.patch)
        self.registers = nn.Parameter(width**-0.5 * torch.randn(recipe.tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, len(recipe.levels))
        self.bottleneck: FSQ = FSQ(recipe.levels)
        self.back = nn.Linear(len(recipe.levels), wide)
        self.positions, self.masked, self.null = (
            nn.Parameter(0.02 * torch.randn(shape)) for shape in ((recipe.tokens, wide), (wide,), (wide,))
        )
        self.decoder = FlowDecoder(self.channels, self.patch, wide, deeper, wide_heads, recipe.zero_init)
        self._teacher = checked_teacher(teacher, recipe.teacher_dim)
        self.alignment = Alignment(wide, recipe.teacher_dim) if recipe.teacher_dim else None
        n = self.size[0] * self.size[1]
        self.register_buffer("seen", prefix_causal(n, recipe.tokens), persistent=False)

    seen: Tensor

    @property
    def tokens(self) -> int:
        return self._tokens

    def latents(self, images: Tensor) -> Tensor:
        x = self.embed(self.data(images).to(self.dtype)).flatten(2).transpose(1, 2)
        x = x + grid_sinusoids(self.size, x.shape[2], x.device).to(x.dtype)
        x = torch.cat([x, self.registers.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x, attn_mask=self.seen)
        return self.out(self.norm(x[:, -self.tokens :]))

    def condition(self, z: Tensor, lengths: Tensor) -> Tensor:
        """(B, N, width): what the decoder is told of tokens ``z`` (B, M, D), of which ``lengths`` (B,) count."""
        x = nn.functional.pad(self.back(z.to(self.dtype)), (0, 0, 0, self.tokens - z.shape[1]))
        return mask_tail(x, lengths, self.masked) + self.positions

    def unconditional(self, b: int) -> Tensor:
        """(b, N, width): the same of no tokens at all."""
        return (self.null + self.positions).expand(b, -1, -1)

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        lengths = torch.full((len(z),), z.shape[1], device=z.device) if mask is None else mask.sum(1)
        told, nothing = self.condition(z, lengths), self.unconditional(len(z))

        def velocity(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
            return self.decoder(x, t, told if conditional else nothing)

        return self.draw(velocity, len(z), self.recipe.steps, apg_of(self.recipe.guidance))

    def objective(self, images: Tensor) -> Tensor:
        """The velocity's error under nested dropout, and the teacher's alignment where there is one."""
        codes, data, b = self.encode(images), self.data(images), len(images)
        assert codes.z is not None
        told = self.condition(codes.z, draw_lengths(b, self.tokens, self.recipe.lengths))
        lost = (torch.rand(b) < self.recipe.unconditional).to(told.device)
        told = torch.where(lost[:, None, None], self.unconditional(b), told)
        t, noise = logit_normal(b).to(data.device), torch.randn_like(data)
        found, early = self.decoder.tapped(self.flow.mix(data, noise, t), t, told)
        loss = self.flow.loss(self.flow.velocity(found), self.flow.target(data, noise))
        if self.alignment is not None:
            for teacher in self._teacher:
                loss = loss + self.alignment(early, teacher(images), self.size, teacher.grid)
        return loss + codes.loss


@dataclass(frozen=True)
class FlexTok:
    """A tokenizer by its size."""

    size: Literal["T", "d12-d12", "d18-d18", "d18-d28"] = "d18-d28"
    """Blocks of encoder and decoder, each 64 wide a block: see ``SIZES``."""
    tokens: int = 256
    """How many tokens a picture has at most."""
    image: int = 256
    """Side of a picture in pixels."""
    patch: int = 16
    """Side of a patch in pixels; with a VAE, a multiple of its cells'."""
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    """Levels of each channel of a token: 64,000 codes."""
    lengths: Lengths = "uniform-to-power"
    """How training draws the number of tokens that the decoder sees."""
    unconditional: float = 0.2
    """Share of the pictures of a training step that are drawn from no tokens."""
    steps: int = 20
    """Euler's steps of decoding."""
    guidance: float = 7.5
    """Scale of adaptive projected guidance in decoding; 1: none."""
    teacher_dim: int = 1024
    """Channels of the teacher's features to which the decoder's first block is aligned; 0: no alignment."""
    zero_init: bool = True
    """Whether the decoder begins with a velocity of zero (adaLN-zero)."""
    seed: int = 0
    """Of the noise that decoding begins with."""

    def build(self, vae: Tokenizer | None = None, teacher: FrozenVision | None = None) -> FlexTokNetwork:
        """An untrained tokenizer of pixels, or of the grid of ``vae``; ``teacher`` is used in training, and not saved.

        Raises ValueError for an unknown size, and for parts that do not fit.
        """
        if self.size not in SIZES:
            raise ValueError(f"size: got {self.size!r}, must be one of {', '.join(SIZES)}")
        return FlexTokNetwork(self, vae, teacher)


def mean_psnr(trial: TokenizeTrial, model: Tokenizer, lengths: Sequence[int], noises: int) -> dict[int, float]:
    """PSNR in dB on held-out pictures, by number of tokens, of the mean of the pictures drawn from so many noises."""
    found: dict[int, list[Tensor]] = {k: [] for k in lengths}
    with torch.no_grad():
        for real, _ in trial.held_out():
            codes = model.encode(real)
            for k in lengths:
                made = torch.zeros_like(real)
                for seed in range(noises):
                    if isinstance(model, FlexTokNetwork):
                        model.seed = seed
                    made += model.decode(codes.prefix(k)) / noises
                found[k].append(psnr(made, real))
    return {k: float(torch.cat(values).mean()) for k, values in found.items()}


def claim(trial: TokenizeTrial, steps: int = 200, noises: int = 4) -> Outcome:
    """PSNR on held-out pictures at 4 of 16 tokens, of a TiTok cut to them and of FlexTok, trained alike.

    Networks of one width and depth, none begun at zero, as the training is short. A single drawing is no mean and would
    be judged for it; so what is judged is the mean of ``noises`` drawings, each without guidance in one step. Holds if
    it is better at 4 tokens and does not get worse with more tokens (1, 2, 4, 8, 16).
    """
    lengths = (1, 2, 4, 8, 16)
    titok, flextok = (
        TiTok("T", 16, trial.size, trial.size // 8, 512, 8, 20),
        FlexTok("T", 16, trial.size, trial.size // 8, (8, 8, 8), steps=1, guidance=1.0, teacher_dim=0, zero_init=False),
    )
    found = []
    for recipe, drawn in ((titok, 1), (flextok, noises)):
        torch.manual_seed(trial.seed)
        model = recipe.build()
        trial.fit(model, steps, batch_size=16)
        model.flexible = True  # a TiTok, too, can be cut; it was not trained for it
        found.append(mean_psnr(trial, model, lengths, drawn))
    cut, flex = found
    curve = list(flex.values())
    told = "; ".join(f"{k} tokens: {cut[k]:.2f} and {flex[k]:.2f} dB" for k in lengths)
    return Outcome("PSNR of 4 of 16 tokens, dB", cut[4], flex[4], flex[4] > cut[4] and curve == sorted(curve), told)

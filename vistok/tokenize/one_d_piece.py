"""One-D-Piece: TiTok's tokens, of which any beginning decodes, so that quality is chosen by cutting.

What: in training the decoder is shown the first k quantised tokens only, k drawn uniformly from 1 .. N; the tail is
physically gone, not filled. So the first tokens come to hold what matters most. The quantiser's loss still covers all.
Source: Miwa et al., arXiv 2501.10064; turingmotors/One-D-Piece.

The authors draw one k for a whole batch. ``per="sample"`` draws one for each picture, by hiding keys, which is the same
to the decoder as cutting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes, bits_of
from vistok.core.drop import draw_lengths
from vistok.parts.tokenizer import Tokenizer
from vistok.tokenize.titok import TiTok, TiTokNetwork

CARD = Card(
    title="One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression",
    kind="trained",
    site="pixels to up to N ordered discrete tokens, and back from any beginning of them",
    paper="Miwa et al., 2025, arXiv 2501.10064",
    repository="turingmotors/One-D-Piece",
    mechanism=("transformation",),
    merge="learned latents that read the patches by attention",
    select="the first k tokens, k a choice at decoding",
    claim="Cut to a quarter of its tokens it reconstructs better than a TiTok that is cut to as many.",
    departures=("the released encoder reshapes its latents without a transpose, mixing the slots",),
)


class OneDPieceNetwork(TiTokNetwork):
    """TiTok's network with Tail Token Drop. ``per``: whether a picture or a batch draws its number of tokens."""

    flexible = True

    def __init__(self, *, per: Literal["sample", "batch"] = "batch", **how: Any) -> None:
        super().__init__(**how)
        self.per: Literal["sample", "batch"] = per

    def kept(self, codes: Codes) -> Codes:
        """The beginning of ``codes`` that a training step shows the decoder, drawn from torch's random state."""
        assert codes.z is not None
        lengths = draw_lengths(len(codes.z), self.tokens, per=self.per)
        return codes.prefix(int(lengths[0])) if self.per == "batch" else codes.prefix(lengths.to(codes.z.device))


@dataclass(frozen=True)
class OneDPiece:
    """A tokenizer by its size."""

    size: Literal["T", "S", "B", "L"] = "S"
    """Width, blocks and heads of encoder and decoder: see ``vistok.tokenize._latents.SIZES``."""
    tokens: int = 256
    """How many tokens a picture has at most."""
    image: int = 256
    """Side of a picture in pixels."""
    patch: int = 16
    """Side of a patch in pixels."""
    codes: int = 4096
    """Codes of the codebook."""
    dim: int = 12
    """Channels of a code."""
    restart_after: int | None = 100
    """Training steps after which an unused code is put back into use; None: never."""
    per: Literal["sample", "batch"] = "batch"
    """Whether each picture or the whole batch draws how many tokens training shows."""
    parity: Literal["paper", "authors"] = "paper"
    """ "authors": the released encoder, whose tokens mix all slots."""

    def build(self, proxy: Tokenizer | None = None) -> OneDPieceNetwork:
        """An untrained tokenizer; with ``proxy``, a trained one with a grid, for training in two stages."""
        made = OneDPieceNetwork(per=self.per, proxy=proxy, **self.titok().shape())
        made.recipe = self
        return made

    def titok(self) -> TiTok:
        """The same without Tail Token Drop."""
        return TiTok(
            self.size, self.tokens, self.image, self.patch, self.codes, self.dim, self.restart_after, self.parity
        )

    def bytes_for(self, k: int) -> float:
        """Bytes of the first ``k`` tokens: k whole numbers of bits."""
        return k * bits_of(self.codes) / 8


def claim(trial: TokenizeTrial, steps: int = 300) -> Outcome:
    """PSNR on held-out pictures at 8 of 32 tokens, of a TiTok cut to them and of One-D-Piece, trained alike.

    Holds if One-D-Piece is better there by 1 dB and does not get worse with more tokens (1, 2, 4, .. 32).
    """
    recipe = OneDPiece("T", 32, trial.size, trial.size // 8, 512, 8, 20, "sample")
    found = []
    for build in (recipe.titok().build, recipe.build):
        torch.manual_seed(trial.seed)
        model = build()
        trial.fit(model, steps)
        model.flexible = True  # a TiTok, too, can be cut; it was not trained for it
        found.append({k: trial.psnr(model, k) for k in (1, 2, 4, 8, 16, 32)})
    titok, piece = found
    curve = list(piece.values())
    told = "; ".join(
        f"{k} tokens: {a:.2f} and {b:.2f} dB" for (k, a), b in zip(titok.items(), piece.values(), strict=True)
    )
    holds = piece[8] >= titok[8] + 1 and curve == sorted(curve)
    return Outcome("PSNR of 8 of 32 tokens, dB", titok[8], piece[8], holds, told)

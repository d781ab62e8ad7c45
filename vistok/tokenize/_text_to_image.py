"""A small text-to-image model with the seams of a large one: word embeddings, a text encoder, a flow that it guides."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vistok.core.flow import NOISE_FIRST, logit_normal
from vistok.core.visibility import causal, with_padding
from vistok.parts.flow_decoder import FlowDecoder, flow_loss


class TextToImage(nn.Module):
    """Prompts of at most ``places`` - 2 words between BOS and EOS, the last two of ``words`` ids, to pictures.

    ``text``: width, blocks and heads of the text encoder, which is causal as CLIP's; ``drawn``: those of the flow.
    """

    flow = NOISE_FIRST

    def __init__(
        self, words: int, places: int, text: tuple[int, int, int], patch: int, drawn: tuple[int, int, int]
    ) -> None:
        super().__init__()
        width, depth, heads = text
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.places = places
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(0.02 * torch.randn(places, width))
        nn.init.normal_(self.words.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(width)
        self.adapter = nn.Linear(width, drawn[0])
        self.painter = FlowDecoder(3, patch, *drawn, zero_init=False)

    def assemble(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[BOS] the embedded words that ``mask`` (B, M) bool says are there [EOS], then nothing; and what is there.

        ``words`` (B, M, width), M any number; words that are not there are taken out, so that those behind move up.
        (B, places, width) and (B, places) bool. Raises ValueError for more words than places.
        """
        if (longest := int(mask.sum(1).max()) + 2) > self.places:
            raise ValueError(f"words: got {longest - 2}, must be {self.places - 2} at most")
        last = len(self.words.weight) - 1
        bos, eos = (self.words.weight[i].expand(len(words), 1, -1) for i in (last - 1, last))
        edge = mask.new_ones(len(mask), 1)
        x, there = torch.cat([bos, words.to(bos.dtype), eos], 1), torch.cat([edge, mask, edge], 1)
        order = there.logical_not().long().argsort(dim=1, stable=True)[:, : self.places]
        x, there = x.gather(1, order[..., None].expand(-1, -1, x.shape[2])), there.gather(1, order)
        missing = self.places - x.shape[1]
        x = nn.functional.pad(x * there[..., None], (0, 0, 0, missing))
        return x, nn.functional.pad(there, (0, missing))

    def encode(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The text encoder's output (B, places, width), 0 where nothing is, and what is there, (B, places) bool."""
        x, there = self.assemble(words, mask)
        x = x + self.positions
        seen = with_padding(causal(self.places).to(x.device), there)
        for block in self.blocks:
            x = block(x, attn_mask=seen)
        return self.norm(x) * there[..., None], there

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Of pictures ``x`` (B, 3, H, W) in [-1, 1] at times ``t`` (B,), told the text encoder's output."""
        return self.painter(x, t, self.adapter(condition))

    def loss(self, images: Tensor, condition: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The flow's loss on pictures in [0, 1]; times (B,) and noise from torch's random state where not given."""
        data = 2 * images.to(condition.dtype) - 1
        t = logit_normal(len(data)).to(data) if t is None else t
        noise = torch.randn_like(data) if noise is None else noise
        return flow_loss(self.flow, lambda x, at: self.velocity(x, at, condition), data, t, noise)

    def captioned(self, images: Tensor, ids: Tensor, leave_out: float = 0.1) -> Tensor:
        """What it learns before it is frozen: ``loss`` with captions (B, T), a share left out for guidance."""
        mask = (torch.rand(len(ids), 1) >= leave_out).to(ids.device).expand(ids.shape)
        return self.loss(images, self.encode(self.words(ids), mask)[0])

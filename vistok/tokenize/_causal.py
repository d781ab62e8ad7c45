"""What SEED and its kin are made of: causal queries on frozen features, a decoder of codes, a small flow model."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vistok.core.codes import Codes
from vistok.core.flow import NOISE_FIRST, logit_normal
from vistok.core.losses import info_nce
from vistok.parts.flow_decoder import FlowDecoder, FlowTokenizer, flow_loss
from vistok.parts.quantize import Bottleneck
from vistok.parts.query_transformer import QueryTransformer
from vistok.parts.vision import FrozenVision


class CodeDecoder(nn.Module):
    """Codes (B, N, ``dim``) to embeddings (B, N, ``width``): a small MLP up, places, blocks in which all see all.

    Codes of the full width go without the MLP.
    """

    def __init__(self, dim: int, width: int, tokens: int, depth: int, heads: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-5)
        up = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, width))
        self.up: nn.Module = nn.Identity() if dim == width else up
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(width)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(self.blocks(self.up(z) + self.positions))


class CausalTokenizer(FlowTokenizer):
    """What the kin of SEED share: causal queries on frozen features, a small MLP to the codes' width; and the drawing.

    A member implements ``condition``. ``reader`` is a causal one with learned queries; ``drawn``: width, blocks and
    heads of the small flow model, ``steps`` those of its sampling.
    """

    flow = NOISE_FIRST

    def __init__(
        self,
        vision: FrozenVision,
        reader: QueryTransformer,
        bottleneck: Bottleneck,
        condition: int,
        image: int,
        patch: int,
        drawn: tuple[int, int, int],
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(image, patch, seed)
        self.vision, self.reader, self.bottleneck, self.steps = vision, reader, bottleneck, steps
        self.down = nn.Sequential(
            nn.Linear(reader.width, reader.width), nn.Tanh(), nn.Linear(reader.width, bottleneck.dim)
        )
        self.adapter = nn.Linear(condition, drawn[0])
        self.painter = FlowDecoder(3, patch, *drawn, zero_init=False)

    @property
    def tokens(self) -> int:
        assert self.reader.queries is not None
        return len(self.reader.queries)

    def features(self, images: Tensor) -> Tensor:
        """(B, P, C): what the queries read."""
        return self.vision(images)

    def causal(self, images: Tensor) -> Tensor:
        """(B, N, width): the continuous embeddings, of which each depends on the queries up to its own."""
        return self.reader(self.features(images))

    def latents(self, images: Tensor) -> Tensor:
        return self.down(self.causal(images))

    def condition(self, z: Tensor) -> Tensor:
        """(B, M, C) or (B, C): what a text-to-image model is told, of codes ``z`` (B, N, dim)."""
        raise NotImplementedError

    def told(self, condition: Tensor) -> Tensor:
        """The condition as tokens (B, M, width) of the small flow model."""
        made: Tensor = self.adapter(condition)
        return made if made.dim() == 3 else made[:, None]

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        told = self.told(self.condition(z))
        return self.draw(lambda x, t, _: self.painter(x, t, told), len(z), self.steps)

    def drawing(self, images: Tensor, condition: Tensor) -> Tensor:
        """The small flow model's loss on ``images`` with their ``condition``, at times from torch's random state."""
        data, told = self.data(images), self.told(condition)
        t = logit_normal(len(data)).to(data.device)
        return flow_loss(self.flow, lambda x, t: self.painter(x, t, told), data, t, torch.randn_like(data))

    def quantized(self, images: Tensor) -> tuple[Tensor, Codes, Tensor]:
        """The continuous embeddings, the codes, and the codes' vectors in the model's precision."""
        embedded = self.causal(images.to(self.dtype))
        codes = self.bottleneck(self.down(embedded))
        assert codes.z is not None
        return embedded, codes, codes.z.to(self.dtype)

    def contrast(self, images: Tensor, text: Tensor, temperature: float = 0.07, smoothing: float = 0.0) -> Tensor:
        """First stage: InfoNCE of the last causal embedding, which has seen all others, and ``text`` (B, width)."""
        return info_nce(self.causal(images.to(self.dtype))[:, -1], text, 1 / temperature, smoothing)

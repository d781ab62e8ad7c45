"""ETT: a tokenizer that is tuned together with the language model that reads it, by the loss of captions.

What: a convolutional tokenizer with an IBQ codebook. The language model is not given ids but the codebook's vectors,
through an MLP of two layers, so that the captions' loss reaches the encoder and, as IBQ's gradient passes the softmax,
every code. Three stages (``set_stage``): the projector alone; all of it, by captions plus ``alpha`` times the
tokenizer's own loss; the language model and its read-outs alone, for chat or for drawing, where a head on the hidden
states predicts the ids. The language model's vocabulary stays as it is. Source: Wang et al., arXiv 2505.10562; no code
was released, the quantiser is TencentARC/SEED-Voken's.

Codes move in the second stage: ids that were stored before it are of another tokenizer and must be made again. Unknown:
``alpha`` (0.25 here), the weight of the entropy, the networks' sizes and the head for drawing. Perceptual and
adversarial losses, and an optimizer of their own for them, are the trainer's. ``reads`` = "ids" is the baseline: a new
embedding for each code, which sends the tokenizer no gradient.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vistok.catalogue.card import Card, Outcome, TokenizeTrial
from vistok.core.codes import Codes
from vistok.core.fidelity import psnr
from vistok.core.losses import pixel
from vistok.parts.quantize import IBQuantizer
from vistok.parts.visual_vocabulary import IGNORED, learn, small_llama
from vistok.tokenize._objects import objects
from vistok.tokenize.vilex import described
from vistok.tokenize.vqgan import VQGANNetwork

CARD = Card(
    title="End-to-End Vision Tokenizer Tuning",
    kind="trained",
    site="codebook vectors, through an MLP, among the inputs of a language model; gradients back into the tokenizer",
    paper="Wang et al., 2025, arXiv 2505.10562",
    repository="TencentARC/SEED-Voken",
    mechanism=("transformation",),
    claim="Captions are learned better from codebook vectors that their loss tunes than from the ids of a frozen one.",
)


class ETTNetwork(VQGANNetwork):
    """The tokenizer: VQGAN's networks with IBQ's codebook."""

    def loss_of(self, images: Tensor, codes: Codes) -> Tensor:
        """Its own loss, a scalar, of pictures (B, 3, H, W) in [0, 1] whose ``codes`` are there already."""
        made = self.render_codes(codes)
        return pixel(made, images, "l1") + pixel(made, images) + codes.loss

    def objective(self, images: Tensor) -> Tensor:
        return self.loss_of(images, self.encode(images))


class Joint(NamedTuple):
    """The loss of a step and its two parts before the weight; scalars."""

    loss: Tensor
    caption: Tensor
    tokenizer: Tensor


class Tuned(nn.Module):
    """A tokenizer and a Hugging Face causal model that reads it; sequences are [N visual vectors, text].

    ``alpha``: weight of the tokenizer's own loss. ``reads``: see the recipe. It begins in no stage: all may learn.
    """

    def __init__(
        self, tokenizer: ETTNetwork, llm: Any, alpha: float = 0.25, reads: Literal["vectors", "ids"] = "vectors"
    ) -> None:
        super().__init__()
        if reads not in ("vectors", "ids"):
            raise ValueError(f"reads: got {reads!r}, must be 'vectors' or 'ids'")
        self.tokenizer, self.llm, self.alpha, self.reads = tokenizer, llm, alpha, reads
        (codes,), dim = tokenizer.bottleneck.sizes, tokenizer.bottleneck.dim
        width = llm.get_input_embeddings().embedding_dim
        mlp = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))
        self.projector: nn.Module = mlp if reads == "vectors" else nn.Embedding(codes, width)
        self.head = nn.Linear(width, codes)

    def set_stage(self, stage: int) -> None:
        """What learns: 1 the projector; 2 all but the head for drawing; 3 all but the tokenizer."""
        learns: dict[int, tuple[nn.Module, ...]] = {
            1: (self.projector,),
            2: (self.projector, self.llm, self.tokenizer),
            3: (self.projector, self.llm, self.head),
        }
        if stage not in learns:
            raise ValueError(f"stage: got {stage}, must be 1, 2 or 3")
        self.requires_grad_(False)
        for part in learns[stage]:
            part.requires_grad_(True)
        self.train(self.training)

    @property
    def tunes(self) -> bool:
        """Whether the tokenizer learns."""
        return any(p.requires_grad for p in self.tokenizer.parameters())

    def train(self, mode: bool = True) -> Tuned:
        """A tokenizer that does not learn stays in evaluation mode, in which no dead code is put back into use."""
        super().train(mode)
        self.tokenizer.train(mode and self.tunes)
        return self

    def project(self, codes: Codes) -> Tensor:
        """(B, N, width): what the language model reads of ``codes``."""
        found: Tensor = self.projector(codes.z if self.reads == "vectors" else codes.ids)
        return found

    def embed(self, text: Tensor) -> Tensor:
        """(B, T, width) of ids (B, T)."""
        found: Tensor = self.llm.get_input_embeddings()(text)
        return found

    def forward(self, codes: Codes, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N + T, V): logits of what follows each visual vector and each of ``text`` (B, T); ``mask`` (B, T)."""
        seen = self.project(codes)
        if mask is not None:
            mask = torch.cat([mask.new_ones(seen.shape[:2]), mask], 1)
        found = self.llm(inputs_embeds=torch.cat([seen, self.embed(text)], 1), attention_mask=mask)
        return found.logits  # type: ignore[no-any-return]

    def loss(
        self, images: Tensor, input_ids: Tensor, labels: Tensor, alpha: float | None = None, mask: Tensor | None = None
    ) -> Joint:
        """Of captions ``input_ids`` (B, T), padded at the right where ``mask`` (B, T) is 0, of ``images``.

        ``labels`` (B, T): the ids that are learned, elsewhere -100; not shifted. ``alpha``: None takes its own. The
        tokenizer's part is 0 where the tokenizer does not learn or ``alpha`` is 0.
        """
        alpha = self.alpha if alpha is None else alpha
        codes = self.tokenizer.encode(images)
        logits = self(codes, input_ids, mask)[:, self.tokenizer.tokens - 1 : -1].float()
        caption = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED)
        own = self.tokenizer.loss_of(images, codes) if alpha and self.tunes else torch.zeros_like(caption)
        return Joint(caption + alpha * own, caption, own)

    def drawing_loss(self, images: Tensor, prompt: Tensor) -> Tensor:
        """Cross-entropy of the ids of ``images`` after ``prompt`` (B, T), a scalar: the third stage, for drawing."""
        with torch.no_grad():
            codes = self.tokenizer.encode(images)
        assert codes.ids is not None
        x = torch.cat([self.embed(prompt), self.project(codes)[:, :-1]], 1)
        hidden = self.llm(inputs_embeds=x, output_hidden_states=True).hidden_states[-1][:, prompt.shape[1] - 1 :]
        return cross_entropy(self.head(hidden).float().transpose(1, 2), codes.ids)

    @torch.no_grad()
    def draw(self, prompt: Tensor) -> Tensor:
        """(B, N): the ids of the picture after ``prompt`` (B, T), greedily; each is read as in training."""
        x, cache, made = self.embed(prompt), None, []
        for _ in range(self.tokenizer.tokens):
            found = self.llm(inputs_embeds=x, past_key_values=cache, use_cache=True, output_hidden_states=True)
            cache = found.past_key_values
            made.append(self.head(found.hidden_states[-1][:, -1:]).argmax(-1))
            z = self.tokenizer.bottleneck.ids_to_z(made[-1])
            x = self.project(Codes(made[-1], z.to(x.dtype), self.tokenizer.format))
        return torch.cat(made, 1)


@dataclass(frozen=True)
class ETT:
    """The tokenizer by its sizes, and how it is tuned."""

    image: int = 256
    """Side of a picture in pixels."""
    width: int = 128
    """Channels of the finest level."""
    mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level over those of the finest; each level after the first halves the map."""
    blocks: int = 4
    """Residual blocks of a level; the decoder has one more."""
    codes: int = 131072
    """Codes of the codebook."""
    dim: int = 256
    """Channels of a code and of the map."""
    entropy: float = 0.05
    """Weight of the entropy's regulariser, at a temperature of 0.01."""
    restart_after: int | None = None
    """Training steps after which an unused code becomes a vector of the batch; None: never. The largest product wins,
    so that of such vectors the longest win and the others die again; IBQ's gradient moves unused codes anyway."""
    alpha: float = 0.25
    """Weight of the tokenizer's own loss in the second stage."""
    reads: Literal["vectors", "ids"] = "vectors"
    """What the language model reads: the codebook's vectors, or "ids", of which each has an embedding of its own."""

    def build(self) -> ETTNetwork:
        """An untrained tokenizer."""
        table = IBQuantizer(self.codes, self.dim, entropy=self.entropy, restart_after=self.restart_after)
        made = ETTNetwork(self.image, self.width, self.mults, self.blocks, self.dim, 1, table)
        made.recipe = self
        return made

    def tune(self, tokenizer: ETTNetwork, llm: Any) -> Tuned:
        """``tokenizer`` and ``llm``, a Hugging Face causal model, both in place; with a new projector and head."""
        return Tuned(tokenizer, llm, self.alpha, self.reads)


def claim(trial: TokenizeTrial, first: int = 300, steps: int = 200) -> Outcome:
    """Nats a word of the captions of held-out pictures (``described``: an object, brightness in quarters and colours).

    One tokenizer of 256 codes, 16 a picture, learns pixels for ``first`` steps. Then a small Llama learns captions for
    ``steps`` steps: from ids of the frozen tokenizer, and by the two stages of ETT, of which the first has a quarter of
    the steps. Holds if ETT's captions cost 2% less and the gradient of the captions' loss alone reaches all codes.
    """
    sizes: dict[str, Any] = dict(image=trial.size, width=8, mults=(1, 2, 2, 4), blocks=1, codes=256, dim=16)
    known = objects("train", 4 * trial.pictures, trial.size)
    held = objects("test", trial.pictures, trial.size)
    order = torch.Generator().manual_seed(trial.seed)

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(known[0]), (16,), generator=order)
        return known[0][chosen], described(known[0][chosen], known[1][chosen])

    torch.manual_seed(trial.seed)
    start = ETT(**sizes).build()
    learn(start, lambda: start.objective(batch()[0]), first, 2e-3)
    found, quality, reached = [], [], []
    for reads, stages in (("ids", {3: steps}), ("vectors", {1: steps // 4, 2: steps - steps // 4})):
        torch.manual_seed(trial.seed)
        order.manual_seed(trial.seed)
        model = Tuned(copy.deepcopy(start), small_llama(138), reads=cast(Any, reads))
        for stage, share in stages.items():
            model.train()
            model.set_stage(stage)
            learn(model, lambda: _captioned(model, *batch()).loss, share, 2e-3)  # noqa: B023
        model.eval().requires_grad_(True)
        caption = _captioned(model, held[0], described(*held), 0.0).caption
        (table,) = model.tokenizer.bottleneck.parameters()
        (grad,) = torch.autograd.grad(caption, table, allow_unused=True)
        reached.append(0.0 if grad is None else float(grad.ne(0).any(1).float().mean()))
        found.append(float(caption.detach()))
        with torch.no_grad():
            quality.append(float(psnr(model.tokenizer.decode(model.tokenizer.encode(held[0])), held[0]).mean()))
    told = f"codes with a gradient of captions: {reached[0]:.2f} and {reached[1]:.2f}"
    told += f"; PSNR {quality[0]:.2f} and {quality[1]:.2f} dB"
    holds = found[1] <= 0.98 * found[0] and reached[0] == 0 and reached[1] > 0.99
    return Outcome("nats a word of captions", found[0], found[1], holds, told)


def _captioned(model: Tuned, images: Tensor, text: Tensor, alpha: float | None = None) -> Joint:
    return model.loss(images, text, text, alpha)

"""Training a masked-diffusion language head: packed questions whose answers are regions of one length, partly masked.

The objective is LLaDA's: of each answer a share t of the tokens is masked, t uniform in (0, 1), and what stood there is
to be found, with weight 1/t. Attention is that of a prefix model (LaViDa): pictures see pictures, a question sees its
picture and itself, an answer region sees both and itself, each in both directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vistok.core.visibility import block_visibility
from vistok.world import Picture

from .packing import IGNORE, Batch, to_batch

if TYPE_CHECKING:
    from .training import Prefix

MASK = "<mask>"
ANSWER_LENGTH = 8
"""Tokens of an answer region. The world's longest answers have six, and one that ends them."""
SMALLEST_SHARE = 1e-3
PICTURE, QUESTION, ANSWER = 0, 1, 2
"""The blocks of a sequence, in the order in which they are read."""


def pack_regions(pictures: list[Picture], tokenizer: PreTrainedTokenizerFast, grid: int) -> Batch:
    """Pack each picture with its questions, each a segment, its answer filled up with end tokens to ``ANSWER_LENGTH``.

    ``Batch.target`` is the answer itself at its own places (not shifted), IGNORE elsewhere. Raises ValueError for an
    answer that does not fit.
    """
    rows: list[Tensor] = []
    for picture in pictures:
        questions = [f"<user> {q.text.lower()}<assistant>" for q in picture.questions]
        answers = [f" {q.answer}" for q in picture.questions]
        asked, said = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (questions, answers))
        parts = []
        for number, (question, answer) in enumerate(zip(asked, said, strict=True), start=1):
            if len(answer) >= ANSWER_LENGTH:
                raise ValueError(f"answer: got {len(answer)} tokens, must be fewer than {ANSWER_LENGTH}")
            region = torch.tensor(answer + [tokenizer.eos_token_id] * (ANSWER_LENGTH - len(answer)))
            ids = torch.cat([torch.tensor(question), region])
            target = torch.cat([torch.full((len(question),), IGNORE), region])
            parts.append(torch.stack([ids, torch.full_like(ids, number), torch.arange(len(ids)), target]))
        rows.append(torch.cat(parts, 1))
    return to_batch(pictures, rows, tokenizer.pad_token_id, grid)


def region_mask(prefix: int, batch: Batch) -> Tensor:
    """(B, 1, L, L) bool of a packed batch behind a prefix of that many tokens: True where a query may see a key."""
    segment = batch.segment
    block = torch.where(batch.target != IGNORE, ANSWER, QUESTION).masked_fill(segment < 0, -1)
    start = segment.new_full((len(segment), prefix), PICTURE)
    return block_visibility(torch.cat([start, block], 1), torch.cat([start, segment], 1))[:, None]


def noise(segment: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, S) float32 the share t of its segment that each token has, and (B, S) bool which tokens are masked by it.

    The shares of a row are spread evenly over (0, 1), from a random start: the loss varies less than with free draws.
    """
    most = int(segment.max()) + 1
    start = torch.rand(len(segment), 1, generator=rng)
    shares = ((start + torch.arange(most) / most) % 1).clamp(min=SMALLEST_SHARE)
    share = shares.gather(1, segment.cpu().clamp(min=0))
    masked = torch.rand(segment.shape, generator=rng) < share
    return share.to(segment.device), masked.to(segment.device)


def diffusion_loss(
    model: PreTrainedModel, prefix: Prefix, batch: Batch, share: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(cross-entropy of masked tokens, weighted 1/t, a token of the answers; how many are right), from ``share`` of the
    visual tokens. ``batch`` as ``pack_regions`` makes it; the model's configuration names its ``mask_token_id``."""
    answer = batch.target != IGNORE
    t, masked = noise(batch.segment, rng)
    masked &= answer
    if not bool(masked.any()):  # a batch of a question or two
        masked = answer
    text = model.get_input_embeddings()(batch.text.masked_fill(masked, model.config.mask_token_id))
    embeds, positions = prefix.take(share, rng)
    later = (batch.position + prefix.next_position).expand(*positions.shape[:-1], -1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([embeds.to(text.dtype), text], dim=1),
        attention_mask=region_mask(embeds.shape[1], batch),
        position_ids=torch.cat([positions, later], dim=-1),
        use_cache=False,
    ).last_hidden_state[:, embeds.shape[1] :]
    logits = model.lm_head(hidden[masked]).float()
    target = batch.target[masked]
    losses = nn.functional.cross_entropy(logits, target, reduction="none") / t[masked]
    return losses.sum() / answer.sum(), (logits.argmax(-1) == target).float().mean()

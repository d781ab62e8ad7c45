"""A language model that reads and writes pictures: its vocabulary beside the text's, packing, restriction, losses.

Ids of the text stay as they are. Behind them come the codes of each segment of a picture, in the order in which the
segments are written, then BOI and EOI, so that a picture is [BOI] codes [EOI] and always of one length. All goes
through what Hugging Face models offer: ``resize_token_embeddings``, ``inputs_embeds``, logits processors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

IGNORED = -100
"""The label of a position that is not learned, that of transformers."""


class Piece(NamedTuple):
    """A stretch of a sequence: ids (L,) of the whole vocabulary, and whether the model learns to write them."""

    ids: Tensor
    learned: bool = True


class Packed(NamedTuple):
    """B sequences, padded at the right: what a causal language model is trained on."""

    input_ids: Tensor
    """(B, T) int64, 0 where padded."""
    labels: Tensor
    """(B, T) int64: the ids that are learned, elsewhere -100; not shifted, the model does that."""
    attention_mask: Tensor
    """(B, T) int64: 1 at ids, 0 at padding."""


@dataclass(frozen=True)
class VisualVocabulary:
    """The ids of a language model with ``text`` ids of its own, and of pictures made of ``segments``."""

    text: int
    """How many ids the model had: they are below it."""
    segments: tuple[tuple[int, int], ...]
    """(codes, tokens) of each stretch of a picture: one for most tokenizers, semantic and pixel ones for Bridge."""

    def __post_init__(self) -> None:
        if self.text < 1 or not self.segments or any(min(segment) < 1 for segment in self.segments):
            raise ValueError(f"text, segments: got {self.text} and {self.segments}, must be 1 or more each")

    @property
    def starts(self) -> tuple[int, ...]:
        """The id of each segment's code 0, and of BOI behind them."""
        return tuple(accumulate((codes for codes, _ in self.segments), initial=self.text))

    @property
    def boi(self) -> int:
        """The id that begins a picture."""
        return self.starts[-1]

    @property
    def eoi(self) -> int:
        """The id that ends a picture."""
        return self.boi + 1

    @property
    def size(self) -> int:
        """How many ids there are in all."""
        return self.boi + 2

    @property
    def tokens(self) -> int:
        """Codes of a picture."""
        return sum(tokens for _, tokens in self.segments)

    def extend(self, llm: Any) -> None:
        """Give a Hugging Face causal model rows for the new ids; the old ones stay bit by bit.

        Raises ValueError where it has not ``text`` ids.
        """
        if (had := llm.get_input_embeddings().num_embeddings) != self.text:
            raise ValueError(f"llm: got one of {had} ids, must have the {self.text} of text")
        # New rows of the mean of the old ones, transformers' default, would make all codes begin alike.
        llm.resize_token_embeddings(self.size, mean_resizing=False)

    def wrap(self, *codes: Tensor) -> Tensor:
        """(B, tokens + 2): [BOI] the codes (B, tokens) of each segment, as ids of this vocabulary [EOI].

        Raises ValueError for another number of segments or tokens, and for codes out of range.
        """
        if len(codes) != len(self.segments):
            raise ValueError(f"codes: got {len(codes)} segments, must be {len(self.segments)}")
        parts = []
        for each, start, (most, tokens) in zip(codes, self.starts, self.segments, strict=False):
            if each.dim() != 2 or each.shape[1] != tokens:
                raise ValueError(f"codes: got shape {tuple(each.shape)}, must be (B, {tokens})")
            if each.numel() and not 0 <= int(each.min()) <= int(each.max()) < most:
                raise ValueError(f"codes: got {int(each.min())} to {int(each.max())}, must be 0 to {most - 1}")
            parts.append(each + start)
        edge = parts[0][:, :1]
        return torch.cat([torch.full_like(edge, self.boi), *parts, torch.full_like(edge, self.eoi)], 1)

    def unwrap(self, ids: Tensor) -> tuple[Tensor, ...]:
        """The codes of each segment, (B, tokens), of ids (B, tokens + 2). Raises ValueError if these are no picture."""
        if ids.dim() != 2 or ids.shape[1] != self.tokens + 2:
            raise ValueError(f"ids: got shape {tuple(ids.shape)}, must be (B, {self.tokens + 2})")
        if not bool(
            (self.kinds(ids.device)[ids[:, 1:]] == self.order(ids.device)).all() & (ids[:, 0] == self.boi).all()
        ):
            raise ValueError("ids: must be BOI, the codes of each segment in its own range, EOI")
        parts = ids[:, 1:-1].split([tokens for _, tokens in self.segments], 1)
        return tuple(part - start for part, start in zip(parts, self.starts, strict=False))

    def pack(self, rows: Iterable[Sequence[Piece]]) -> Packed:
        """Sequences of text and pictures in any order, one for each list of pieces."""
        ids = [torch.cat([piece.ids for piece in row]) for row in rows_of(rows)]
        labels = [
            torch.cat([piece.ids if piece.learned else torch.full_like(piece.ids, IGNORED) for piece in row])
            for row in rows_of(rows)
        ]
        pad: Callable[..., Tensor] = nn.utils.rnn.pad_sequence
        there = [torch.ones_like(each) for each in ids]
        return Packed(pad(ids, True), pad(labels, True, IGNORED), pad(there, True))

    def kinds(self, device: torch.device | None = None) -> Tensor:
        """(size,) int64: 0 for text and BOI, i + 1 for the codes of segment i, one more for EOI."""
        counts = torch.tensor([self.text, *(codes for codes, _ in self.segments), 1, 1], device=device)
        n = len(self.segments)
        return torch.tensor([*range(n + 1), 0, n + 1], device=device).repeat_interleave(counts)

    def order(self, device: torch.device | None = None) -> Tensor:
        """(tokens + 1,) int64: the kind of each id of a picture after BOI."""
        counts = torch.tensor([*(tokens for _, tokens in self.segments), 1], device=device)
        return torch.arange(1, len(counts) + 1, device=device).repeat_interleave(counts)

    def allowed(self, ids: Tensor) -> Tensor:
        """(B, size) bool: what may come after ids (B, T), T 1 or more.

        After BOI the codes of each segment, as many as it has, then EOI; elsewhere text and BOI.
        """
        places = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(ids == self.boi, places, -1).amax(1)
        after = ids.shape[1] - 1 - last
        inside = (last >= 0) & (after <= self.tokens)
        wanted = torch.where(inside, self.order(ids.device)[after.clamp_max(self.tokens)], 0)
        return self.kinds(ids.device) == wanted[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As a logits processor of ``generate``: scores (B, size) with -inf where ``allowed`` is False."""
        return scores.masked_fill(~self.allowed(input_ids), -torch.inf)

    @torch.no_grad()
    def draw(self, llm: Any, prompt: Tensor, attention_mask: Tensor | None = None, **how: Any) -> tuple[Tensor, ...]:
        """The codes of the picture that ``llm`` writes after each ``prompt`` (B, T), padded at the left if at all.

        ``how`` goes to ``generate``; by default greedy.
        """
        ids = torch.cat([prompt, prompt.new_full((len(prompt), 1), self.boi)], 1)
        mask = torch.ones_like(prompt) if attention_mask is None else attention_mask
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        new = self.tokens + 1
        made = llm.generate(
            ids, attention_mask=mask, max_new_tokens=new, logits_processor=[self], **{"do_sample": False, **how}
        )
        return self.unwrap(made[:, -new - 1 :])


def rows_of(rows: Iterable[Sequence[Piece]]) -> list[Sequence[Piece]]:
    """``rows`` as a list. Raises ValueError for none, or an empty one."""
    found = list(rows)
    if not found or not all(found):
        raise ValueError("rows: must be one or more, each of one piece or more")
    return found


class Mixed(NamedTuple):
    """A loss over text and continuous tokens, and its two parts before weights; scalars."""

    loss: Tensor
    text: Tensor
    image: Tensor


def mixed_loss(
    logits: Tensor, labels: Tensor, predicted: Tensor, targets: Tensor, continuous: Tensor, weight: float = 1.0
) -> Mixed:
    """Cross-entropy where ids come next, mean square where vectors do; what comes at t is predicted at t - 1.

    ``logits`` (B, T, V), ``labels`` (B, T) with -100 where no id is learned; ``predicted`` and ``targets`` (B, T, D),
    no gradient to the latter; ``continuous`` (B, T) bool: a vector stands there. A part of no positions is 0. Raises
    ValueError where a position is of both kinds.
    """
    ids = labels != IGNORED
    if bool((ids & continuous).any()):
        raise ValueError("labels: got ids at continuous positions, must be -100 there")
    text = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    text = text / ids[:, 1:].sum().clamp_min(1)
    away = (predicted[:, :-1].float() - targets[:, 1:].detach().float()).square().mean(-1)
    image = (away * continuous[:, 1:]).sum() / continuous[:, 1:].sum().clamp_min(1)
    return Mixed(text + weight * image, text, image)


def small_llama(ids: int, width: int = 64, depth: int = 2, heads: int = 4, places: int = 512) -> Any:
    """A Hugging Face LlamaForCausalLM with ``ids`` ids and random weights from torch's random state."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ids,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=places,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def learn(module: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float = 3e-3) -> list[float]:
    """Take ``steps`` steps of AdamW, falling to nothing along a cosine, on what ``loss`` gives; the losses."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        found.append(float(value.detach()))
    return found

"""Many questions on one picture in one sequence, so that the picture is read once.

A packed row is the picture's prefix followed by segments: a dense caption, single questions and one two-turn dialogue.
A segment sees the prefix and itself only, and its positions go on from the prefix, so that each is trained exactly as
it will be asked: alone after the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerFast

from vistok.world import Picture, patch_labels

from .tokenizer import CAPTION_PROMPT

IGNORE = -100
LENGTH_STEP = 16
"""Text is padded to a multiple of this: the CPU kernels are compiled and kept for every length of sequence."""


@dataclass(frozen=True)
class Batch:
    """B packed pictures; S text positions after the prefix, padded at the end."""

    pixels: Tensor
    """(B, H, W, 3) uint8"""
    text: Tensor
    """(B, S) int64 token ids"""
    segment: Tensor
    """(B, S) int64, 1.. for the segments, -1 for padding"""
    position: Tensor
    """(B, S) int64, counted from the end of the prefix"""
    target: Tensor
    """(B, S) int64, the next token where it is part of an answer, else IGNORE"""
    labels: dict[str, Tensor]
    """each (B, N, 2) int64: the world's label of the left and right half of every patch, 0 is nothing. Two, since
    letters are narrower than patches."""


def pack(pictures: list[Picture], tokenizer: PreTrainedTokenizerFast, grid: int) -> Batch:
    """Pack each picture with its caption, its questions, and its first two questions once more as a dialogue."""
    texts, owners = [], []
    for row, picture in enumerate(pictures):
        asked = [(q.text, q.answer) for q in picture.questions]
        conversations = [[(CAPTION_PROMPT, picture.caption)], *([turn] for turn in asked[2:]), asked[:2]]
        for conversation in conversations:
            if conversation:
                texts.append(
                    "".join(f"<user> {q.lower()}<assistant> {a}{tokenizer.eos_token}" for q, a in conversation)
                )
                owners.append(row)
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    user, answer = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    rows: list[list[Tensor]] = [[] for _ in pictures]
    for ids_list, row in zip(encoded, owners, strict=True):
        ids = torch.tensor(ids_list)
        turn_starts = ids == user
        # In an answer: after <assistant> and before the next <user>. The token before each of these predicts it.
        inside = (ids == answer).cumsum(0) == turn_starts.cumsum(0)
        target = torch.full_like(ids, IGNORE)
        target[:-1] = torch.where(inside[:-1] & ~turn_starts[1:], ids[1:], IGNORE)
        rows[row].append(torch.stack([ids, torch.full_like(ids, len(rows[row]) + 1), torch.arange(len(ids)), target]))
    return to_batch(pictures, [torch.cat(row, 1) for row in rows], tokenizer.pad_token_id, grid)


def to_batch(pictures: list[Picture], rows: list[Tensor], filling: int, grid: int) -> Batch:
    """The batch of ``pictures`` whose text, segments, positions and targets are ``rows``, each (4, S') int64.

    ``filling``: the token id of padding.
    """
    fill = (filling, -1, 0, IGNORE)
    length = -(-max(row.shape[1] for row in rows) // LENGTH_STEP) * LENGTH_STEP
    text, segment, position, target = (
        torch.stack([pad(row[i], (0, length - row.shape[1]), value=fill[i]) for row in rows]) for i in range(4)
    )
    by_picture = [patch_labels(picture, (grid, 2 * grid)) for picture in pictures]
    labels = {name: np.stack([one[name].reshape(-1, 2) for one in by_picture]) for name in by_picture[0]}
    return Batch(
        pixels=torch.from_numpy(np.stack([picture.image for picture in pictures])),
        text=text,
        segment=segment,
        position=position,
        target=target,
        labels={name: torch.from_numpy(values).long() for name, values in labels.items()},
    )


def packed_mask(prefix: int, segment: Tensor) -> Tensor:
    """(B, 1, L, L) bool, True where a query may see a key: causal, the prefix for all, else the own segment only."""
    whole = torch.cat([segment.new_zeros(len(segment), prefix), segment], dim=1)
    length = whole.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    same = whole[:, :, None] == whole[:, None, :]
    return (causal & (same | (whole == 0)[:, None, :]))[:, None]

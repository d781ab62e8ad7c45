"""Asking a vision-language model: pictures and questions in, answers out, by the processor's own template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vistok.world import Question

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin


def prompt(processor: ProcessorMixin, question: str) -> str:
    """One picture, one question, ready for the answer."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def encode(processor: ProcessorMixin, pictures: Sequence[Image.Image], questions: Sequence[str]) -> BatchFeature:
    """Model inputs of one batch, one picture a row, padded on the left."""
    processor.tokenizer.padding_side = "left"
    texts = [prompt(processor, question) for question in questions]
    # The template writes the first token itself.
    return processor(
        images=[[picture] for picture in pictures],
        text=texts,
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers, one a (picture, question) pair, stripped of special tokens and outer white space."""
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        rows = slice(start, start + batch_size)
        inputs = encode(processor, pictures[rows], questions[rows]).to(model.device)
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def is_right(question: Question, answer: str) -> bool:
    """Whether ``answer`` is the question's, by ``same_answer``."""
    return same_answer(question.answer, answer)


def same_answer(right: str, answer: str) -> bool:
    """Exact match after trimming; upper and lower case count as the same."""
    return answer.strip().casefold() == right.strip().casefold()

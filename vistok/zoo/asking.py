"""Asking a vision-language model: pictures and questions in, answers out, by the processor's own template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from vistok.host.diffusion import Denoised, DiffusionDecoder, LayerSkip, Prune
from vistok.world import Question

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

Shown: TypeAlias = "Image.Image | Sequence[Image.Image]"
"""What stands before a question: a picture, or several."""


def prompt(processor: ProcessorMixin, question: str, pictures: int = 1) -> str:
    """One picture (or so many), then one question, ready for the answer."""
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def encode(processor: ProcessorMixin, pictures: Sequence[Shown], questions: Sequence[str]) -> BatchFeature:
    """Model inputs of one batch, a picture or several a row, padded on the left."""
    processor.tokenizer.padding_side = "left"
    rows = [list(shown) if isinstance(shown, Sequence) else [shown] for shown in pictures]
    # The template writes the first token itself.
    return processor(
        images=rows,
        text=[prompt(processor, question, len(row)) for row, question in zip(rows, questions, strict=True)],
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[Shown],
    questions: Sequence[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers, one a (picture, question) pair, stripped of special tokens and outer white space.

    Several pictures in place of one stand in one prompt, all before the question. A masked-diffusion
    model fills a token of its answer a step.
    """
    if is_diffusion(model):
        return denoise(model, processor, pictures, questions, batch_size=batch_size, cache=True)[0]
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        rows = slice(start, start + batch_size)
        inputs = encode(processor, pictures[rows], questions[rows]).to(model.device)
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


@torch.inference_mode()
def ask_again(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[Shown],
    turns: Sequence[tuple[str, str, str]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers to the last of each of ``turns`` (question, its answer, second question), one a picture.

    The first question is read with the picture, and then its answer and the second one on the same cache.
    """
    answers: list[str] = []
    for start in range(0, len(turns), batch_size):
        rows = turns[start : start + batch_size]
        inputs = encode(processor, pictures[start : start + batch_size], [turn[0] for turn in rows]).to(model.device)
        # By generate, as the second turn is: a bare forward counts the padding in its positions.
        read = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        later = processor.tokenizer(
            [_second_turn(processor, *turn) for turn in rows],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        both: dict[str, Any] = {
            name: torch.cat([inputs[name], later[name]], 1) for name in ("input_ids", "attention_mask")
        }
        both |= {"past_key_values": read.past_key_values, "cache_implementation": None}  # the cache is made already
        made = model.generate(**both, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, both["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def _second_turn(processor: ProcessorMixin, question: str, answer: str, again: str) -> str:
    """What the processor's template writes after ``prompt(processor, question)``."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": [{"type": "text", "text": again}]},
    ]
    return processor.apply_chat_template(messages, add_generation_prompt=True)[len(prompt(processor, question)) :]


def picture_token(model: PreTrainedModel, processor: ProcessorMixin) -> str | None:
    """What stands for a picture in a prompt, which a question therefore must not hold; None where nothing does."""
    image = getattr(model.config, "image_token_id", None)
    return None if image is None else processor.tokenizer.convert_ids_to_tokens(image)


def is_diffusion(model: PreTrainedModel) -> bool:
    """Whether the model's language head is a masked-diffusion one: its configuration names a mask."""
    return getattr(model.config, "mask_token_id", None) is not None


def denoise(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[Shown],
    questions: Sequence[str],
    *,
    steps: int | None = None,
    prune: Prune | None = None,
    skip: LayerSkip | None = None,
    batch_size: int = 32,
    cache: bool = False,
    trace: bool = False,
) -> tuple[list[str], list[Denoised]]:
    """Answers of a masked-diffusion model, one a (picture, question) pair, and what became of each batch.

    ``steps``: by default as many as an answer has tokens; the rest as in ``DiffusionDecoder``.
    """
    decoder = DiffusionDecoder(model, model.config.answer_length if steps is None else steps, cache=cache)
    answers: list[str] = []
    runs: list[Denoised] = []
    for start in range(0, len(questions), batch_size):
        rows = slice(start, start + batch_size)
        inputs = encode(processor, pictures[rows], questions[rows]).to(model.device)
        runs.append(decoder.run(inputs, prune, skip, trace=trace))
        answers += spoken(processor, runs[-1].ids)
    return answers, runs


def spoken(processor: ProcessorMixin, ids: torch.Tensor) -> list[str]:
    """What the answers ``ids`` (B, A) say, up to their first end token."""
    tokenizer = processor.tokenizer
    ended = (ids == tokenizer.eos_token_id).cumsum(1) > 0
    texts = processor.batch_decode(ids.masked_fill(ended, tokenizer.pad_token_id), skip_special_tokens=True)
    return [text.strip() for text in texts]


def is_right(question: Question, answer: str) -> bool:
    """Whether ``answer`` is the question's, or another that counts as right, by ``same_answer``."""
    return any(same_answer(right, answer) for right in (question.answer, *question.also))


def same_answer(right: str, answer: str) -> bool:
    """Exact match after trimming; upper and lower case count as the same."""
    return answer.strip().casefold() == right.strip().casefold()

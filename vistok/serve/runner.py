"""A vision-language model behind a ``Batcher``: requests in, answers out piece by piece, several in one batch.

    runner = Runner(vistok.load(name), load_processor(name))
    batcher = Batcher(runner)
    ask = Ask(messages, pictures, max_new_tokens=64, method="holov", keep=0.25)
    runner.prompt(ask)                                     # raises RequestError for what cannot be asked
    async with batcher.submit(ask, ask.key, deadline_s=60) as job:
        async for event in job:                            # Text, Text, ..., End(Finish)
            ...

Several models have a Runner and a Batcher each. A cache of what the vision encoder made is put around each batch, see
``Around``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vistok.host import Session, UnsupportedModel, apply
from vistok.host.hosts import host_of
from vistok.serve.answer import Answer
from vistok.serve.batching import End, Failed
from vistok.serve.errors import RequestError
from vistok.serve.sampling import Draw
from vistok.serve.schema import Sampling
from vistok.zoo.asking import is_diffusion

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=None)


@dataclass(frozen=True)
class Shown:
    """A picture of a request, and the hash of its content: equal hashes, equal pictures."""

    image: Image.Image
    digest: str


@dataclass(frozen=True)
class Ask:
    """What a model is asked. Raises ValueError where ``pictures`` do not fit ``messages`` and for numbers below 1.

    ``messages``: {"role": ..., "content": [{"type": "text", "text": ...} or {"type": "image"}, ...]} each; ``pictures``
    stand for the image parts, in their order. ``method``, ``keep``, ``hyper``: as for ``vistok.apply``; None: all
    visual tokens stay. ``stop``: strings before which the answer ends.
    """

    messages: Sequence[Mapping[str, Any]]
    pictures: tuple[Shown, ...] = ()
    max_new_tokens: int = 64
    method: str | None = None
    keep: int | float | None = None
    hyper: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        places = sum(part["type"] == "image" for message in self.messages for part in message["content"])
        if places != len(self.pictures):
            raise ValueError(f"pictures: got {len(self.pictures)} for {places} image parts, must be one each")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}, must be at least 1")
        if not all(self.stop):
            raise ValueError("stop: got an empty string, must be strings of a character or more")

    @property
    def key(self) -> Hashable:
        """Requests of equal keys can share a batch of one model; the first of it is the method."""
        # As they are written: 1 is one token and 1.0 all of them, but in Python they are equal.
        return self.method, repr(self.keep), repr(sorted(self.hyper.items())), bool(self.pictures)


@dataclass(frozen=True)
class Text:
    """A piece of an answer, not empty and in whole characters."""

    text: str


@dataclass(frozen=True)
class Finish:
    """How an answer ended, and what it took."""

    reason: Literal["stop", "length"]
    """"stop": by an end token or one of the request's strings; "length": by ``max_new_tokens`` or the model's limit."""
    prompt_tokens: int
    """All tokens of the prompt, with the visual ones before any were dropped."""
    completion_tokens: int
    """Tokens that were made, with the end token."""
    visual_tokens: int
    visual_tokens_kept: int
    """Those left to the language model; for methods that drop some inside of it the mean over its layers, rounded."""


Around: TypeAlias = Callable[[Sequence[Ask], Mapping[str, Tensor]], AbstractContextManager[Any]]
"""Called with the requests of a batch, row by row, and what the model is given; entered around ``generate``, inside the
method's ``with``. The vision encoder sees their pictures in this order, so a cache knows them by their digests."""


class Runner:
    """Runs batches on ``model`` for a ``Batcher``; in one thread only, but ``prompt`` in any.

    ``processor``: the model's own; its tokenizer is set to pad on the left. Greedy answers are those of
    ``vistok.zoo.asking.ask``. Raises UnsupportedModel for models that are not known, that answer by diffusion, or
    whose chat template has no place for pictures.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        around: Around = lambda asks, inputs: nullcontext(),
    ) -> None:
        self.model, self.processor, self._around = model, processor, around
        self._host = host_of(model)
        if is_diffusion(model):
            raise UnsupportedModel(f"{self._host.name} answers by masked diffusion, which is not served")
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        ends = model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        self.context: int = model.config.get_text_config().max_position_embeddings
        """Tokens that a prompt and its answer may have together."""
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        with_picture, without = (self._rendered(_example(pictures)) for pictures in (1, 0))
        special |= {str(token) for token in added if with_picture.count(str(token)) > without.count(str(token))}
        self._special = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        self._marks = self._counted(with_picture) - self._counted(without)
        if not self._marks:
            raise UnsupportedModel(f"{self._host.name}: the chat template has no place for pictures")

    # The prompt --------------------------------------------------------------------------------------------------

    def prompt(self, ask: Ask) -> str:
        """The text that the model reads. RequestError (400) for messages that the chat template does not take.

        Also for texts that hold one of the model's own tokens, by themselves or in what the template makes of them: by
        those a client could speak for somebody else, or shift the pictures of the other requests in the batch.
        """
        text, plain = (self._rendered(messages) for messages in (ask.messages, _plain(ask.messages)))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _refused("invalid_text", "messages: a text holds half of a surrogate pair") from error
        seen = self._counted(plain)
        if any(seen[token] != times * len(ask.pictures) for token, times in self._marks.items()):
            raise _refused("unsupported_content", "messages: the model takes no pictures at one of these places")
        if self._counted(text) != seen:
            raise _refused("invalid_text", "messages: a text holds one of the model's own control tokens")
        return text

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self.processor.apply_chat_template(list(messages), add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise _refused("invalid_messages", "messages: the model does not take these roles in this order") from error

    def _counted(self, text: str) -> Counter[str]:
        return Counter(self._special.findall(text))

    def _encode(self, asks: Sequence[Ask], prompts: Sequence[str]) -> BatchFeature:
        images = [[shown.image for shown in ask.pictures] for ask in asks]
        return self.processor(
            text=list(prompts),
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,  # the template writes them
            **({"images": images} if asks[0].pictures else {}),
        ).to(self.model.device)

    # A batch -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def __call__(self, asks: Sequence[Ask], emit: Callable[[int, Any], None], cancelled: Callable[[int], bool]) -> None:
        """Answer ``asks``, which have one key; ``emit`` and ``cancelled`` as a ``Batcher`` gives them.

        A row ends by ``End(Finish)``, or by ``Failed`` with a RequestError if it cannot be asked. It is also dropped at
        the next token when it is ``cancelled``; the place of a row that ended stays empty until the batch is through.
        """
        if len({ask.key for ask in asks}) > 1:
            raise ValueError("asks: got different keys, must be one")
        texts: dict[int, str] = {}
        for number, ask in enumerate(asks):
            try:
                texts[number] = self.prompt(ask)
            except RequestError as error:
                emit(number, Failed(error))
        while texts := {number: text for number, text in texts.items() if not cancelled(number)}:
            inputs = self._encode([asks[number] for number in texts], list(texts.values()))
            lengths = dict(zip(texts, inputs["attention_mask"].sum(1).tolist(), strict=True))
            long = [number for number in texts if lengths[number] >= self.context]
            if not long:
                self._generate([_Row(self, n, asks[n], lengths[n], emit, cancelled) for n in texts], inputs)
                return
            for number in long:
                message = f"messages: {lengths[number]} tokens, the model takes less than {self.context}"
                emit(number, Failed(_refused("context_length_exceeded", message)))
                del texts[number]

    def _generate(self, rows: Sequence[_Row], inputs: BatchFeature) -> None:
        try:
            session = self._session(rows[0].ask)
        except RequestError as error:
            for row in rows:
                row.refuse(error)
            return
        batch = _Batch(rows, inputs["input_ids"] == self._host.image_token, session, len(self._host.layers))
        draws = [row.ask.sampling for row in rows]
        processors = [Draw(draws, self.model.device)] if any(draw.temperature for draw in draws) else []
        try:
            with session or nullcontext(), self._around([row.ask for row in rows], inputs):
                self.model.generate(
                    **inputs,
                    max_new_tokens=max(row.room for row in rows),
                    do_sample=False,
                    num_beams=1,
                    logits_processor=LogitsProcessorList(processors),
                    stopping_criteria=StoppingCriteriaList([batch]),
                )
        except ValueError as error:
            # That a picture has fewer tokens than are to stay shows in the model. Of several rows the batcher finds
            # the one by itself.
            if len(rows) > 1 or not str(error).startswith("keep:"):
                raise
            rows[0].refuse(_refused("invalid_method", str(error), "vistok.keep"))

    def _session(self, ask: Ask) -> Session | None:
        if ask.method is None:
            return None
        try:
            return apply(self.model, ask.method, ask.keep, **ask.hyper)
        except TypeError as error:
            raise _refused("invalid_method", "vistok.hyper: not what the method takes", "vistok.hyper") from error
        except (ValueError, LookupError) as error:  # these say which argument, what it was, and what would be right
            raise _refused("invalid_method", str(error), "vistok") from error

    def _decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Row:
    """A request while its answer is made."""

    def __init__(
        self,
        runner: Runner,
        number: int,
        ask: Ask,
        length: int,
        emit: Callable[[int, Any], None],
        cancelled: Callable[[int], bool],
    ) -> None:
        self.ask, self.length = ask, length
        self.room = min(ask.max_new_tokens, runner.context - length)
        self.over = False
        self._number, self._emit, self._cancelled, self._ends = number, emit, cancelled, runner._ends
        self._answer, self._made = Answer(runner._decode, ask.stop), 0

    def refuse(self, error: RequestError) -> None:
        """It cannot be asked."""
        self._emit(self._number, Failed(error))

    def step(self, token: int, visual: Callable[[], tuple[int, int]]) -> None:
        """One more ``token``; ``visual``: the row's visual tokens, before the method and after it."""
        if self._cancelled(self._number):
            self.over = True
            return
        self._made += 1
        ended = token in self._ends
        if not ended:
            self._say(self._answer.add(token))
        if not (ended or self._answer.stopped or self._made >= self.room):
            return
        self.over = True
        self._say(self._answer.rest())
        reason: Literal["stop", "length"] = "stop" if ended or self._answer.stopped else "length"
        self._emit(self._number, End(Finish(reason, self.length, self._made, *visual())))

    def _say(self, text: str) -> None:
        if text:
            self._emit(self._number, Text(text))


class _Batch(StoppingCriteria):
    """Gives each row of ``generate`` its new tokens, and ends those that are over."""

    def __init__(self, rows: Sequence[_Row], visual: Tensor, session: Session | None, num_layers: int) -> None:
        self._rows, self._visual, self._session, self._num_layers = rows, visual, session, num_layers

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for number, (row, token) in enumerate(zip(self._rows, input_ids[:, -1].tolist(), strict=True)):
            if not row.over:
                row.step(token, lambda number=number: self._tokens[number])  # type: ignore[misc]
        return torch.tensor([row.over for row in self._rows], device=input_ids.device)

    @cached_property
    def _tokens(self) -> list[tuple[int, int]]:
        """Visual tokens of each row, before the method and after it; known when the prompt has been read."""
        counts = self._visual.sum(1).tolist()
        if self._session is None:
            return [(count, count) for count in counts]
        kept = [0.0] * len(counts)
        for picture in self._session.pictures:
            kept[picture.row] += picture.mean_tokens(self._num_layers)
        return [(count, round(left)) for count, left in zip(counts, kept, strict=True)]


def _refused(code: str, message: str, param: str = "messages") -> RequestError:
    return RequestError(400, code, message, param)


def _example(pictures: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*([{"type": "image"}] * pictures), {"type": "text", "text": "x"}]}]


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same roles and parts, with texts that say nothing."""
    return [
        {
            **message,
            "content": [part | {"text": "x"} if part["type"] == "text" else part for part in message["content"]],
        }
        for message in messages
    ]


__all__ = ["Around", "Ask", "Finish", "Runner", "Shown", "Text"]

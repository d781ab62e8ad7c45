"""Requests and answers of the OpenAI chat-completions API, as far as they are served here.

A field that would change the answer and is not served is refused by its name; a field that changes nothing, or is not
known, is ignored, as the OpenAI API does. What is added to it stands under ``vistok``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vistok.serve.errors import RequestError
from vistok.serve.limits import Limits

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # Fields of the OpenAI API, and the values that ask for nothing.
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # Fields of other servers. Some of them have let a stranger's template, array or pattern run on the server.
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "logits_processors": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "repetition_penalty": (1,),
    "structured_outputs": (),
    "top_k": (0, -1),
    "use_beam_search": (False,),
}
_TYPES = frozenset({"str", "int", "float", "bool"})
_WORD = r"^[a-z0-9][a-z0-9_-]{0,63}$"  # no path, no module: a method is looked up by its name


class _Read(BaseModel):
    # Strict: "5" is no number and true is not 1, as in the OpenAI API.
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(_Read):
    """A text within a message."""

    type: Literal["text"]
    text: str


class ImageURL(_Read):
    """Where a picture is. ``detail`` is accepted and changes nothing: ``vistok.keep`` says how many tokens stay."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Read):
    """A picture within a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Read):
    """One turn: a text, or texts and pictures in order. Pictures are the user's."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @model_validator(mode="after")
    def _pictures_are_the_users(self) -> Message:
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts):
            raise ValueError("only messages of the user may hold pictures")
        return self


class StreamOptions(_Read):
    """``include_usage``: a last chunk with the usage and no choice."""

    include_usage: bool = False


HyperValue = bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | Annotated[str, Field(pattern=_WORD)] | None


class VistokOptions(_Read):
    """Which method reduces the visual tokens; what is None is the server's default.

    ``method``: the name of a system; ``keep``: a count of tokens a picture (whole number >= 1) or a share of them
    (0 < share <= 1, written with a point: ``1`` is one token, ``1.0`` is all); ``hyper``: hyper-parameters of the
    method by name: numbers, true, false, null and names.
    """

    model_config = ConfigDict(extra="forbid")  # our own field: a slip of the pen must not pass for the default

    method: Annotated[str, Field(pattern=_WORD)] | None = None
    keep: Annotated[int, Field(ge=1, le=1_000_000)] | Annotated[float, Field(gt=0, le=1)] | None = None
    hyper: dict[
        Annotated[str, Field(pattern=_WORD)], HyperValue | Annotated[list[HyperValue], Field(max_length=64)]
    ] = Field(default_factory=dict, max_length=32)

    @field_validator("hyper", mode="before")
    @classmethod
    def _no_null(cls, value: Any) -> Any:
        return {} if value is None else value


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, row by row: a batch may hold different ones. A ``temperature`` of 0 takes the likeliest."""

    temperature: float
    top_p: float
    seed: int | None


class ChatRequest(_Read):
    """A request for a chat completion.

    Without a ``temperature`` it is 0 (the OpenAI API's is 1): the same question gets the same answer, so that
    methods can be compared. ``max_completion_tokens`` goes before ``max_tokens``; both None is the server's default.
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    vistok: VistokOptions = Field(default_factory=VistokOptions)

    @field_validator("vistok", mode="before")
    @classmethod
    def _no_null(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("stop")
    @classmethod
    def _stop_says_something(cls, value: str | list[str] | None) -> str | list[str] | None:
        for text in [value] if isinstance(value, str) else value or []:
            if not 1 <= len(text) <= 64:
                raise ValueError("a stop text must have 1 to 64 characters")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    @property
    def picture_urls(self) -> list[str]:
        """The URLs of all pictures, in order."""
        return [part.image_url.url for message in self.messages for part in message.parts if part.type == "image_url"]

    @property
    def new_tokens(self) -> int | None:
        """The most tokens that the answer may have; None where the request does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer, and are no part of it."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn. At temperature 0 the other settings change nothing, and are left out."""
        if not self.temperature:
            return Sampling(0.0, 1.0, None)
        return Sampling(self.temperature, 1.0 if self.top_p is None else self.top_p, self.seed)


def read_request(value: Any, limits: Limits) -> ChatRequest:
    """The request in a JSON value. Raises RequestError naming the field at fault, and what would be right."""
    if not isinstance(value, dict):
        raise RequestError(400, "invalid_request", "The request's body must be a JSON object.")
    for name, neutral in _NEUTRAL.items():
        given = value.get(name)
        # 0 == False in Python: a flag is a flag and a number is a number.
        if given is not None and not any(
            given == asks and isinstance(given, bool) == isinstance(asks, bool) for asks in neutral
        ):
            raise RequestError(400, "unsupported_parameter", f"{name}: is not served here with that value.", name)
    messages = value.get("messages")
    if isinstance(messages, list) and len(messages) > limits.messages:
        raise _over("messages", "messages", limits.messages)
    try:
        request = ChatRequest.model_validate(value)
    except ValidationError as error:
        raise _explained(error) from error
    _check(request, limits)
    return request


def _check(request: ChatRequest, limits: Limits) -> None:
    parts = [part for message in request.messages for part in message.parts]
    if len(request.picture_urls) > limits.pictures:
        raise _over("messages", "pictures", limits.pictures)
    if sum(len(part.text) for part in parts if isinstance(part, TextPart)) > limits.text_characters:
        raise _over("messages", "characters of text", limits.text_characters)
    if (request.new_tokens or 0) > limits.new_tokens:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        raise RequestError(400, "limit_exceeded", f"{name}: must be at most {limits.new_tokens}.", name)


def _over(name: str, what: str, most: int) -> RequestError:
    return RequestError(400, "limit_exceeded", f"{name}: must have at most {most} {what}.", name)


def _explained(error: ValidationError) -> RequestError:
    """The fault that says most, by the path of its field; never the value, which can be a picture or a secret."""
    # Of a field that may be one of several types each has its own fault: the one that got furthest is meant.
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(faults, key=lambda fault: (not fault["type"].endswith("_type"), len(fault["loc"])))
    # Steps such as "list[...]" and "constrained-int" are pydantic's names for those types; a part's type stands
    # after the part's number.
    names: list[str] = []
    for before, step in zip((None, *first["loc"]), first["loc"], strict=False):
        of_part = isinstance(before, int) and step in ("text", "image_url")
        known = isinstance(step, int) or (re.fullmatch(_WORD, step) and not step.startswith("constrained-"))
        if known and not of_part and step not in _TYPES:
            names.append(str(step))
    name = ".".join(names)[:128] or "messages"
    # Some messages repeat a word of the request, which can be long.
    why = first["msg"].removeprefix("Value error, ")[:200]
    return RequestError(400, "invalid_request", f"{name}: {why}.", name)


class Usage(BaseModel):
    """Tokens of a request. ``prompt_tokens`` counts the visual tokens that were kept, not those that were not.

    ``visual_tokens`` are those that the pictures have without a method; ``visual_tokens_kept`` are those left at the
    end of the model.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    visual_tokens: int
    visual_tokens_kept: int


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class Choice(BaseModel):
    """The one answer. ``finish_reason``: ``length`` where it was cut at its number of tokens."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: None = None


class ChatCompletion(BaseModel):
    """A whole answer; ``created`` in seconds since 1970."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of the one answer; ``finish_reason`` is set in its last."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed answer. The chunk with the ``usage`` has no choice."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model that is served; ``created`` in seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """What ``GET /v1/models`` answers."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """Why a request is refused."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """What is answered then."""

    error: ErrorDetail

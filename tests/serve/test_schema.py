"""Requests: what OpenAI's clients send is read, what would change the answer is refused by name, bounds come first."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from vistok.serve.body import read_json
from vistok.serve.errors import RequestError
from vistok.serve.limits import Limits
from vistok.serve.schema import ChatCompletion, ChatCompletionChunk, ModelList, Sampling, read_request

LIMITS = Limits()
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def body(**more: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": "What is red?"}]} | more


def says(content: Any, role: str = "user") -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": role, "content": content}]}


def refused(value: Any, limits: Limits = LIMITS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_request(value, limits)
    assert caught.value.status == 400
    return caught.value


def test_a_full_request() -> None:
    request = read_request(
        body(
            messages=[
                {"role": "developer", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "And here?"}, PICTURE, PICTURE], "name": "x"},
            ],
            max_tokens=9,
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            stream=True,
            stream_options={"include_usage": True},
            stop=["\n", "."],
            seed=-3,
            n=1,
            user="somebody",
            vistok={"method": "holov", "keep": 0.25, "hyper": {"alpha": 0.5, "sizes": [1, 2], "parity": "authors"}},
        ),
        LIMITS,
    )
    assert request.picture_urls == [PICTURE["image_url"]["url"]] * 2
    assert request.new_tokens == 7
    assert request.stops == ("\n", ".")
    assert request.sampling == Sampling(0.5, 0.9, -3)
    assert (request.vistok.method, request.vistok.keep) == ("holov", 0.25)
    assert request.vistok.hyper == {"alpha": 0.5, "sizes": [1, 2], "parity": "authors"}
    assert request.stream_options is not None and request.stream_options.include_usage


def test_defaults_are_greedy_and_the_servers() -> None:
    request = read_request(body(vistok=None), LIMITS)
    assert request.sampling == Sampling(0.0, 1.0, None)
    assert request.new_tokens is None and request.stops == () and not request.stream
    assert request.vistok.method is None and request.vistok.keep is None and request.vistok.hyper == {}


def test_greedy_requests_share_a_batch_whatever_else_they_say() -> None:
    assert read_request(body(temperature=0, top_p=0.5, seed=1), LIMITS).sampling == Sampling(0.0, 1.0, None)


def test_a_whole_keep_is_a_count_and_a_share_is_a_share() -> None:
    one, all_ = (read_request(body(vistok={"keep": keep}), LIMITS).vistok.keep for keep in (1, 1.0))
    assert isinstance(one, int) and isinstance(all_, float)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("n", 2),
        ("n", True),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("logit_bias", {"1": 2}),
        ("frequency_penalty", 0.5),
        ("reasoning_effort", "high"),
        ("chat_template", "{% for i in range(999999999) %}x{% endfor %}"),
        ("chat_template_kwargs", {"chat_template": "x"}),
        ("mm_processor_kwargs", {"max_pixels": 10**12}),
        ("prompt_embeds", "gASVAAAA"),
        ("guided_regex", "(a+)+$"),
        ("best_of", 4),
        ("top_k", 5),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(name: str, value: Any) -> None:
    error = refused(body(**{name: value}))
    assert error.param == name and error.code == "unsupported_parameter" and name in error.message


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [], "tool_choice": "auto", "logprobs": False, "n": 1, "response_format": {"type": "text"}},
        {"tools": None, "n": None, "presence_penalty": 0.0, "logit_bias": {}, "modalities": ["text"]},
        {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True, "made_up": 1},
    ],
)
def test_what_asks_for_nothing_is_ignored(more: dict[str, Any]) -> None:
    assert read_request(body(**more), LIMITS) == read_request(body(), LIMITS)


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], None),
        ("text", None),
        (None, None),
        ({"messages": []}, "model"),
        (body(messages=[]), "messages"),
        (body(model=""), "model"),
        (says(None), "messages.0.content"),
        (says("x", role="tool"), "messages.0.role"),
        (says([PICTURE], role="system"), "messages.0"),
        (says([{"type": "input_audio", "input_audio": {}}]), "messages.0.content.0"),
        (says([{"type": "video_url", "video_url": {"url": "x"}}]), "messages.0.content.0"),
        (says([{"type": "image_url", "image_url": {"url": 5}}]), "messages.0.content.0.image_url.url"),
        (says([{"type": "image_url", "image_url": "data:"}]), "messages.0.content.0.image_url"),
        (says([{"type": "text", "text": ["x"]}]), "messages.0.content.0.text"),
        (body(temperature=float("nan")), "temperature"),
        (body(temperature=float("inf")), "temperature"),
        (body(temperature=2.1), "temperature"),
        (body(temperature="1"), "temperature"),
        (body(top_p=0), "top_p"),
        (body(max_tokens=0), "max_tokens"),
        (body(max_tokens="5"), "max_tokens"),
        (body(max_tokens=True), "max_tokens"),
        (body(max_tokens=1.5), "max_tokens"),
        (body(seed=2**63), "seed"),
        (body(stop=["a"] * 5), "stop"),
        (body(stop=""), "stop"),
        (body(stop=["x" * 65]), "stop"),
        (body(stream="yes"), "stream"),
        (body(vistok={"methd": "holov"}), "vistok.methd"),
        (body(vistok={"method": "../holov"}), "vistok.method"),
        (body(vistok={"method": "os.system"}), "vistok.method"),
        (body(vistok={"keep": 0}), "vistok.keep"),
        (body(vistok={"keep": 0.0}), "vistok.keep"),
        (body(vistok={"keep": 1.5}), "vistok.keep"),
        (body(vistok={"keep": True}), "vistok.keep"),
        (body(vistok={"keep": "0.5"}), "vistok.keep"),
        (body(vistok={"hyper": {"weights": "/etc/passwd"}}), "vistok.hyper.weights"),
        (body(vistok={"hyper": {"weights": {"a": 1}}}), "vistok.hyper.weights"),
        (body(vistok={"hyper": {f"a{i}": 1 for i in range(33)}}), "vistok.hyper"),
        (body(vistok={"hyper": {"a": 10**400}}), "vistok.hyper.a"),
    ],
)
def test_faults_are_named(value: Any, param: str | None) -> None:
    error = refused(value)
    assert error.param == param
    assert error.body()["error"]["type"] == "invalid_request_error"


def test_stream_options_need_a_stream() -> None:
    assert "stream_options" in refused(body(stream_options={"include_usage": True})).message


def test_errors_hold_no_values() -> None:
    secret = "sk-secret" * 10_000
    for value in (body(max_tokens=secret), body(vistok={"method": secret}), says([{"type": "text", "text": [secret]}])):
        assert "secret" not in refused(value).message
    assert len(refused(says([{"type": secret}])).message) < 400  # a part's type is repeated, but not all of it
    assert len(refused(body(vistok={secret: 1})).message) < 400


def test_bounds_of_a_request() -> None:
    small = Limits(pictures=2, text_characters=10, new_tokens=5, messages=2)
    read_request(says([PICTURE, PICTURE, {"type": "text", "text": "0123456789"}]), small)
    assert "2 pictures" in refused(says([PICTURE] * 3), small).message
    assert "10 characters" in refused(says("01234567890"), small).message
    assert "10 characters" in refused(says([{"type": "text", "text": "012345"}] * 2), small).message
    assert refused(body(max_completion_tokens=6) | says("x"), small).param == "max_completion_tokens"
    assert refused(body(max_tokens=6) | says("x"), small).param == "max_tokens"
    turns = [{"role": "user", "content": "x"}] * 3
    assert "2 messages" in refused(body(messages=turns), small).message


def test_json_is_read() -> None:
    value = body(text='\\"[{,"', face="\U0001f600")
    assert read_json(json.dumps(value).encode(), LIMITS) == value
    assert read_json(json.dumps(value, ensure_ascii=False).encode(), LIMITS) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b"\xff\xfe{\x00}\x00",
        b'{"a": "\xff"}',
        b"1" * 5_000,
        b'{"a": 1} x',
        b"{'a': 1}",
        b'"' + b"\\" * 9,
    ],
)
def test_what_is_no_json(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        read_json(raw, LIMITS)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert "char" not in caught.value.message


def test_bounds_of_json() -> None:
    small = Limits(json_depth=3, json_values=4, request_bytes=60, picture_bytes=60)
    assert read_json(b"[[[1]]]", small) == [[[1]]]
    for raw in (b"[[[[]]]]", b"[1,2,3,4,5]", b'{"a":1,"b":2,"c":3,"d":4,"e":5}', b"]" * 39, b'"' * 59):
        with pytest.raises(RequestError) as caught:
            read_json(raw, small)
        assert caught.value.code == "json_too_large", raw
    with pytest.raises(RequestError) as caught:
        read_json(b" " * 61, small)
    assert caught.value.status == 413


@pytest.mark.parametrize("unit", [b"[", b"[],", b'"",', b'"', b"]", b'{"a":', b"1,", b'\\"'])
def test_hostile_json_costs_no_time(unit: bytes) -> None:
    raw = b"[" + unit * (8 * 2**20 // len(unit))
    started = time.process_time()
    with pytest.raises(RequestError):
        read_json(raw, LIMITS)
    with pytest.raises(RequestError):
        read_json(b'"' + raw, LIMITS)
    assert time.process_time() - started < 3.0  # without the bounds: tens of seconds, or gigabytes


def test_answers_have_the_forms_of_the_api() -> None:
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 1,
        "total_tokens": 6,
        "visual_tokens": 16,
        "visual_tokens_kept": 4,
    }
    choice = {"message": {"content": "red"}, "finish_reason": "stop"}
    whole = ChatCompletion.model_validate(
        {"id": "a", "created": 1, "model": "small", "choices": [choice], "usage": usage}
    ).model_dump()
    assert whole["object"] == "chat.completion" and whole["usage"]["visual_tokens_kept"] == 4
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "red", "refusal": None}
    chunk = ChatCompletionChunk.model_validate(
        {"id": "a", "created": 1, "model": "small", "choices": [{"delta": {"content": "re"}}]}
    )
    assert chunk.choices[0].finish_reason is None and chunk.object == "chat.completion.chunk"
    models = ModelList.model_validate({"data": [{"id": "small", "created": 1, "owned_by": "vistok"}]})
    assert models.model_dump()["object"] == "list"


def test_the_official_client_reads_our_answers() -> None:
    types = pytest.importorskip("openai.types.chat")
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 1,
        "total_tokens": 6,
        "visual_tokens": 16,
        "visual_tokens_kept": 4,
    }
    whole = ChatCompletion.model_validate(
        {
            "id": "a",
            "created": 1,
            "model": "small",
            "choices": [{"message": {"content": "red"}, "finish_reason": "length"}],
            "usage": usage,
        }
    )
    read = types.ChatCompletion.model_validate(whole.model_dump(), strict=True)
    assert read.choices[0].message.content == "red" and read.usage.visual_tokens_kept == 4

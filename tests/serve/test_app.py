"""The server over HTTP: the official client, refusals, clients that go away, and what a stranger must not get."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.served import Server, asked, serving
from tests.small import save_small_model
from vistok.serve.access import Access
from vistok.serve.batching import DeadlineExceeded
from vistok.serve.client import data_url, message
from vistok.serve.limits import Limits
from vistok.serve.media import MediaPolicy
from vistok.serve.service import Settings
from vistok.zoo.asking import ask

KEY, MODEL, TOKENS = "a-key-of-the-tests-0123456789", "vistok-tiny", 196
LIMITS = Limits(request_bytes=400_000, picture_bytes=200_000, picture_pixels=250_000, queue_length=4)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Settings(max_wait_ms=20, max_new_tokens=16, media=MediaPolicy(LIMITS))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def cases(server: Server) -> list[tuple[str, str, str]]:
    """Data URL of a picture, a question, and what the model answers when asked directly."""
    runner = server.service.served[MODEL].runner
    drawn = asked(6)
    said = ask(runner.model, runner.processor, [image for image, _ in drawn], [text for _, text in drawn])
    assert len(set(said)) > 2, "answers that were mixed up would not show"
    return [(data_url(image), text, answer) for (image, text), answer in zip(drawn, said, strict=True)]


@pytest.fixture
def endless(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers have no end of their own."""
    runner = server.service.served[MODEL].runner
    monkeypatch.setattr(runner.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(runner, "_ends", set())


def body(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": list(messages), **more}


def post(server: Server, value: Any, **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=value, timeout=60, **more)


def until(holds: Callable[[], bool], seconds: float) -> float:
    """How long it took until ``holds``."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, "it never came to that"
        time.sleep(0.002)
    return time.monotonic() - start


# The official client -------------------------------------------------------------------------------------------------


def test_answers_of_the_model_and_what_they_took(client: openai.OpenAI, cases: list[tuple[str, str, str]]) -> None:
    for url, text, known in cases[:3]:
        made = client.chat.completions.create(model=MODEL, messages=[message(text, url)])
        assert made.choices[0].message.content == known and made.choices[0].finish_reason == "stop"
        assert made.usage is not None and made.usage.total_tokens == (
            made.usage.prompt_tokens + made.usage.completion_tokens
        )
        assert made.usage.visual_tokens == made.usage.visual_tokens_kept == TOKENS


def test_a_stream_says_the_same(client: openai.OpenAI, cases: list[tuple[str, str, str]]) -> None:
    url, text, known = cases[0]
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=[message(text, url)], stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == known
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert not chunks[-1].choices and chunks[-1].usage is not None and chunks[-1].usage.visual_tokens == TOKENS
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_request_names_its_method(client: openai.OpenAI, cases: list[tuple[str, str, str]]) -> None:
    url, text, _ = cases[0]
    made = client.chat.completions.create(
        model=MODEL, messages=[message(text, url)], extra_body={"vistok": {"method": "holov", "keep": 0.25}}
    )
    assert made.usage is not None and made.usage.visual_tokens_kept == TOKENS // 4
    assert made.usage.prompt_tokens < TOKENS


def test_a_conversation_with_a_second_question(client: openai.OpenAI, cases: list[tuple[str, str, str]]) -> None:
    url, text, known = cases[0]
    turns = [message(text, url), {"role": "assistant", "content": known}, message(cases[1][1])]
    made = client.chat.completions.create(model=MODEL, messages=turns)
    assert made.choices[0].message.content and made.usage is not None and made.usage.visual_tokens == TOKENS


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such-model")


def test_a_folder_is_called_by_its_last_name(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "my-model")
    with serving(Settings(models=(str(folder),), max_new_tokens=2)) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "my-model"
        assert post(server, body(message("a")) | {"model": "my-model"}).status_code == 200
        refused = post(server, body(message("a")) | {"model": str(folder)})
        assert refused.status_code == 404 and str(tmp_path) not in refused.text


def test_curl(server: Server, cases: list[tuple[str, str, str]], tmp_path: Path) -> None:
    url, text, known = cases[0]
    file = tmp_path / "request.json"
    file.write_text(json.dumps(body(message(text, url))))
    command = ["curl", "-sS", "--fail", f"{server.url}/v1/chat/completions", "-d", f"@{file}"]
    done = subprocess.run([*command, "-H", "Content-Type: application/json"], capture_output=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == known


def test_many_clients_each_get_their_own_answer(client: openai.OpenAI, cases: list[tuple[str, str, str]]) -> None:
    def one(number: int) -> bool:
        url, text, known = cases[number % len(cases)]
        stream = number % 2 == 0
        made: Any = client.with_options(max_retries=20).chat.completions.create(
            model=MODEL, messages=[message(text, url)], stream=stream
        )
        if not stream:
            return made.choices[0].message.content == known
        return "".join(chunk.choices[0].delta.content or "" for chunk in made) == known

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(12)))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({"model": "no-such"}, 404, "model_not_found"),
        ({"messages": []}, 400, "invalid_request"),
        ({"n": 2}, 400, "unsupported_parameter"),
        ({"vistok": {"method": "no-such"}}, 400, "unknown_method"),
        ({"vistok": {"method": "evit"}}, 400, "unknown_method"),
        ({"vistok": {"method": "dmllm-redundancy"}}, 400, "unknown_method"),
        ({"vistok": {"method": "holov", "hyper": {"no_such": 1}}}, 400, "invalid_method"),
        ({"messages": [message("a", "https://example.com/a.png")]}, 403, "http_not_allowed"),
        ({"messages": [message("a", "file:///etc/passwd")]}, 403, "files_not_allowed"),
        ({"messages": [message("a", "data:image/png;base64,AAAA")]}, 400, None),
        ({"max_tokens": 1_000_000}, 400, "limit_exceeded"),
    ],
)
def test_refusals(
    server: Server, cases: list[tuple[str, str, str]], more: dict[str, Any], status: int, code: str | None
) -> None:
    answer = post(server, body(message(cases[0][1], cases[0][0])) | more)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error" and (code is None or error["code"] == code)


def test_what_is_no_request(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(url, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert httpx.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(url, json=[]).status_code == 400
    assert httpx.get(url).status_code == 405 and httpx.get(url).headers["allow"] == "POST"
    assert httpx.get(f"{server.url}/no/such").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{server.url}/docs").status_code == 404  # its page loads scripts from elsewhere


def test_a_body_that_is_too_long_is_not_read(server: Server) -> None:
    """Neither when it says so, nor when it comes in pieces without an end."""
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), 10) as peer:
        peer.sendall(head + b"Content-Length: 99999999999\r\n\r\n")
        assert b" 413 " in peer.recv(4096).split(b"\r\n")[0]
    sent = 0
    with socket.create_connection((host, int(port)), 10) as peer:
        peer.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            while sent < 100 * LIMITS.request_bytes:
                peer.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
                sent += 65_536
        except OSError:
            pass
    assert sent < 100 * LIMITS.request_bytes
    until(lambda: server.app.state.budget.held == 0, 5)


def test_a_header_that_is_too_long(server: Server) -> None:
    assert httpx.get(f"{server.url}/healthz", headers={"x-long": "a" * 100_000}).status_code == 431
    with suppress(httpx.ReadError):  # the connection may be closed before the client has sent it all
        assert httpx.get(f"{server.url}/healthz", headers={"x-long": "a" * 1_000_000}).status_code == 400


def test_errors_tell_nothing_of_the_machine(
    server: Server, cases: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise RuntimeError("secret at /home/somebody/secret.txt")

    monkeypatch.setattr(server.service.served[MODEL].runner, "_generate", broken)
    for stream in (False, True):
        answer = post(server, body(message(cases[0][1], cases[0][0]), stream=stream))
        assert answer.status_code == 500 and "secret" not in answer.text
        assert answer.json()["error"]["type"] == "server_error"


# The queue, deadlines, clients that go away --------------------------------------------------------------------------


def test_a_full_queue_says_when_to_try_again(server: Server, cases: list[tuple[str, str, str]], endless: None) -> None:
    url, text, _ = cases[0]
    value = body(message(text, url), max_tokens=60)
    with ThreadPoolExecutor(24) as pool:
        # Different counts of tokens are different batches: the queue of 4 is full at once.
        answers = list(
            pool.map(lambda keep: post(server, value | {"vistok": {"method": "random", "keep": keep}}), range(5, 25))
        )
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert {answer.status_code for answer in answers} == {200, 429}


@pytest.mark.parametrize("stream", [False, True])
def test_the_place_of_a_client_that_went_away_is_free_within_200_ms(
    server: Server, cases: list[tuple[str, str, str]], endless: None, stream: bool
) -> None:
    batcher = server.service.served[MODEL].batcher
    until(lambda: batcher.running == 0, 10)
    host, port = server.url.removeprefix("http://").split(":")
    text = json.dumps(body(message(cases[0][1], cases[0][0]), max_tokens=1000, stream=stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n"
    with socket.create_connection((host, int(port)), 10) as peer:
        peer.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + text)
        until(lambda: batcher.running > 0, 10)
        if stream:
            assert peer.recv(10)
    assert until(lambda: batcher.running == 0, 5) < 0.2
    until(lambda: server.app.state.budget.held == 0, 1)


def test_a_deadline_covers_the_body(cases: list[tuple[str, str, str]], endless: None) -> None:
    limits = Limits(deadline_seconds=1.0)
    with serving(Settings(media=MediaPolicy(limits))) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 10) as peer:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
            peer.sendall(head + b"Content-Type: application/json\r\n\r\n{")  # and then nothing
            assert b" 504 " in peer.recv(4096).split(b"\r\n")[0]


def test_an_answer_that_takes_too_long(
    server: Server, cases: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*given: Any, **more: Any) -> Any:
        raise DeadlineExceeded

    monkeypatch.setattr(server.service.served[MODEL].batcher, "submit", late)
    answer = post(server, body(message(cases[0][1], cases[0][0])))
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"


def test_the_end_waits_for_what_runs(cases: list[tuple[str, str, str]]) -> None:
    url, text, known = cases[0]
    with serving() as server, ThreadPoolExecutor(1) as pool:
        batcher = server.service.served[MODEL].batcher
        answer = pool.submit(post, server, body(message(text, url)))
        until(lambda: batcher.running > 0, 10)
        server.stop()
        assert answer.result().json()["choices"][0]["message"]["content"] == known
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/healthz")


# Who may ask ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    access = Access((KEY, KEY[::-1]), (), ("https://page.example",))
    settings = Settings(method="holov", keep=0.25, methods=("fastervlm", "random"), max_keep=0.5)
    with serving(settings, access) as running:
        yield running


def test_a_key_is_needed(locked: Server, cases: list[tuple[str, str, str]]) -> None:
    for given in (
        {},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": KEY},
        {"authorization": "Basic " + KEY},
    ):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/no/such"):
            answer = httpx.get(f"{locked.url}{path}", headers=given)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert post(locked, body(message("a")), headers=given).status_code == 401
    assert httpx.get(f"{locked.url}/healthz").status_code == httpx.get(f"{locked.url}/readyz").status_code == 200
    for key in (KEY, KEY[::-1]):
        client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key)
        assert client.chat.completions.create(model=MODEL, messages=[message(cases[0][1], cases[0][0])])


def test_defaults_and_bounds_of_the_server(locked: Server, cases: list[tuple[str, str, str]]) -> None:
    def asking(**vistok: Any) -> httpx.Response:
        value = body(message(cases[0][1], cases[0][0]), vistok=vistok)
        return post(locked, value, headers={"authorization": f"Bearer {KEY}"})

    def kept(**vistok: Any) -> int:
        return asking(**vistok).json()["usage"]["visual_tokens_kept"]

    assert kept() == kept(method="holov") == TOKENS // 4
    assert kept(method="random", keep=0.5) == kept(keep=0.5) == TOKENS // 2
    for wrong, code in (
        ({"method": "dense"}, "unknown_method"),
        ({"method": "fastv"}, "unknown_method"),
        ({"keep": 0.6}, "limit_exceeded"),
        ({"keep": 10}, "limit_exceeded"),
    ):
        answer = asking(**wrong)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == code


def test_pages_of_the_web_read_nothing_unless_they_are_named(locked: Server, server: Server) -> None:
    def preflight(at: Server, origin: str) -> httpx.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return httpx.options(f"{at.url}/v1/chat/completions", headers=headers)

    named = preflight(locked, "https://page.example")
    assert named.status_code == 200 and named.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-credentials" not in named.headers
    for at, origin in ((locked, "https://other.example"), (server, "https://page.example"), (server, "null")):
        assert "access-control-allow-origin" not in preflight(at, origin).headers


def test_a_name_that_was_pointed_at_this_machine_gets_nothing() -> None:
    access = Access(hosts=("localhost", "127.0.0.1", "[::1]"))
    with serving(access=access) as server:
        port = server.url.rpartition(":")[2]
        for host, status in (("evil.example", 421), (f"evil.example:{port}", 421), (f"LOCALHOST:{port}", 200)):
            assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    "given", [{"api_keys": ("short",)}, {"api_keys": ("with a space in it",)}, {"origins": ("*",)}]
)
def test_access_that_cannot_be_meant(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))) as error:
        Access(**given)
    assert "with a space" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"models": ()},
        {"models": (MODEL, MODEL)},
        {"method": "evit"},
        {"methods": ("no-such",)},
        {"max_keep": 0.0},
        {"max_new_tokens": 0},
        {"method": "holov", "keep": 0.5, "max_keep": 0.25},
    ],
)
def test_settings_that_cannot_be_meant(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        Settings(**given)


# Figures -------------------------------------------------------------------------------------------------------------


def test_metrics(cases: list[tuple[str, str, str]]) -> None:
    with serving() as server:
        url, text, _ = cases[0]
        for vistok in ({}, {"method": "holov", "keep": 0.25}, {"method": "holov", "keep": 0.25}):
            assert post(server, body(message(text, url), vistok=vistok)).status_code == 200
        post(server, [])
        read = httpx.get(f"{server.url}/metrics")
        assert read.headers["content-type"].startswith("text/plain")
        samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(read.text)
            for sample in family.samples
        }
    holov, dense = (("method", name) for name in ("holov", "dense"))
    model = ("model", MODEL)
    assert samples["vistok_requests_total", ("status", "200")] == 3
    assert samples["vistok_requests_total", ("status", "400")] == 1
    assert samples["vistok_visual_tokens_total", holov, model] == 2 * TOKENS
    assert samples["vistok_visual_tokens_kept_total", holov, model] == 2 * (TOKENS // 4)
    assert samples["vistok_visual_tokens_kept_total", dense, model] == TOKENS
    assert samples["vistok_time_to_first_token_seconds_count", holov, model] == 2
    assert samples["vistok_jobs_total", holov, model, ("outcome", "done")] == 2
    # The first request did not ask for the evidence that the second one needs.
    assert samples["vistok_encoder_cache_misses_total", model] == 2
    assert samples["vistok_encoder_cache_hits_total", model] == 1
    assert samples["vistok_queue_length", model] == samples["vistok_running", model] == 0

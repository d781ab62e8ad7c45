"""Two replicas on Ray Serve, on this machine: right answers, streams, errors, and clients that go away."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.served import asked
from tests.small import save_small_model
from vistok.serve.access import Access
from vistok.serve.client import data_url, message
from vistok.serve.limits import Limits
from vistok.serve.media import MediaPolicy
from vistok.serve.replicas import Replicas, deployment
from vistok.serve.service import Settings
from vistok.zoo import load, load_processor
from vistok.zoo.asking import ask

MODEL, KEY = "vistok-tiny", "a-key-of-the-tests-0123456789"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers do not end by themselves, and have room for thousands of tokens."""
    folder = save_small_model(tmp_path_factory.mktemp("model"))
    for name, changes in (("config.json", {"max_position_embeddings": 8192}), ("generation_config.json", {})):
        file = folder / name
        value = json.loads(file.read_text())
        (value["text_config"] if changes else value).update(changes or {"eos_token_id": None})
        file.write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def url(slow_model: Path) -> Iterator[str]:
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'vistok[ray]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = Limits(request_bytes=400_000, picture_bytes=200_000)
    settings = Settings(models=(MODEL, str(slow_model)), max_wait_ms=20, media=MediaPolicy(limits))
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}}
    alone = not ray.is_initialized()  # the tests of the engine may have left theirs running in this process
    if alone:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployment(settings, Access((KEY,)), Replicas(2, 2), grace_s=5), name="vistok", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        if alone:
            ray.shutdown()


def running(url: str) -> set[str]:
    """What the replicas say of how many places are taken; asked often, so that each is heard."""
    pages = [httpx.get(f"{url}/metrics", headers=HEADERS).text for _ in range(12)]
    return {line for page in pages for line in page.splitlines() if line.startswith("vistok_running")}


def test_each_client_gets_its_own_answer(url: str) -> None:
    drawn = asked(6)
    known = ask(load(MODEL), load_processor(MODEL), [image for image, _ in drawn], [text for _, text in drawn])
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)

    def one(number: int) -> str:
        image, text = drawn[number % 6]
        turns: Any = [message(text, data_url(image))]
        if number % 2:
            return str(client.chat.completions.create(model=MODEL, messages=turns).choices[0].message.content)
        chunks = client.chat.completions.create(model=MODEL, messages=turns, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(18))) == known * 3


def test_refusals_pass_through(url: str) -> None:
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
    value = {"model": "no-such", "messages": [message("a")]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=value, headers=HEADERS)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    answer = httpx.post(f"{url}/v1/chat/completions", json={"a": "b" * 500_000}, headers=HEADERS)
    assert answer.status_code == 413


def test_the_place_of_a_client_that_went_away_is_free_again(url: str, slow_model: Path) -> None:
    value = {"model": slow_model.name, "messages": [message("a")], "max_tokens": 4000}
    text = json.dumps(value).encode()
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    with socket.create_connection((host, int(port)), 10) as peer:
        peer.sendall(head.encode() + text)
        wait_until(lambda: any(line.endswith(" 1.0") for line in running(url)), 30)
    wait_until(lambda: all(line.endswith(" 0.0") for line in running(url)), 20)


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it never came to that"


@pytest.mark.parametrize(("text", "least", "most"), [("2", 2, 2), ("1..4", 1, 4)])
def test_how_many(text: str, least: int, most: int) -> None:
    replicas = Replicas.parse(text)
    assert (replicas.least, replicas.most) == (least, most)
    assert ("autoscaling_config" in replicas.options) == (most > least)


@pytest.mark.parametrize("text", ["", "0", "4..1", "a", "-1", "1..", "0..2"])
def test_how_many_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match="replicas"):
        Replicas.parse(text)

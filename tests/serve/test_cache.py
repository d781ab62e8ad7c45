"""The encoder cache behind the real runner: no picture is encoded twice, and no answer changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vistok.host.hooks import Hooks
from vistok.host.hosts import host_of
from vistok.host.reuse import Encoded
from vistok.serve.batching import Batcher, End
from vistok.serve.cache import CacheStats, FeatureCache
from vistok.serve.media import digest
from vistok.serve.runner import Ask, Runner, Shown
from vistok.world import sample
from vistok.zoo import load, load_processor

MODELS = "vistok-tiny", "vistok-tiny-qwen"
PLENTY = 2**30
QUESTIONS = "describe the picture .", "how many shapes are there ?"


@cache
def parts(name: str) -> tuple[Any, Any]:
    return load(name), load_processor(name)


@cache
def images(count: int = 6) -> list[Image.Image]:
    return [Image.fromarray(one.image) for one in sample("scenes", count, seed=7, size=112, split="test")]


class Cached:
    """A runner with a cache, and how many pictures its encoder has ``encoded``: batch by batch."""

    def __init__(self, name: str = "vistok-tiny", max_bytes: int = PLENTY) -> None:
        model, processor = parts(name)
        self.cache = FeatureCache(model, max_bytes)
        self.runner = Runner(model, processor, around=self.cache.around)
        self.blocks = host_of(model).blocks
        self.model = model

    def ask(self, *asks: Ask) -> list[str]:
        """The answers, of one batch; ``encoded`` is how often the encoder ran for it."""
        with counted(self.blocks[0]) as runs:
            answers = run(self.runner, asks)
        self.encoded = len(runs)
        return answers


@contextmanager
def counted(module: Any) -> Iterator[list[int]]:
    runs: list[int] = []
    hooks = Hooks()
    hooks.before(module, lambda m, a, k: runs.append(len(a[0] if a else k["hidden_states"])))
    try:
        yield runs
    finally:
        hooks.remove()


def run(runner: Runner, asks: Sequence[Ask]) -> list[str]:
    events: list[list[Any]] = [[] for _ in asks]
    runner(asks, lambda row, event: events[row].append(event), lambda row: False)
    assert all(isinstance(one[-1], End) for one in events), events
    return ["".join(event.text for event in one[:-1]) for one in events]


def ask(shown: Sequence[Image.Image], text: str = QUESTIONS[0], **more: Any) -> Ask:
    content = [*({"type": "image"} for _ in shown), {"type": "text", "text": text}]
    pictures = tuple(Shown(image, digest(image)) for image in shown)
    return Ask([{"role": "user", "content": content}], pictures, **({"max_new_tokens": 12} | more))


@cache
def plain(name: str) -> Runner:
    return Runner(*parts(name))


# Behind the runner ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "fastervlm", "fastv"])
@pytest.mark.parametrize("name", MODELS)
def test_a_second_question_does_not_run_the_encoder(name: str, method: str | None) -> None:
    cached, image = Cached(name), images()[0]
    asks = [ask([image], text, method=method, keep=method and 0.5) for text in QUESTIONS]
    known = [run(plain(name), [one])[0] for one in asks]
    assert [cached.ask(asks[0])[0], cached.encoded] == [known[0], 1]
    # The file may be another one: its pixels are the same.
    again = ask([image.copy()], QUESTIONS[1], method=method, keep=method and 0.5)
    assert [cached.ask(again)[0], cached.encoded] == [known[1], 0]
    stats = cached.cache.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.evictions) == (1, 1, 1, 0) and stats.bytes > 0
    other = ask([images()[1]], QUESTIONS[1], method=method, keep=method and 0.5)
    cached.ask(other)
    assert cached.encoded == 1 and cached.cache.stats().entries == 2


@pytest.mark.parametrize("name", MODELS)
def test_methods_share_it(name: str) -> None:
    """A picture is encoded again only for evidence that nobody has asked for before, and that stays then."""
    cached, image = Cached(name), images()[0]
    runs = []
    for method in (None, "fastv", "divprune", "fastervlm", "fastervlm", "prumerge", "prumerge", None, "fastervlm"):
        one = ask([image], method=method, keep=method and 0.25)
        assert cached.ask(one) == run(plain(name), [one])
        runs.append(cached.encoded)
    assert runs == [1, 0, 0, 1, 0, 1, 0, 0, 0]
    assert cached.cache.stats().entries == 1
    assert (cached.cache.stats().hits, cached.cache.stats().misses) == (6, 3)


@pytest.mark.parametrize("method", [None, "fastervlm"])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_known_pictures_and_others(name: str, method: str | None) -> None:
    cached, shown = Cached(name), images()
    asks = [ask(some, method=method, keep=method and 0.5) for some in (shown[:1], shown[1:3], shown[3:4], shown[:1])]
    known = run(plain(name), asks)
    cached.ask(asks[1])
    host = host_of(cached.model)
    with counted(host.blocks[0]) as seen:
        assert cached.ask(*asks) == known
        assert cached.encoded == 1
    with counted(host.blocks[0]) as all_of_them:
        run(plain(name), asks)
    assert seen[0] * 5 == all_of_them[0] * 2  # the first and the last row show one picture
    assert cached.ask(*asks) == known and cached.encoded == 0
    assert cached.cache.stats().entries == 4


def test_turns_of_a_conversation() -> None:
    cached, image = Cached(), images()[2]
    first = ask([image])
    (answer,) = cached.ask(first)
    turn = [
        *first.messages,
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTIONS[1]}]},
    ]
    later = Ask(turn, first.pictures, 12)
    assert cached.ask(later) == run(plain("vistok-tiny"), [later]) and cached.encoded == 0
    two = Ask([*turn, {"role": "user", "content": [{"type": "image"}]}], (*first.pictures, *ask(images()[:1]).pictures))
    cached.ask(two)
    assert cached.encoded == 1 and cached.cache.stats().entries == 2


def test_questions_without_a_picture() -> None:
    cached = Cached()
    assert cached.ask(ask([])) == run(plain("vistok-tiny"), [ask([])])
    assert cached.cache.stats() == CacheStats(0, 0, 0, 0, 0)


def test_a_method_inside_the_encoder_has_its_own_encoder() -> None:
    cached, image = Cached(), images()[0]
    cached.ask(ask([image]))
    before = cached.cache.stats()
    inside = ask([image], method="pitome@encoder")
    for _ in range(2):
        assert cached.ask(inside) == run(plain("vistok-tiny"), [inside]) and cached.encoded == 1
    assert cached.cache.stats() == before


def test_clients_of_a_batcher() -> None:
    cached, shown = Cached(), images()
    asks = [ask([image], text) for image in shown[:3] for text in QUESTIONS]
    known = [run(plain("vistok-tiny"), [one])[0] for one in asks]

    async def client(batcher: Batcher[Ask], one: Ask) -> str:
        async with batcher.submit(one, one.key, deadline_s=60) as job:
            return "".join([event.text async for event in job if not isinstance(event, End)])

    async def scenario() -> list[str]:
        batcher = Batcher(cached.runner, max_batch=2, max_wait_ms=5)
        answers = await asyncio.gather(*(client(batcher, one) for one in asks))
        assert await batcher.close()
        return answers

    with counted(cached.blocks[0]) as runs:
        assert asyncio.run(scenario()) == known
    assert sum(runs) == 3  # sequences that entered the encoder: a picture each


def test_a_cancelled_batch_and_one_that_breaks() -> None:
    cached, (one, two, *_) = Cached(), images()
    endless = [ask([image], max_new_tokens=40) for image in (one, two)]
    cached.runner(endless, lambda row, event: None, lambda row: cached.cache.stats().entries == 2)  # at once
    assert cached.cache.stats().entries == 2

    def breaks(row: int, event: Any) -> None:
        raise RuntimeError("in the middle")

    fresh = Cached()
    with pytest.raises(RuntimeError, match="in the middle"):
        fresh.runner(endless, breaks, lambda row: False)
    hooks = Hooks()
    hooks.after(fresh.blocks[1], lambda *_: breaks(0, None))
    third = ask([images()[2]])
    with pytest.raises(RuntimeError, match="in the middle"):
        fresh.runner([third], lambda row, event: None, lambda row: False)
    hooks.remove()
    assert fresh.cache.stats().entries == 2  # what was encoded is right, what was not is not there
    for some in (cached, fresh):
        asks = [ask([one]), ask([two])]
        assert some.ask(*asks) == run(plain("vistok-tiny"), asks) and some.encoded == 0
    assert fresh.ask(third) == run(plain("vistok-tiny"), [third]) and fresh.encoded == 1


def test_the_picture_that_was_used_least_lately_goes() -> None:
    cached, (a, b, c, *_) = Cached(), images()
    cached.ask(ask([a]))
    size = cached.cache.stats().bytes
    small = Cached(max_bytes=2 * size)
    runs = []
    for image in (a, b, a, c, a, b):  # b goes for c, then c for b
        small.ask(ask([image]))
        runs.append(small.encoded)
    assert runs == [1, 1, 0, 1, 0, 1]
    assert small.cache.stats() == CacheStats(hits=2, misses=4, evictions=2, entries=2, bytes=2 * size)


@pytest.mark.parametrize("max_bytes", [0, 1])
def test_no_room(max_bytes: int) -> None:
    cached, one = Cached(max_bytes=max_bytes), ask(images()[:1])
    for _ in range(2):
        assert cached.ask(one) == run(plain("vistok-tiny"), [one]) and cached.encoded == 1
    assert cached.cache.stats() == CacheStats(0, 2 * max_bytes, 0, 0, 0)
    with pytest.raises(ValueError, match="max_bytes: got -1"):
        FeatureCache(cached.model, -1)


# Its book-keeping ----------------------------------------------------------------------------------------------------

NAMES = "keys", "states"
STEPS = st.tuples(st.booleans(), st.sampled_from("abcd"), st.integers(1, 6), st.sets(st.sampled_from(NAMES)))


def made(size: int, names: set[str]) -> Encoded:
    """An entry of ``size`` bytes, and as many again for each field."""
    return Encoded(torch.zeros(size, dtype=torch.uint8), fields={(n, 1): torch.ones(size).byte() for n in names})


@given(st.lists(STEPS, max_size=30))
def test_against_a_list_that_is_searched(steps: list[tuple[bool, str, int, set[str]]]) -> None:
    """(key, size, {field: size}) from the one that goes next to the one that was used last."""
    cache_, most = FeatureCache(torch.nn.Identity(), 12), 12
    kept: list[tuple[str, int, dict[str, int]]] = []
    hits = misses = evictions = 0
    weigh = lambda one: one[1] + sum(one[2].values())  # noqa: E731
    for put, key, size, names in steps:
        mine = next((one for one in kept if one[0] == key), None)
        if not put:
            found = cache_.get(key, {(name, 1) for name in names})
            if mine is None or not names <= mine[2].keys():
                misses += 1
                assert found is None
                continue
            hits += 1
            assert found is not None and len(found.features) == mine[1]
            assert {name: len(value) for (name, _), value in found.fields.items()} == mine[2]
            kept.remove(mine)
            kept.append(mine)
            continue
        cache_.put(key, made(size, names))
        new = (key, size, dict.fromkeys(names, size))
        if mine is not None:
            kept.remove(mine)
            merged = (key, size, mine[2] | new[2])
            new = merged if weigh(merged) <= most else new
        if weigh(new) <= most:
            while sum(map(weigh, kept)) + weigh(new) > most:
                kept.pop(0)
                evictions += 1
            kept.append(new)
        expected = CacheStats(hits, misses, evictions, len(kept), sum(map(weigh, kept)))
        assert cache_.stats() == expected


def test_figures_can_be_asked_for_from_other_threads() -> None:
    cache_, over = FeatureCache(torch.nn.Identity(), 100), threading.Event()
    seen: list[CacheStats] = []

    def watch() -> None:
        while not over.is_set():
            seen.append(cache_.stats())

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for one in watchers:
        one.start()
    for number in range(3_000):
        cache_.put(number % 17, made(10, set()))
        cache_.get(number % 5, ())
    over.set()
    for one in watchers:
        one.join()
    assert all(stats.bytes == 10 * stats.entries <= 100 for stats in seen) and len(seen) > 2
    assert cache_.stats().hits + cache_.stats().misses == 3_000

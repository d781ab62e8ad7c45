"""The real runner on the shipped small model: the answers of ``ask``, piece by piece, each to its own client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.small import save_small_model
from vistok.host import UnsupportedModel, apply
from vistok.serve.answer import Answer, Detokenizer
from vistok.serve.batching import Batcher, End, Failed
from vistok.serve.errors import RequestError
from vistok.serve.runner import Ask, Finish, Runner, Shown, Text
from vistok.serve.sampling import Draw
from vistok.serve.schema import Sampling
from vistok.world import sample
from vistok.zoo import load, load_processor
from vistok.zoo.asking import ask as ask_in_batches

TOKENS = 196


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(load("vistok-tiny"), load_processor("vistok-tiny"))


@pytest.fixture
def endless(runner: Runner) -> Iterator[Runner]:
    """The same, but its answers have no end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.model.generation_config, "eos_token_id", None)
        yield Runner(runner.model, runner.processor)


@pytest.fixture(scope="module")
def asked() -> list[tuple[Image.Image, str, str]]:
    """Pictures with a question and its right answer each."""
    return [
        (Image.fromarray(picture.image), question.text, question.answer)
        for picture in sample("scenes", 6, seed=5, size=112, split="test")
        for question in picture.questions[:1]
    ]


def request(image: Image.Image | None, text: str, **more: Any) -> Ask:
    pictures = () if image is None else (Shown(image, f"hash of {id(image)}"),)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    return Ask([{"role": "user", "content": content}], pictures, **({"max_new_tokens": 16} | more))


def run(runner: Runner, asks: Sequence[Ask], cancelled: Callable[[int], bool] = lambda row: False) -> list[list[Any]]:
    events: list[list[Any]] = [[] for _ in asks]
    runner(asks, lambda row, event: events[row].append(event), cancelled)
    return events


def said(events: Sequence[Any]) -> str:
    assert all(isinstance(event, Text) and event.text for event in events[:-1])
    return "".join(event.text for event in events[:-1])


def finish(events: Sequence[Any]) -> Finish:
    assert isinstance(events[-1], End) and isinstance(events[-1].result, Finish)
    return events[-1].result


def refusal(events: Sequence[Any]) -> RequestError:
    (event,) = events
    assert isinstance(event, Failed) and isinstance(event.error, RequestError)
    return event.error


# The real model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "fastervlm"])
def test_the_answers_of_ask_and_what_they_took(
    runner: Runner, asked: list[tuple[Image.Image, str, str]], method: str | None
) -> None:
    images, questions = [one[0] for one in asked], [one[1] for one in asked]
    keep = None if method is None else 0.25
    with apply(runner.model, method or "fastervlm", keep=keep or 1.0):
        known = ask_in_batches(runner.model, runner.processor, images, questions)
    got = run(runner, [request(*one[:2], method=method, keep=keep) for one in asked])
    assert [said(events) for events in got] == known
    assert len(set(known)) > 2, "answers that were mixed up would not show"
    for events, text in zip(got, known, strict=True):
        end = finish(events)
        ids = runner.processor.tokenizer(text, add_special_tokens=False).input_ids
        assert end.reason == "stop" and end.completion_tokens == len(ids) + 1
        assert (end.visual_tokens, end.visual_tokens_kept) == (TOKENS, TOKENS if method is None else TOKENS // 4)
        assert end.prompt_tokens > TOKENS


def test_pictures_of_different_sizes(asked: list[tuple[Image.Image, str, str]]) -> None:
    """A model whose pictures have as many tokens as their size asks for: each row counts its own."""
    model, processor = load("vistok-tiny-qwen"), load_processor("vistok-tiny-qwen")
    images = [one[0].resize((side, side)) for one, side in zip(asked, (112, 140, 168), strict=False)]
    questions = [one[1] for one in asked[:3]]
    with apply(model, "fastervlm", keep=0.25):
        known = ask_in_batches(model, processor, images, questions)
    asks = [request(*one, method="fastervlm", keep=0.25) for one in zip(images, questions, strict=True)]
    got = run(Runner(model, processor), asks)
    assert [said(events) for events in got] == known
    counts = [(finish(events).visual_tokens, finish(events).visual_tokens_kept) for events in got]
    grids = processor.image_processor(images, return_tensors="pt")["image_grid_thw"].prod(1) // 4
    assert counts == [(n, round(n / 4)) for n in grids.tolist()] and len(set(counts)) == 3


def test_a_staged_method_counts_the_mean_over_its_layers(
    runner: Runner, asked: list[tuple[Image.Image, str, str]]
) -> None:
    (events,) = run(runner, [request(*asked[0][:2], method="fastv", keep=0.5)])
    assert 0 < abs(finish(events).visual_tokens_kept - TOKENS) and finish(events).visual_tokens == TOKENS
    assert finish(events).visual_tokens_kept == pytest.approx(TOKENS / 2, abs=2)


def test_through_a_batcher_each_client_gets_its_own_answer(
    runner: Runner, asked: list[tuple[Image.Image, str, str]]
) -> None:
    known = ask_in_batches(runner.model, runner.processor, [one[0] for one in asked], [one[1] for one in asked])

    async def client(batcher: Batcher[Ask], ask: Ask) -> str:
        async with batcher.submit(ask, ask.key, deadline_s=60) as job:
            return said([event async for event in job])

    async def scenario() -> list[str]:
        batcher = Batcher(runner, max_batch=4, max_wait_ms=20)
        answers = await asyncio.gather(*(client(batcher, request(*one[:2])) for one in asked))
        assert await batcher.close()
        return answers

    assert asyncio.run(scenario()) == known


def test_rows_of_a_batch_end_each_by_their_own_rule(runner: Runner, asked: list[tuple[Image.Image, str, str]]) -> None:
    image = asked[0][0]
    whole = said(run(runner, [request(image, "describe the picture .")])[0])
    word = whole.split()[2]
    got = run(
        runner,
        [
            request(image, "describe the picture ."),
            request(image, "describe the picture .", max_new_tokens=2),
            request(image, "describe the picture .", stop=(word,)),
            request(image, "describe the picture ."),
        ],
        lambda row: row == 3,
    )
    assert said(got[0]) == whole and finish(got[0]).reason == "stop"
    assert said(got[1]) == " ".join(whole.split()[:2])
    assert (finish(got[1]).reason, finish(got[1]).completion_tokens) == ("length", 2)
    assert said(got[2]) == whole[: whole.index(word)].strip() and finish(got[2]).reason == "stop"
    assert got[3] == []


def test_a_cancelled_row_ends_at_the_next_token(endless: Runner, asked: list[tuple[Image.Image, str, str]]) -> None:
    events: list[list[Any]] = [[], []]
    asks = [request(*one[:2], max_new_tokens=40) for one in asked[:2]]
    endless(asks, lambda row, event: events[row].append(event), lambda row: row == 0 and len(events[row]) >= 3)
    assert len(events[0]) == 3 and all(isinstance(event, Text) for event in events[0])
    assert (finish(events[1]).reason, finish(events[1]).completion_tokens) == ("length", 40)


def test_the_place_of_a_client_that_leaves_is_free_within_200_ms(
    endless: Runner, asked: list[tuple[Image.Image, str, str]]
) -> None:
    async def scenario() -> float:
        batcher = Batcher(endless, max_wait_ms=0)
        ask = request(asked[0][0], "describe the picture .", max_new_tokens=800)
        async with batcher.submit(ask, ask.key, deadline_s=60) as job:
            await anext(job)
            assert batcher.running == 1
        start = time.monotonic()
        while batcher.running:
            await asyncio.sleep(0.002)
        spent = time.monotonic() - start
        await batcher.close()
        return spent

    assert asyncio.run(scenario()) < 0.2


def test_without_a_picture(runner: Runner) -> None:
    ask = request(None, "is there a red star ?", method="fastervlm", keep=4)
    ((*_, end),) = run(runner, [ask])
    assert end.result.visual_tokens == end.result.visual_tokens_kept == 0
    assert ask.key != request(Image.new("RGB", (8, 8)), "", method="fastervlm", keep=4).key


@pytest.mark.parametrize(
    "text", ["<image>", "<IMAGE>", "no </s> more", "a <assistant> yes", "<user>", "half a pair \ud800"]
)
def test_a_text_that_would_act_is_refused_and_harms_nobody_else(
    runner: Runner, asked: list[tuple[Image.Image, str, str]], text: str
) -> None:
    """The template writes the user's words in small letters, so capitals can become a control token."""
    image, question, _ = asked[1]
    (known,) = run(runner, [request(image, question)])
    bad, good = run(runner, [request(asked[0][0], text), request(image, question)])
    assert (refusal(bad).status, refusal(bad).code, refusal(bad).param) == (400, "invalid_text", "messages")
    assert text not in str(refusal(bad)) and good == known


def test_control_tokens_in_two_parts(runner: Runner) -> None:
    """As with templates that put nothing between the parts of a message."""
    parts = [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]
    template = runner.processor.chat_template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.processor, "chat_template", template.replace("%} {{ part.text", "%}{{ part.text"))
        with pytest.raises(RequestError):
            runner.prompt(Ask([{"role": "user", "content": parts}]))
    assert "<ima ge>" in runner.prompt(Ask([{"role": "user", "content": parts}]))


def test_what_the_template_does_not_take(runner: Runner) -> None:
    ask = request(Image.new("RGB", (8, 8)), "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.processor, "chat_template", "{{ raise_exception('roles must alternate') }}")
        with pytest.raises(RequestError, match="roles") as error:
            runner.prompt(ask)
        assert error.value.code == "invalid_messages"
        patch.setattr(runner.processor, "chat_template", "{{ messages[0].content[1].text }}")
        with pytest.raises(RequestError, match="pictures"):
            runner.prompt(ask)


def test_a_prompt_that_is_too_long(runner: Runner, asked: list[tuple[Image.Image, str, str]]) -> None:
    image, question, _ = asked[0]
    (known,) = run(runner, [request(image, question)])
    long, good = run(runner, [request(image, "red " * runner.context), request(image, question)])
    assert refusal(long).code == "context_length_exceeded" and str(runner.context) in str(refusal(long))
    assert good == known


def test_an_answer_ends_where_the_model_does(runner: Runner) -> None:
    ask = request(None, "red " * (runner.context - 10), max_new_tokens=50)
    (events,) = run(runner, [ask])
    end = finish(events)
    assert end.prompt_tokens + end.completion_tokens <= runner.context and end.completion_tokens < 10


@pytest.mark.parametrize(
    ("wrong", "param", "says"),
    [
        ({"method": "no-such-method"}, "vistok", "no-such-method"),
        ({"method": "fastervlm", "keep": 2.0}, "vistok", "keep: got 2.0"),
        ({"method": "fastervlm", "hyper": {"no_such": 1}}, "vistok", "no_such"),
        ({"method": "fastervlm", "hyper": {"model": 1}}, "vistok.hyper", "not what the method takes"),
        ({"method": "fastervlm", "keep": TOKENS + 1}, "vistok.keep", str(TOKENS)),
    ],
)
def test_a_method_that_cannot_be(
    runner: Runner, asked: list[tuple[Image.Image, str, str]], wrong: dict[str, Any], param: str, says: str
) -> None:
    async def scenario() -> list[RequestError]:
        batcher = Batcher(runner, max_batch=2, max_wait_ms=1000)
        asks = [request(*one[:2], **wrong) for one in asked[:2]]
        jobs = [batcher.submit(ask, ask.key, deadline_s=60) for ask in asks]
        errors = []
        for job in jobs:
            with pytest.raises(RequestError) as error:
                await anext(job)
            errors.append(error.value)
        await batcher.close()
        return errors

    for error in asyncio.run(scenario()):
        assert (error.status, error.code, error.param) == (400, "invalid_method", param) and says in error.message


def test_one_token_is_not_all_of_them() -> None:
    """1 == 1.0 == True in Python: such requests must not share a batch."""
    keys = {request(None, "x", method="fastv", keep=keep, hyper={"layer": layer}).key
            for keep in (1, 1.0) for layer in (1, 1.0, True)}  # fmt: skip
    assert len(keys) == 6
    one, two = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert request(None, "x", hyper=one).key == request(None, "y", hyper=two).key


def test_different_keys_are_no_batch(runner: Runner) -> None:
    with pytest.raises(ValueError, match="asks"):
        run(runner, [request(None, "x"), request(None, "x", method="fastervlm")])


def test_a_cache_can_be_put_around_a_batch(runner: Runner, asked: list[tuple[Image.Image, str, str]]) -> None:
    """It is entered for each batch with the rows that run, when the method is in the model, and left before it goes."""
    seen: list[Any] = []
    tower = runner.model.model.vision_tower
    plain = len(tower._forward_pre_hooks)

    @contextmanager
    def around(asks: Sequence[Ask], inputs: Mapping[str, Any]) -> Iterator[None]:
        seen.append([shown.digest for ask in asks for shown in ask.pictures])
        assert len(inputs["input_ids"]) == len(asks)
        assert len(tower._forward_pre_hooks) > plain
        yield
        seen.append("left")
        assert len(tower._forward_pre_hooks) > plain

    asks = [request(*one[:2], method="fastervlm", max_new_tokens=1) for one in asked[:3]]
    run(Runner(runner.model, runner.processor, around=around), asks, lambda row: row == 1)
    assert seen == [[asks[0].pictures[0].digest, asks[2].pictures[0].digest], "left"]
    assert len(tower._forward_pre_hooks) == plain


def test_the_method_is_gone_when_a_batch_fails(runner: Runner, asked: list[tuple[Image.Image, str, str]]) -> None:
    def breaks(row: int, event: Any) -> None:
        raise RuntimeError("in the middle")

    ask = request(*asked[0][:2], method="fastervlm")
    with pytest.raises(RuntimeError, match="in the middle"):
        runner([ask], breaks, lambda row: False)
    assert finish(run(runner, [ask])[0]).visual_tokens_kept == TOKENS // 4


def test_a_seed_gives_the_same_draws_in_any_company(runner: Runner, asked: list[tuple[Image.Image, str, str]]) -> None:
    hot = replace(request(asked[0][0], "describe the picture ."), sampling=Sampling(2.0, 1.0, 7))
    others = [replace(hot, sampling=Sampling(2.0, 1.0, seed)) for seed in range(8, 14)]
    cold = request(asked[0][0], "describe the picture .")
    assert hot.key == cold.key
    alone, colder = said(run(runner, [hot])[0]), said(run(runner, [cold])[0])
    together = [said(events) for events in run(runner, [cold, *others, hot])]
    assert together[-1] == alone and together[0] == colder
    assert len(set(together)) > 3


def test_models_that_are_not_served(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path, answer_length=4)
    with pytest.raises(UnsupportedModel, match="diffusion"):
        Runner(load(folder), load_processor(folder))


def test_a_processor_whose_template_shows_no_pictures(runner: Runner) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.processor, "chat_template", "{{ messages[0].content[-1].text }}")
        with pytest.raises(UnsupportedModel, match="template"):
            Runner(runner.model, runner.processor)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [({"pictures": ()}, "pictures"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"stop": ("a", "")}, "stop")],
)
def test_wrong_requests(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        replace(request(Image.new("RGB", (8, 8)), "x"), **wrong)


# Its parts -----------------------------------------------------------------------------------------------------------


def utf8(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text("aé🙂\N{REPLACEMENT CHARACTER}") | st.binary(max_size=20))
def test_pieces_are_whole_characters_and_together_the_text(drawn: str | bytes) -> None:
    """Each byte is a token, valid UTF-8 or not."""
    ids = list(drawn.encode("utf-8", errors="replace") if isinstance(drawn, str) else drawn)
    words = Detokenizer(utf8)
    pieces = [words.add(token) for token in ids]
    assert "".join([*pieces, words.rest()]) == utf8(ids)
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces)


def test_a_character_is_said_when_it_is_whole() -> None:
    words = Detokenizer(utf8)
    assert [words.add(token) for token in "aé🙂b".encode()] == ["a", "", "é", "", "", "", "🙂", "b"]


def cut(text: str, stop: Sequence[str]) -> str:
    """What is said of ``text``, by trying every length."""
    for length in range(len(text) + 1):
        ends = [one for one in stop if text[:length].endswith(one)]
        if ends:
            return text[: length - max(map(len, ends))].strip()
    return text.strip()


LETTERS = st.text("ab \n", max_size=12)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=3))
def test_stop_strings_against_trying_every_length(pieces: list[str], stop: list[str]) -> None:
    """Single characters and whole pieces as tokens give the same answer, and nothing of a stop string is ever said."""
    text = "".join(pieces)
    answers = []
    for tokens in (list(text), pieces):
        answer, out = Answer(lambda ids, tokens=tokens: "".join(tokens[i] for i in ids), stop), ""
        for token in range(len(tokens)):
            out += answer.add(token)
            assert cut(text, stop).startswith(out)
            if answer.stopped:
                break
        answers.append((out + answer.rest(), answer.stopped))
    assert answers[0] == (cut(text, stop), any(one in text for one in stop))
    if len(stop) < 2:
        assert answers[1] == answers[0]


def test_an_answer_is_not_held_longer_than_it_must() -> None:
    words = [" a", " b", " stop", " it"]
    answer = Answer(lambda ids: "".join(words[i] for i in ids), ["stop here"])
    assert [answer.add(i) for i in range(4)] == ["a", " b", "", " stop it"]
    assert answer.rest() == "" and not answer.stopped


def test_draws_follow_the_probabilities_of_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(3000, 1)
    rows = [Sampling(1.0, 0.7, seed) for seed in range(3000)]
    drawn = Draw(rows, torch.device("cpu"))(torch.zeros(3000, 1), logits).argmax(1)
    share = drawn.bincount(minlength=4) / 3000
    assert share[2:].sum() == 0 and share[0] == pytest.approx(0.5 / 0.8, abs=0.03)


def test_draws_leave_greedy_rows_alone_and_differ_without_a_seed() -> None:
    logits = torch.zeros(2, 100_000)
    draws = [
        Draw([Sampling(0.0, 1.0, None), Sampling(1.0, 1.0, None)], torch.device("cpu"))(torch.zeros(2, 1), logits)
        for _ in range(2)
    ]
    assert all(torch.equal(one[0], logits[0]) for one in draws)
    assert draws[0][1].argmax() != draws[1][1].argmax()


def test_a_small_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e30]])
    for temperature in (1e-3, 1e-30, 1e-300):
        drawn = Draw([Sampling(temperature, 1.0, 1)], torch.device("cpu"))(torch.zeros(1, 1), logits)
        assert drawn.argmax() == 0

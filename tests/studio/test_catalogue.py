"""The tab Catalogue without a browser: what is listed and shown, and trials in a process of their own."""

from __future__ import annotations

import asyncio
import os
import re
import select
import sys
from contextlib import aclosing
from dataclasses import replace
from html import unescape

import pytest

from tests.bench.test_report import EVIL, Page
from vistok import catalogue
from vistok.catalogue import Card, UnknownSystem
from vistok.studio import cards, trial
from vistok.studio.trial import Progress, follow

CARD = Card(title="t", kind="control", site="s", paper="", slug="x", family="reduce")


# The list -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("projector output, before the language model", ("projector",)),
        ("encoder output, before the projector", ("encoder output",)),
        ("encoder output, before the projector; one decoder layer halfway", ("encoder output", "language model")),
        ("one early decoder layer", ("language model",)),
        ("between attention and MLP of every encoder block", ("vision encoder",)),
        ("patch embedding", ("vision encoder",)),
        ("denoising steps and layers of masked-diffusion language models", ("language model",)),
        ("in place of attention, in the early stages of a backbone", ("attention layer", "vision encoder")),
        ("in place of a layer's attention, on grids of one to three axes", ("attention layer",)),
        ("pixels to one discrete token a patch, and back", ("pixels to tokens",)),
        ("somewhere else", (cards.ELSEWHERE,)),
    ],
)
def test_where_a_system_acts(site, expected):
    assert cards.sites_of(replace(CARD, site=site)) == expected


def test_each_choice_finds_systems_and_only_those_of_it():
    given = cards.choices()
    assert set(given) == {"family", "site", "mechanism"}
    for family in given["family"]:
        assert cards.find(family=family) == catalogue.systems(family)
    for mechanism in given["mechanism"]:
        assert cards.find(mechanism=mechanism) == catalogue.query(mechanism=mechanism)
    by_site = {site: {card.slug for card in cards.find(site=site)} for site in given["site"]}
    assert all(by_site.values())
    assert set().union(*by_site.values()) == {*catalogue.names()}


def test_filters_hold_together():
    found = cards.find(words="FastV  chen", family="reduce", site="language model", mechanism="attention")
    assert [card.slug for card in found] == ["fastv"]
    assert cards.find(words="fastv", family="vit") == []
    assert cards.find(words="no system says this") == []


def test_the_list_has_a_button_for_each_system():
    text = cards.listing(catalogue.systems(), "fastv")
    buttons = Page(text).all("button")
    assert [one["data-slug"] for one in buttons] == catalogue.names()
    assert [one["data-slug"] for one in buttons if one["aria-pressed"] == "true"] == ["fastv"]
    assert f"{len(buttons)} systems" in text
    assert "none has all of that" in cards.listing([])


# A card ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", catalogue.names())
def test_a_card_says_all_that_the_catalogue_knows(slug):
    card, text = catalogue.card(slug), cards.head(slug) + cards.details(slug)
    said = _text(text)
    facts = [card.title, card.claim, card.site, card.paper, card.kind, card.family, *card.mechanism, *card.needs]
    facts += [card.score, card.allocate, card.select, card.merge, *card.departures, catalogue.module_of(slug)]
    for hyper in catalogue.hyper_of(slug):
        facts += [hyper.name, hyper.type, repr(hyper.default), hyper.description]
    for fact in facts:
        assert fact in said
    addresses = [one["href"] for one in Page(text).all("a")]
    assert (f"https://github.com/{card.repository}" in addresses) == bool(card.repository)
    assert all(one["rel"] == "noopener noreferrer" for one in Page(text).all("a"))


def test_only_addresses_of_a_known_form_become_links():
    assert cards.links(replace(CARD, paper="A et al., 2024, arXiv 2403.06764", repository="a/b.c")) == [
        ("paper", "https://arxiv.org/abs/2403.06764"),
        ("authors' code", "https://github.com/a/b.c"),
    ]
    assert cards.links(replace(CARD, paper="A, Journal 2024", repository="javascript:alert(1)//")) == []


def test_what_others_say_is_text(monkeypatch):
    evil = replace(
        catalogue.card("fastv"), title=EVIL, claim=EVIL, site=EVIL, paper=EVIL, repository=EVIL, departures=(EVIL,)
    )
    monkeypatch.setattr(catalogue, "card", lambda slug: evil)
    for text in (
        cards.head("fastv"),
        cards.details("fastv"),
        cards.listing([evil], EVIL),
        trial.told(EVIL, 0, Progress(EVIL, 1.0)),
        trial.panel("failed", EVIL, EVIL, EVIL, EVIL),
    ):
        page = Page(text)
        assert not page.all("script") and not page.all("a")
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert "&lt;script&gt;" in text


# Trials ---------------------------------------------------------------------------------------------------------------


def test_only_systems_of_the_catalogue_are_tried():
    assert trial.command("FastV", 3)[1:] == ["-m", "vistok", "try", "fastv", "--seed", "3"]
    assert trial.command("fastv")[0] == sys.executable
    for name in ("all", "--help", "fastv; true", "../fastv", ""):
        with pytest.raises(UnknownSystem):
            trial.command(name)


def python(code):
    return [sys.executable, "-u", "-c", code]


async def told(command, tick=60.0):
    return [how async for how in follow(command, tick)]


def test_output_is_told_as_it_comes():
    lines = asyncio.run(told(python("import sys\nfor n in range(3): print(n); sys.stdin.readline()")))
    assert lines[-1].output == "0\n1\n2\n" and lines[-1].code == 0
    assert all(how.code is None for how in lines[:-1])
    assert lines[0].output == ""


def test_what_goes_wrong_is_told():
    code = "import sys; print('á' * 3); print('bad', file=sys.stderr); sys.stdout.flush(); sys.exit(2)"
    last = asyncio.run(told(python(code)))[-1]
    assert last.code == 2 and "ááá" in last.output and "bad" in last.output


def test_a_flood_of_output_keeps_its_end():
    found = asyncio.run(told(python("print('x' * 1_000_000); print('end')")))
    last = found[-1]
    assert len(found) < 50  # of the 250 pieces that were read
    assert len(last.output) == trial.ROOM and last.output.endswith("x\nend\n")


def test_it_is_told_that_a_silent_process_still_runs():
    async def seconds():
        found = []
        async with aclosing(follow(python("import time; time.sleep(600)"), 0.01)) as silent:
            async for how in silent:
                assert how.output == "" and how.code is None
                found.append(how.seconds)
                if len(found) == 5:
                    return found

    found = asyncio.run(seconds())
    assert found == sorted(found) and found[-1] >= 4 * 0.01


FAMILY = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid)
child.wait()
"""


async def pids(progress):
    """The process and its child, as files that can be read from when they have ended."""
    async for one in progress:
        if one.output.endswith("\n"):
            return [os.pidfd_open(int(word)) for word in one.output.split()]


async def closed():
    async with aclosing(follow(python(FAMILY))) as progress:
        return await pids(progress)


async def cancelled():
    found = asyncio.get_running_loop().create_future()

    async def listen():
        async with aclosing(follow(python(FAMILY), 60.0)) as progress:
            found.set_result(await pids(progress))
            await anext(progress)  # nothing comes: it is cancelled while it waits

    task = asyncio.create_task(listen())
    files = await found
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return files


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for processes as Linux can")
@pytest.mark.parametrize("stop", [closed, cancelled])
def test_who_stops_listening_ends_the_process_and_all_that_it_started(stop):
    for file in asyncio.run(stop()):
        assert select.select([file], [], [], 30)[0], "it still runs"
        os.close(file)


OUTPUT = """
claim: It held-out nothing.

 system   metric                  baseline   with it   the claim   seconds
 ──────────────────────────────────────────────────────────────────────────
 {slug}    held-out accuracy   0.9       0.8   {result}    2.1
"""


@pytest.mark.parametrize(
    ("result", "state", "words"),
    [
        ("held", "held", "fastv: the claim held"),
        ("did not hold at this scale", "open", "fastv: the claim did not hold at this scale"),
        ("did not hold at", "open", "fastv: the claim did not hold at this scale"),
        ("", "", "fastv: finished"),
    ],
)
def test_the_verdict_is_read_from_the_table(result, state, words):
    output = OUTPUT.format(slug="fastv", result=result)
    assert trial.verdict("fastv", output) == state
    text = trial.told("fastv", 0, Progress(output, 12.3, 0))
    assert words in _text(text) and "12 s" in text and "vistok try fastv --seed 0" in text
    assert trial.verdict("holov", output) == ""


def test_the_state_of_a_trial_is_said():
    assert "Measuring fastv" in trial.told("fastv", 0, Progress("", 1.0))
    failed = trial.told("fastv", 0, Progress("error: no", 1.0, 2))
    assert "could not be measured (exit status 2)" in failed and "error: no" in failed


def _text(html):
    """What a page says, without its tags."""
    return unescape(re.sub(r"<[^>]*>", "", html))

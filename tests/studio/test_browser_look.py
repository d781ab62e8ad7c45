"""The tabs Look and Layers in a browser, as people use them: mouse, keyboard, phone, link, stop."""

from __future__ import annotations

import re
import sys
import threading

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
expect = pytest.importorskip("playwright.sync_api").expect

from tests.studio.serving import served, tiny_studio  # noqa: E402

QUESTION, ASK, STOP = "#look-question textarea", "#look-ask", "#look-stop"


abroad: list[object] = []
"""Whom this process spoke to, or asked for, that is not this machine."""


@pytest.fixture(scope="module")
def url():
    sys.addaudithook(_note)
    with served(tiny_studio()) as address:
        yield address


def _note(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "", "localhost", "127.0.0.1", "::1", b"127.0.0.1"):
        abroad.append(arguments[0])
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        abroad.append(arguments[1])


def wait(page, question):
    """Until the answers to ``question`` are there."""
    expect(page.locator(".look .vt-question")).to_have_text(question, timeout=60_000)
    expect(page.locator(".look .vt-status")).to_have_text("Done.", timeout=60_000)


def card(page, method):
    return page.locator(".look .vt-card").filter(has=page.get_by_role("heading", name=method, exact=True))


@pytest.fixture
def opened(page, url):
    page.goto(url)
    wait(page, "what shape is the blue object?")
    return page


def test_the_page_begins_with_an_answer(opened):
    assert opened.locator(".look .vt-card").count() == 5
    expect(card(opened, "dense").locator(".vt-said")).to_have_text("triangle")
    expect(card(opened, "dense").locator(".vt-mark")).to_have_text("✓ right")
    expect(card(opened, "fastervlm").locator("dd").first).to_have_text("49 of 196")


def test_a_dropped_picture_a_typed_question_and_another_budget(opened, tmp_path):
    file = tmp_path / "stripes.png"
    pixels = np.zeros((90, 160, 3), np.uint8)
    pixels[:, ::2] = 255
    Image.fromarray(pixels).save(file)
    opened.set_input_files("#look-picture input[type=file]", file)
    expect(opened.locator("#look-picture img")).to_have_js_property("naturalWidth", 160)
    question = "is there a <b>red</b> object?"
    opened.fill(QUESTION, question)
    keep = opened.locator("#look-keep input[type=range]")
    keep.focus()
    for _ in range(25):
        keep.press("ArrowRight")
    opened.click(ASK)
    wait(opened, question)
    assert opened.locator(".vt-question b").count() == 0
    expect(card(opened, "fastervlm").locator("dd").first).to_have_text("98 of 196")
    assert card(opened, "dense").locator(".vt-said").inner_text()
    assert card(opened, "dense").locator(".vt-mark").count() == 0  # nobody knows the right answer
    expect(opened.locator("#look-link")).to_contain_text("without your own picture")
    link = opened.locator("#look-link textarea, #look-link input").input_value()
    assert "picture=" not in link and "keep=0.5" in link


def test_a_link_restores_the_look(opened, context):
    opened.locator("#look-gallery button").nth(1).click()
    expect(opened.locator(QUESTION)).not_to_have_value("what shape is the blue object?")
    question = opened.input_value(QUESTION)
    opened.locator("#look-keep input[type=number]").fill("40")
    opened.locator("#look-keep input[type=number]").press("Tab")
    opened.click(ASK)
    wait(opened, question)
    expect(opened.locator("#look-link textarea, #look-link input")).to_have_value(re.compile("keep=0.4"))
    link = opened.locator("#look-link textarea, #look-link input").input_value()
    assert opened.url == link
    again = context.new_page()
    again.goto(link)
    wait(again, question)
    expect(again.locator(QUESTION)).to_have_value(question)
    expect(again.locator("#look-keep input[type=number]")).to_have_value("40")
    assert card(again, "fastervlm").locator("dd").first.inner_text() == "78 of 196"


def test_a_wrong_link_is_told_and_the_page_works(page, url):
    page.goto(f"{url}?picture=world:nowhere:1&keep=9&methods=fastv")
    expect(page.get_by_text("The picture world:nowhere:1: must be")).to_be_visible()
    expect(page.get_by_text("keep is 9, it must be a share")).to_be_visible()
    wait(page, "what shape is the blue object?")
    assert page.locator(".look .vt-card").count() == 2 and card(page, "fastv").count() == 1


def test_the_patch_under_the_pointer_is_told_under_every_method(opened):
    grid = card(opened, "fastervlm").locator(".vt-grid")
    box = grid.bounding_box()
    grid.hover(position={"x": box["width"] * 4.5 / 14, "y": box["height"] * 1.5 / 14})
    expect(opened.locator(".look .vt-at")).to_have_text("Row 2, column 5")
    rows = opened.locator(".vt-probe tbody tr")
    assert rows.count() == 5
    expect(rows.nth(1)).to_contain_text(re.compile(r"fastervlm\s*kept\s*[\d.e-]+, rank \d+ of 196"))
    expect(rows.nth(2)).to_contain_text("no score, chosen by similarity")
    assert opened.locator(".look .vt-here:not([hidden])").count() == 5


def test_the_patches_are_one_stop_of_the_keyboard_and_are_read_aloud(opened):
    cursor = opened.locator(".look .vt-cursor")
    cursor.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "End", "Home", "ArrowRight", "ArrowUp", "ArrowUp"):
        opened.keyboard.press(key)
    expect(opened.locator(".look .vt-at")).to_have_text("Row 1, column 2")
    aloud = opened.locator(".look .vt-live")
    expect(aloud).to_have_attribute("aria-live", "polite")
    expect(aloud).to_contain_text("Row 1, column 2. dense: kept")
    expect(aloud).to_contain_text("fastervlm: ")
    opened.keyboard.press("Tab")
    assert not opened.evaluate("document.activeElement.closest('.vt-explorer')")


def test_a_question_can_be_asked_with_the_keyboard_alone(opened):
    opened.locator(QUESTION).focus()
    opened.keyboard.press("ControlOrMeta+a")
    opened.keyboard.type("what colour is the heart?")
    opened.keyboard.press("Enter")
    wait(opened, "what colour is the heart?")


def test_scores_over_the_pictures(opened):
    heat, veil = card(opened, "fastervlm").locator(".vt-heat"), card(opened, "fastervlm").locator(".vt-veil")
    expect(heat).to_be_hidden()
    opened.get_by_label("Score", exact=True).check()
    expect(heat).to_be_visible()
    expect(veil).to_be_hidden()
    expect(card(opened, "divprune").locator(".vt-none")).to_be_visible()


def test_what_is_under_way_can_be_stopped(opened):
    studio = tiny_studio()
    with studio.models["vistok-tiny"].lock:  # nothing can be answered while somebody holds the model
        opened.fill(QUESTION, "how many objects are there?")
        opened.click(ASK)
        expect(opened.locator(".look .vt-question")).to_have_text("how many objects are there?")
        expect(opened.locator(ASK)).to_be_disabled()
        opened.click(STOP)
        expect(opened.locator(".look .vt-status")).to_have_text("Stopped.")
        expect(opened.locator(ASK)).to_be_enabled()
        expect(opened.locator(STOP)).to_be_disabled()
    opened.click(ASK)
    wait(opened, "how many objects are there?")


def test_two_people_do_not_mix(opened, context, url):
    other = context.new_page()
    other.goto(f"{url}?picture=world:words:57&methods=fastv")
    expect(other.locator(".look .vt-status")).to_have_text("Done.")
    asked = other.locator(".look .vt-question").inner_text()
    opened.get_by_role("tab", name="Layers").click()
    expect(opened.locator(".vt-layers .vt-question")).to_have_text("what shape is the blue object?")
    other.get_by_role("tab", name="Layers").click()
    expect(other.locator(".vt-layers .vt-question")).to_have_text(asked)
    assert other.locator(".vt-layers .vt-card").count() == 2


def test_layers_are_scrubbed_with_the_keyboard(opened):
    opened.get_by_role("tab", name="Layers").click()
    dropped = opened.locator(".vt-layers .vt-card").filter(has=opened.get_by_role("heading", name="pyramiddrop"))
    expect(dropped.locator(".vt-left")).to_have_text("196")
    slider = opened.get_by_label("Layer 1 of 6")
    slider.focus()
    for _ in range(5):
        opened.keyboard.press("ArrowRight")
    expect(opened.locator(".vt-layer-now")).to_have_text("6")
    assert int(dropped.locator(".vt-left").inner_text()) < 49
    expect(opened.locator(".vt-layers .vt-live")).to_contain_text("Layer 6. dense: 196 tokens")
    opened.locator(".vt-layers .vt-grid").first.hover()
    expect(opened.locator(".vt-layers .vt-hint")).to_contain_text("dense 0.")
    frame = dropped.locator(".vt-frames")
    assert frame.evaluate("e => getComputedStyle(e).backgroundPositionY") == "100%"


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("tab", ["Look", "Layers"])
def test_nothing_is_wider_than_the_page(opened, width, tab):
    opened.set_viewport_size({"width": width, "height": 844})
    opened.get_by_role("tab", name=tab).click()
    expect(opened.locator(".look" if tab == "Look" else ".vt-layers[data-ready]")).to_be_visible()
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    over = """width => [...document.querySelectorAll('.vt *')].filter(e => {
      const box = e.getBoundingClientRect();
      return box.width > 2 && (box.left < 0 || box.right > width + 1);
    }).length"""
    assert opened.evaluate(over, width) == 0


def test_a_page_that_is_closed_is_forgotten(context, url, monkeypatch):
    studio, closed = tiny_studio(), threading.Event()
    forget = studio.sessions.close
    monkeypatch.setattr(studio.sessions, "close", lambda session: (forget(session), closed.set()))
    page = context.new_page()
    page.goto(url)
    wait(page, "what shape is the blue object?")
    before = len(studio.sessions)
    page.close()
    assert closed.wait(60) and len(studio.sessions) < before


def test_neither_page_nor_server_speaks_to_anybody_else(opened, outside):
    opened.get_by_role("tab", name="Layers").click()
    expect(opened.locator(".vt-layers[data-ready]")).to_be_visible()
    assert outside == [] and abroad == []

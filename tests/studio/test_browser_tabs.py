"""The tabs Compare and Catalogue in a browser, as people use them: mouse, keyboard, phone, dark; trials and ends."""

from __future__ import annotations

import re
import subprocess

import pytest

pytest.importorskip("gradio")
expect = pytest.importorskip("playwright.sync_api").expect

from tests.bench.test_page import sweep_of  # noqa: E402
from tests.studio.serving import served  # noqa: E402
from vistok.studio import trial  # noqa: E402
from vistok.studio.state import Models, Studio  # noqa: E402

QUICK = "topk"
"""A system whose trial takes a few seconds."""
TRIAL_MS = 180_000


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A studio with a sweep of made-up answers to real questions of the world."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep_of(folder, model="vistok-tiny")
    sweep_of(folder, model="vistok-tiny", task="words")
    with served(Studio(Models(["vistok-tiny"]), results=folder)) as address:
        yield address


@pytest.fixture
def opened(page, url):
    page.emulate_media(reduced_motion="reduce")
    page.goto(url)
    return page


def tab(page, name):
    page.get_by_role("tab", name=name).click()
    expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
    return page.get_by_role("tabpanel").filter(visible=True)


def points(page):
    return page.locator("#compare-curves .point")


def choose(page, label, value):
    """Take ``value`` of a drop-down list."""
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=value, exact=True).click()


# Compare --------------------------------------------------------------------------------------------------------------


def test_a_click_on_a_point_shows_its_pictures(opened):
    tab(opened, "Compare")
    expect(points(opened)).to_have_count(9)
    box = opened.get_by_role("button", name="holov 10%: 50.0% right").bounding_box()
    opened.mouse.click(box["x"] + box["width"] / 2 + 6, box["y"] + box["height"] / 2)  # beside it: the nearest is meant
    detail = opened.locator("#compare-point")
    expect(detail.get_by_role("heading", name="holov 10%")).to_be_visible()
    expect(detail.locator("figure")).to_have_count(8)
    expect(detail.get_by_role("img").first).to_have_attribute("aria-label", re.compile("20 of 196 visual tokens stay"))
    expect(opened.locator(".point[aria-pressed=true]")).to_have_attribute("aria-label", re.compile("^holov 10%"))


def test_points_are_walked_with_the_arrow_keys(opened):
    tab(opened, "Compare")
    opened.locator("#compare-curves .legend button").last.focus()
    opened.keyboard.press("Tab")  # one stop for all points
    focused = opened.locator(".point:focus")
    expect(focused).to_have_attribute("aria-label", re.compile("^dense"))
    opened.keyboard.press("Tab")
    expect(focused).to_have_count(0)
    opened.keyboard.press("Shift+Tab")
    opened.get_by_role("button", name="holov 10%: ").focus()
    opened.keyboard.press("ArrowRight")
    expect(focused).to_have_attribute("aria-label", re.compile("^holov 50%"))
    opened.keyboard.press("ArrowDown")
    expect(focused).not_to_have_attribute("aria-label", re.compile("^holov"))
    opened.keyboard.press("ArrowUp")
    expect(focused).to_have_attribute("aria-label", re.compile("^holov 50%"))
    expect(opened.locator(".readout")).to_have_text(re.compile("^holov 50%"))
    opened.keyboard.press("Enter")
    expect(opened.locator("#compare-point").get_by_role("heading", name="holov 50%")).to_be_visible()
    expect(focused).to_have_attribute("aria-pressed", "true")  # and it keeps the focus


def test_filters_leave_other_points(opened):
    tab(opened, "Compare")
    heading = opened.locator("#compare-curves h2")
    expect(heading).to_have_text("vistok-tiny, float32, scenes")
    opened.get_by_label("attention").uncheck()
    opened.get_by_label("query").uncheck()
    expect(points(opened)).to_have_count(7)  # fastv is gone
    choose(opened, "Task", "words")
    expect(heading).to_have_text("vistok-tiny, float32, words")
    choose(opened, "Kind of question", "shape")
    expect(heading).to_have_text("vistok-tiny, float32, words, shape")
    expect(opened.locator("#compare-curves")).to_contain_text("4 questions a point")
    opened.get_by_label("time").check()
    expect(opened.locator("#compare-curves svg text").last).to_have_text("Milliseconds to the first token")
    legend = opened.locator(".legend").get_by_role("button", name="holov")
    legend.click()
    expect(legend).to_have_attribute("aria-pressed", "true")
    expect(opened.locator(".series.faded")).to_have_count(3)


def test_without_results_it_says_how_to_make_some(page, studio_url):
    page.goto(studio_url)
    expect(tab(page, "Compare")).to_contain_text("vistok bench run --methods")


# Catalogue ------------------------------------------------------------------------------------------------------------


def test_systems_are_found_and_chosen_with_the_keyboard(opened):
    tab(opened, "Catalogue")
    opened.get_by_label("Search").fill("arXiv 2403.06764")
    buttons = opened.locator("#catalogue-list button")
    expect(buttons).to_have_count(1)
    opened.get_by_label("Search").fill("")
    choose(opened, "Family", "vit")
    choose(opened, "Mechanism", "attention")
    expect(opened.locator("[data-slug=fastv]")).to_have_count(0)
    buttons.first.focus()
    opened.keyboard.press("ArrowDown")
    slug = buttons.nth(1).get_attribute("data-slug")
    opened.keyboard.press("Enter")
    expect(opened.get_by_role("article", name=slug)).to_be_visible()
    expect(opened.get_by_role("region", name=f"About {slug}")).to_contain_text("module")
    expect(opened.get_by_role("button", name=f"Try {slug}")).to_be_enabled()
    expect(opened.locator("#catalogue-list [aria-pressed=true]")).to_have_attribute("data-slug", slug)
    expect(buttons.nth(1)).to_be_focused()


def test_a_trial_runs_and_tells_its_verdict(opened):
    tab(opened, "Catalogue")
    opened.locator(f"[data-slug={QUICK}]").click()
    opened.get_by_role("button", name=f"Try {QUICK}").click()
    state, log = opened.locator("#catalogue-trial [role=status]"), opened.locator("#catalogue-trial pre")
    expect(state).to_contain_text(f"Measuring {QUICK}")
    expect(opened.get_by_role("button", name="Cancel")).to_be_enabled()
    expect(opened.get_by_role("button", name=f"Try {QUICK}")).to_be_disabled()
    expect(state).to_contain_text(re.compile(f"{QUICK}: the claim (held|did not hold at this scale)"), timeout=TRIAL_MS)
    held = "the claim held" in state.inner_text()
    expect(log).to_contain_text(f"$ vistok try {QUICK} --seed 0")
    expect(log).to_contain_text("held" if held else "did not hold")
    expect(opened.get_by_role("button", name="Cancel")).to_be_disabled()
    expect(opened.get_by_role("button", name=f"Try {QUICK}")).to_be_enabled()


@pytest.fixture
def endless(monkeypatch, tmp_path):
    """Trials that do not end; the file names their processes, one a line."""
    started = tmp_path / "started"
    code = f"import os, time; open({str(started)!r}, 'a').write(f'{{os.getpid()}}\\n'); print('begun'); time.sleep(900)"
    real = trial.command
    monkeypatch.setattr(trial, "command", lambda slug, seed=0: [real(slug)[0], "-u", "-c", code])
    return started


def wait_for_the_end_of(pid):
    subprocess.run(["tail", f"--pid={pid}", "-f", "/dev/null"], timeout=30, check=True)


def test_a_trial_is_cancelled_one_waits_for_the_other_and_ends_with_its_page(opened, context, url, endless):
    tab(opened, "Catalogue")
    log = opened.locator("#catalogue-trial")
    opened.get_by_role("button", name="Try ").click()
    expect(log).to_contain_text("begun")
    other = context.new_page()
    other.goto(url)
    tab(other, "Catalogue")
    other.get_by_role("button", name="Try ").click()
    expect(other.locator("#catalogue-trial")).to_contain_text("waits for its turn")
    assert len(endless.read_text().split()) == 1
    opened.get_by_role("button", name="Cancel").click()
    expect(log).to_contain_text("cancelled")
    expect(opened.get_by_role("button", name="Try ")).to_be_enabled()
    expect(other.locator("#catalogue-trial")).to_contain_text("begun")
    first, second = endless.read_text().split()
    wait_for_the_end_of(first)
    other.close()
    wait_for_the_end_of(second)


# All ------------------------------------------------------------------------------------------------------------------


def test_the_tabs_are_walked_with_the_keyboard(opened):
    first = opened.get_by_role("tab", name="Look")
    first.focus()
    for key, name in (
        ("ArrowRight", "Layers"),
        ("ArrowRight", "Compare"),
        ("End", "Catalogue"),
        ("ArrowRight", "Look"),
    ):
        opened.keyboard.press(key)
        expect(opened.get_by_role("tab", name=name)).to_be_focused()
        expect(opened.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")


CONTRAST = """panel => {
  const numbers = text => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return found.length < 4 ? [...found, 1] : found;
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.push(numbers(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const read = [...panel.querySelectorAll("*")].filter(e =>
    [...e.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
    && e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !e.closest(":disabled, style, title"));
  return read.map(e => {
    const style = getComputedStyle(e), back = behind(e);
    const front = over(numbers(e.closest("svg") ? style.fill : style.color), back);
    const [dark, bright] = [light(front), light(back)].sort((a, b) => a - b);
    return [(bright + 0.05) / (dark + 0.05), e.outerHTML.slice(0, 120)];
  });
}"""
NAMELESS = """panel => {
  const told = text => (text || "").trim().length > 0;
  const named = e => told(e.getAttribute("aria-label")) || told(e.getAttribute("title"))
    || (e.getAttribute("aria-labelledby") || "").split(" ").some(id => told(document.getElementById(id)?.textContent));
  const shown = e => e.checkVisibility({ visibilityProperty: true });
  const controls = [...panel.querySelectorAll("button, input, select, textarea, [role=button], [tabindex='0']")];
  const drawn = [...panel.querySelectorAll("img, svg")];
  return [
    ...controls.filter(e => !told(e.textContent) && ![...(e.labels || [])].some(label => told(label.textContent))),
    // What stands in something that has a name of its own needs none; the arrow of a list is Gradio's, a decoration.
    ...drawn.filter(e => !told(e.getAttribute("alt")))
      .filter(e => !e.closest("[aria-hidden=true], button, label, .dropdown-arrow")),
  ].filter(e => shown(e) && !named(e)).map(e => e.outerHTML.slice(0, 160));
}"""
WIDER = """panel => [...panel.querySelectorAll("*")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width > 1 && box.right > innerWidth + 1 && !e.closest(".scroll, pre");
}).map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_narrow_or_wide_light_or_dark_all_can_be_read_and_has_a_name(opened, width, dark):
    opened.set_viewport_size({"width": width, "height": 844})
    opened.emulate_media(color_scheme="dark" if dark else "light")
    opened.reload()
    for name in ("Compare", "Catalogue"):
        panel = tab(opened, name)
        if name == "Compare":
            opened.get_by_role("button", name="holov 10%: ").press("Enter")
            expect(opened.locator("#compare-point figure").first).to_be_visible()
        else:
            opened.locator("[data-slug=fastv]").click()
            expect(opened.get_by_role("article", name="fastv")).to_be_visible()
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        assert panel.evaluate(WIDER) == []
        assert panel.evaluate(NAMELESS) == []
        contrasts = panel.evaluate(CONTRAST)
        assert len(contrasts) > 50
        assert [(ratio, what) for ratio, what in contrasts if ratio < 4.5] == []

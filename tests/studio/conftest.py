"""The studio on a port of this machine and a browser before it, with which nothing outside can be reached.

The tests of pages need Playwright and a Chromium that is installed already (``chromium`` on the path, or
``VISTOK_CHROMIUM``; ``make browser`` installs Debian's); they are skipped where there is none. Playwright downloads
nothing. With pytest-xdist and --dist loadgroup all of them run on one worker.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.studio.serving import served, tiny_studio

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of pages together: two browsers at once on two cores are slower than one after the other."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if "browser" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def studio_url() -> Iterator[str]:
    """Where a studio with the smallest model and without results is served, ending in a slash."""
    pytest.importorskip("gradio")
    with served(tiny_studio()) as url:
        yield url


# Of a module, not of the session: while Playwright is at work, no other test of the process can run an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = (os.environ.get("VISTOK_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs a Chromium that is installed: `make browser` installs Debian's")
    playwright.expect.set_options(timeout=30_000)  # the machine may do other things too
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def outside() -> list[str]:
    """Requests of ``page`` that were not for this machine; none got out. A test that opens a page ends with ``[]``."""
    return []


@pytest.fixture
def context(browser: Any, outside: list[str]) -> Iterator[Any]:
    """A fresh profile, 1440 x 900, that may use the clipboard."""

    def only_here(route: Any) -> None:
        url = route.request.url
        if url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            route.continue_()
        else:
            outside.append(url)
            route.abort()

    made = browser.new_context(viewport={"width": 1440, "height": 900})
    made.set_default_timeout(60_000)
    made.route("**/*", only_here)
    yield made
    made.close()
    assert outside == []


@pytest.fixture
def page(context: Any) -> Iterator[Any]:
    """An empty page; the test fails where its scripts raise, or anything asks for what is not on this machine."""
    errors: list[str] = []
    made = context.new_page()
    made.on("pageerror", lambda error: errors.append(str(error)))
    yield made
    assert errors == []

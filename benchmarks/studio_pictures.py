"""Pictures of the studio for the documentation: ``python -m benchmarks.studio_pictures``.

Serves the studio on a port of this machine, opens it in a headless Chromium that is installed already (``chromium`` on
the path, or ``--chromium``), and writes ``docs/studio-look.png`` and ``docs/studio-layers.png``. Needs Playwright.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests.studio.conftest import FLAGS
from tests.studio.serving import served, tiny_studio
from vistok.bench.report import replace_file

METHOD, DITHER = Image.Quantize.FASTOCTREE, Image.Dither.FLOYDSTEINBERG
"""To 256 colours: half the bytes, and photographs still look as they do."""


def write(page: Page, path: Path) -> None:
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(palette=image.quantize(256, METHOD), dither=DITHER).save(buffer, "PNG", optimize=True)
    replace_file(path, buffer.getvalue())
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    given = parser.parse_args()
    with served(tiny_studio()) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(url)
        page.wait_for_selector(".look .vt-status:has-text('Done.')")
        grid = page.locator(".look .vt-grid").nth(3)
        box = grid.bounding_box() or {"width": 1, "height": 1}
        grid.hover(position={"x": 0.55 * box["width"], "y": 0.4 * box["height"]})
        write(page, given.out / "studio-look.png")
        page.get_by_role("tab", name="Layers").click()
        page.wait_for_selector(".vt-layers[data-ready]")
        page.locator(".vt-layer").fill("3")
        write(page, given.out / "studio-layers.png")
        browser.close()


if __name__ == "__main__":
    main()

"""Screenshots of a report's page: its top and its explorer, light and dark, wide and narrow.

    python -m tests.report.screenshots results/<run>/report/report.html reports/gallery/<name>

Writes `page-<top|explorer>-<light|dark>-<wide|narrow>.png`. Needs the packages of the extra `dev`, and Chromium or
Chrome. The explorer shows learning curves, with the pictures of the first point that has any, half-way through training
where pictures along training were kept.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"wide": (1400, 900), "narrow": (390, 844)}


def main() -> None:
    """Read the page's path and the folder from the command line."""
    page_file, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        sys.exit(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            for name, (width, height) in SIZES.items():
                context = browser.new_context(
                    viewport={"width": width, "height": height},
                    color_scheme=theme,
                    offline=True,
                    reduced_motion="reduce",
                )
                page = context.new_page()
                page.goto(page_file.as_uri())
                _shoot(page, folder, f"{theme}-{name}")
                context.close()
        browser.close()


def _shoot(page: Page, folder: Path, name: str) -> None:
    top = folder / f"page-top-{name}.png"
    page.screenshot(path=top)
    curves = page.locator("input[value=curves]")
    if curves.count():
        curves.dispatch_event("click")
        slider = page.locator("#step")
        if slider.count():
            slider.focus()
            for _ in range(int(slider.get_attribute("max") or 0) // 2):
                slider.press("ArrowLeft")
        page.evaluate("document.activeElement.blur()")
        # What stays at the top of the window would lie over the picture.
        page.evaluate("document.querySelectorAll('.bar, nav').forEach((part) => { part.style.position = 'static'; })")
        page.locator(".explore").screenshot(path=folder / f"page-explorer-{name}.png")
    for path in folder.glob(f"page-*-{name}.png"):
        with Image.open(path) as shot:
            few = shot.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(path, optimize=True)


if __name__ == "__main__":
    main()

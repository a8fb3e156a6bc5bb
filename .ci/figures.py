"""Take the pictures of docs/reading.md from the page of a run: ``python .ci/figures.py runs/shapes-128-256``.

Each is the row of curves of one stage of the run's last iteration, in headless Chromium (``.ci/browser`` installs it).
"""

import os
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STAGES = {"SFT": "curves-sft.png", "DPO": "curves-dpo.png", "GRPO: own images": "curves-grpo.png"}
"""Stages by the title that the page gives them, and their pictures."""
WIDTH = 960


def take(page: Page, stage: str, path: Path) -> None:
    """Save the curves of the last ``stage`` of a page. ValueError if the page has none."""
    titles = page.locator("#curves h3").all_inner_texts()
    found = [number for number, title in enumerate(titles) if title.partition(": ")[2].split(",")[0] == stage]
    if not found:
        raise ValueError(f"{page.url}: no curves of {stage}, expected them among {titles}")
    plots = page.locator("#curves .plots").nth(found[-1])
    plots.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)  # plots are drawn when they come into view
    plots.screenshot(path=path)


def main(run: Path) -> None:
    """Take all pictures of a run."""
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1200}, color_scheme="light")
        page.goto((run / "report.html").resolve().as_uri())
        for stage, name in STAGES.items():
            take(page, stage, IMAGES / name)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

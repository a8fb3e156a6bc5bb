"""Take the images of the documentation from the page of a run: ``PYTHONPATH=. python .ci/page_images.py RUN``."""

import os
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.helpers.browser import wait_until
from vargpt_rl.page.render import write_page

IMAGES = Path(__file__).parents[1] / "docs/images"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
WIDTH = 1000
"""Pixels of the window."""
TOP = 1180
"""Pixels of the page's top that are shown: where the run stands, the verdict, the first images."""
STAGES = {"curves-dpo.png": "iteration 1: DPO", "curves-grpo.png": "iteration 1: GRPO: own images"}
"""Stages whose curves are shown, by file."""


def curves_of(page: Page, stage: str) -> bytes:
    """Return an image of the remarks and plots of a stage."""
    page.evaluate(
        """stage => {
            const heading = [...document.querySelectorAll("#curves h3")].find(each => each.innerText.startsWith(stage));
            const shown = document.createElement("section");
            shown.id = "shown";
            let next = heading;
            do {
                const each = next;
                next = next.nextElementSibling;
                shown.append(each);
            } while (next && next.tagName !== "H3");
            document.querySelector("#curves").before(shown);
            shown.scrollIntoView();
        }""",
        stage,
    )
    wait_until(page, "[...document.querySelectorAll('#shown .canvas')].every(each => each.dataset.drawn)")
    page.wait_for_timeout(500)  # plots settle
    image = page.locator("#shown").screenshot()
    page.evaluate("document.querySelector('#shown').remove()")
    return image


def main(run: Path) -> None:
    """Write the images."""
    address = write_page([run]).resolve().as_uri()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": TOP}, color_scheme="light")
        page.goto(address)
        page.screenshot(path=IMAGES / "page.png")
        for name, stage in STAGES.items():
            (IMAGES / name).write_bytes(curves_of(page, stage))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

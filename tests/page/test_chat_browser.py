"""The page to chat on, in a real browser with the embedded model twice."""

import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from tests.helpers.browser import assert_accessible, wait_until


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_checkpoints_draw_side_by_side_in_a_browser(chromium):
    command = [sys.executable, "-u", "-m", "vargpt_rl", "chat", "--page", "--beside", "tiny", "resolution=128"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    context = chromium.new_context(viewport={"width": 390, "height": 844})
    complaints = []
    try:
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.stdout.readline().split()[-1])
        page.get_by_label("draw an image").check()
        page.get_by_label("Your turn").fill("a large red circle")
        page.keyboard.press("Enter")
        wait_until(page, "document.querySelectorAll('.replies img').length === 2", 60)
        assert page.evaluate("[...document.images].every(image => image.naturalWidth === 128)")
        sources = page.evaluate("[...document.querySelectorAll('.replies img')].map(image => image.src)")
        assert sources[0] == sources[1], "the same checkpoint, seed and size"
        page.locator(".replies img").first.click()
        page.get_by_label("draw an image").uncheck()
        page.get_by_label("Your turn").fill("what colour is the circle?")
        page.keyboard.press("Enter")
        wait_until(page, "document.querySelectorAll('.turn').length === 2", 60)
        assert "red" in page.locator(".turn").nth(1).locator(".replies").inner_text().lower()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and complaints == []
        assert_accessible(page)
    finally:
        context.close()
        server.kill()
        server.wait()

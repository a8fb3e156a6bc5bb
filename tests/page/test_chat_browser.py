"""The page to chat on, in a real browser with the embedded model twice."""

import subprocess
import sys
import threading

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from tests.cli.test_chat_page import Echo, Fragile
from tests.helpers.browser import assert_accessible, wait_until
from vargpt_rl.chat import Talk
from vargpt_rl.cli.chat_page import Speaker, Turn, make_chat_app
from vargpt_rl.page.serving import serve


def test_a_conversation_outlives_a_reload_refusals_and_large_images(chromium):
    speakers = [Speaker("red", Talk(lambda: Echo("red"))), Speaker("blue", Talk(lambda: Fragile("blue"), 1))]
    app = make_chat_app(speakers, Turn(text="-", resolution=64), "secret")
    addresses = []
    threading.Thread(target=lambda: serve(app, "secret", 0, addresses.append), daemon=True).start()
    page = chromium.new_page()
    while not addresses:
        page.wait_for_timeout(50)
    page.goto(addresses[0])

    def send(text, count):
        page.get_by_label("Your turn").fill(text)
        page.keyboard.press("Enter")
        wait_until(page, f"document.querySelectorAll('.turn').length === {count}")

    page.get_by_label("draw an image").check()
    send("hello", 1)
    page.locator(".replies img").first.click()
    send("again", 2)
    assert page.locator(".error").all_inner_texts() == ["This turn was not taken: the conversation is too long"]
    assert_accessible(page)
    before = page.locator("#log").inner_html()
    page.reload()
    wait_until(page, "document.querySelectorAll('.turn').length === 2")
    assert page.locator("#log").inner_html() == before
    large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(13 * 2**20)}
    page.get_by_label("Show images").set_input_files(large)
    told = "large.png has 13.0 MiB, expected at most 12 MiB"
    wait_until(page, f"document.getElementById('trouble').textContent === '{told}'")
    assert page.locator("#shown img").count() == 0
    page.get_by_role("button", name="New conversation").click()
    wait_until(page, "document.querySelectorAll('.turn').length === 0")
    page.close()


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

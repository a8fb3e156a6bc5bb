"""The page in a real browser: complete, quiet, without the network, usable by keyboard and on a telephone."""

import pytest

from tests.helpers.browser import assert_accessible, wait_until
from tests.helpers.run_folder import make_run
from vargpt_rl.page.render import PAGE, write_page

SECTIONS = ("head", "verdict", "images", "skills", "curves", "pairs", "time", "settings")
WIDTHS = (390, 1280)


def is_outside(address):
    return not address.startswith(("file:", "data:"))


@pytest.fixture
def opened(chromium):
    """Open pages offline; afterwards, fail on console errors and on requests that leave the page."""
    context = chromium.new_context(offline=True, reduced_motion="reduce")
    complaints: list[str] = []

    def show(path, width=1280):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.extend([request.url] * is_outside(request.url)))
        page.goto(path.as_uri())
        return page

    yield show
    context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def report(finished_run):
    return write_page([finished_run])


def draw_all(page):
    """Scroll through the page, so that every plot is drawn."""
    for place in page.query_selector_all(".canvas"):
        place.scroll_into_view_if_needed()
    wait_until(page, "[...document.querySelectorAll('.canvas')].every(place => place.dataset.drawn)")


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_there_without_sideways_scroll(opened, report, width):
    page = opened(report, width)
    for name in SECTIONS:
        assert page.locator(f"#{name} h1, #{name} h2").first.is_visible()
    draw_all(page)
    assert page.locator(".canvas .main-svg").count() >= 8
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("#images .cell img").count() == 2 * 8 * 4
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_prompt_with_a_script_stays_text(opened, report):
    page = opened(report)
    assert page.title() == "shown"
    assert "<script>document.title='taken'</script>" in page.locator("#images .card").first.inner_text()


def test_filters_show_what_changed(opened, report):
    page = opened(report)
    gallery = page.locator("#images [data-gallery]").first
    shown = gallery.locator(".card:not([hidden])")
    everything = shown.count()
    gallery.get_by_role("button", name="Verdict changed").click()
    changed = gallery.locator(".card[data-changed=yes]").count()
    assert shown.count() == changed > 0
    assert gallery.locator(".found").inner_text() == f"{shown.count()} prompts"
    gallery.get_by_role("button", name="All").click()
    gallery.get_by_label("Skill").select_option(index=1)
    assert shown.count() < everything


def test_the_slider_compares_by_keyboard(opened, report):
    page = opened(report)
    page.locator("#images .cell").nth(3).focus()
    page.keyboard.press("Enter")
    dialog = page.locator("#compare")
    assert dialog.is_visible() and "SFT" in page.locator("#before-name").inner_text()
    assert "GRPO" in page.locator("#after-name").inner_text()
    before = page.locator("#after").evaluate("image => image.style.clipPath")
    page.keyboard.press("ArrowRight")
    assert page.locator("#after").evaluate("image => image.style.clipPath") != before
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_pairs_are_sorted_by_margin(opened, report):
    page = opened(report)
    gallery = page.locator("#pairs [data-gallery]").first
    gallery.get_by_label("Sort").select_option("reward down")
    margins = gallery.locator(".card").evaluate_all("cards => cards.map(card => Number(card.dataset.reward))")
    assert margins == sorted(margins, reverse=True) and len(set(margins)) > 1


def test_the_page_is_accessible(opened, report):
    page = opened(report)
    draw_all(page)
    assert_accessible(page)


@pytest.mark.parametrize("done", [0, 9])
def test_unfinished_runs_are_shown_too(opened, tmp_path, done):
    page = opened(write_page([make_run(tmp_path / "run", done=done)]), 390)
    assert page.locator(".chip").first.inner_text() == "stopped"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_two_runs_are_shown_side_by_side(opened, finished_run, tmp_path):
    other = make_run(tmp_path / "other")
    page = opened(write_page([finished_run, other], tmp_path / PAGE), 390)
    assert page.locator("#images .card").first.locator(".cell").count() == 8
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

"""A real browser for pages; tests skip where there is none."""

import os
from pathlib import Path

import pytest

from tests.helpers.run_folder import make_run

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))


@pytest.fixture(scope="session")
def chromium():
    """Start Chromium once. Skip, with the reason, where it or playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM} (Debian: apt install chromium; CHROMIUM names another)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A finished run of two iterations whose first prompt is a script."""
    script = "<script>document.title='taken'</script>"
    return make_run(tmp_path_factory.mktemp("runs") / "shown", texts=(script, 'a "quoted" & <b>bold</b> circle'))

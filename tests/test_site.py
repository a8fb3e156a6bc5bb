"""The documentation builds as a site, without a broken link."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = {page for entry in nav for found in entry.values() for page in _pages(found)}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= pages


def _pages(found):
    return [found] if isinstance(found, str) else [page for entry in found for page in entry.values()]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mkdocs"), reason="needs the extra 'docs'")
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dpo.beta" in (tmp_path / "site/keys/index.html").read_text()
    assert "generate_images" in (tmp_path / "site/api/index.html").read_text()

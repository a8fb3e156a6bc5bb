"""Waiting for pages whose policy forbids what playwright's own waiting needs, and checks of accessibility."""

import time
from typing import Any

import pytest


def wait_until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Wait until a JavaScript expression is true; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds} s: {expression}"
        page.wait_for_timeout(50)


def assert_accessible(page: Any) -> None:
    """Run axe on a page; AssertionError with its report if it finds anything. Skip where axe is not installed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = axe.Axe().run(page, options={"rules": {"region": {"enabled": False}}})
    assert found.violations_count == 0, found.generate_report()

"""Waiting for pages whose policy forbids the evaluation of strings, which playwright's own waiting needs."""

import time
from typing import Any


def wait_until(page: Any, expression: str, seconds: float = 20.0) -> None:
    """Wait until a JavaScript expression is true; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds} s: {expression}"
        page.wait_for_timeout(50)

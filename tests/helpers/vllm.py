"""For tests that need vLLM: ``pytest -m vllm`` runs these alone; without it they are skipped, with the reason."""

from collections.abc import Callable

import pytest

from vargpt_rl.text.vllm_engine import is_installed


def needs_vllm(test: Callable) -> Callable:
    """Mark a test. An engine starts in seconds on a quiet machine and in a minute on a busy one."""
    missing = pytest.mark.skipif(not is_installed(), reason="vLLM is not installed (make setup-vllm)")
    return pytest.mark.vllm(pytest.mark.timeout(900)(missing(test)))

"""For tests that need vLLM: skipped, with the reason, where it is not installed."""

import pytest

from vargpt_rl.text.vllm_engine import is_installed

needs_vllm = pytest.mark.skipif(not is_installed(), reason="vLLM is not installed (make setup-vllm)")

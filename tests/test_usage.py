"""The usage text of the loop, which needs none of its libraries."""

import subprocess
import sys

import pytest

CHECK = """
import sys
from vargpt_rl.loop import main
assert main(sys.argv[1:]) == 0
assert not {"torch", "hydra", "ray", "transformers", "numpy"} & sys.modules.keys()
"""


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["seed=1", "--help"]])
def test_usage_imports_no_library(arguments):
    done = subprocess.run([sys.executable, "-c", CHECK, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m vargpt_rl.loop") and "examples:" in done.stdout

"""The usage text of the loop, which needs none of its libraries."""

import subprocess
import sys

import pytest

from vargpt_rl.common.usage import command_line

CHECK = """
import runpy, sys
try:
    runpy.run_module("vargpt_rl.loop", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "hydra", "ray", "transformers", "numpy"} & sys.modules.keys()
"""


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["seed=1", "--help"]])
def test_usage_imports_no_library(arguments):
    done = subprocess.run([sys.executable, "-c", CHECK, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m vargpt_rl.loop") and "examples:" in done.stdout


@pytest.mark.parametrize("folder", ["runs/a", "my runs/a", "it's/L\u00e4ufe", "$HOME/a;b", "a=b/#1"])
def test_commands_to_type_reach_a_program_as_meant(folder):
    echo = "vargpt-rl() { printf '%s|' \"$@\"; }; "
    line = command_line("chat", f"checkpoint={folder}")
    done = subprocess.run(["bash", "-c", echo + line], capture_output=True, text=True)
    assert done.stdout == f"chat|checkpoint={folder}|"

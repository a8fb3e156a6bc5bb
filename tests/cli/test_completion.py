"""Completion of keys and runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from vargpt_rl.cli.completion import complete_keys, complete_runs, find_run, run_folders


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    (tmp_path / "runs" / "chat").mkdir()
    return tmp_path / "runs"


def test_keys_complete_level_by_level_with_their_meaning():
    complete = complete_keys(("configs.schema:LoopConfig",))
    assert ("dpo.", "DPO on the pairs of the iteration.") in complete("dp")
    assert [key for key, _ in complete("dpo.rec")] == ["dpo.recipe."]
    assert "dpo.recipe.steps=" in [key for key, _ in complete("dpo.recipe.")]
    assert complete("nothing") == []


def test_groups_and_keys_of_one_resolution_complete():
    complete = complete_keys(("configs.schema:LoopConfig",))
    assert "experiment=" in [key for key, _ in complete("exp")]
    assert len(complete("experiment=")) > 3 and complete("experiment=qu") == [("experiment=quick", "")]
    assert [key for key, _ in complete("at.256.dpo.bet")] == ["at.256.dpo.beta="]
    assert "at.256.sft." in [key for key, _ in complete("at.256.")]
    assert complete("dpo.beta=") == []
    assert complete_keys(("vargpt_rl.chat:ChatConfig",))("experiment=") == []


def test_runs_complete_by_folder_and_by_name(runs):
    assert complete_runs("runs/f") == ["runs/first"]
    assert complete_runs("sec") == ["second"]
    assert {folder.name for folder in run_folders()} == {"first", "second"}


def test_a_run_is_found_by_name_or_folder(runs):
    assert find_run("first").resolve() == find_run(str(runs / "first")).resolve() == runs / "first"


def test_an_unknown_run_names_the_nearest(runs):
    with pytest.raises(ValueError, match="did you mean first"):
        find_run("frist")
    with pytest.raises(ValueError, match=r"expected a folder with state\.json"):
        find_run("zzzzz")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["vargpt-rl", "dr"], "draw"),
        (["vargpt-rl", "run", "dpo.bet"], "dpo.beta="),
        (["vargpt-rl", "cluster", "launch", "dpo.bet"], "dpo.beta="),
        (["vargpt-rl", "run", "experiment=qu"], "experiment=quick"),
        (["vargpt-rl", "resume", "runs/"], "runs/first"),
        (["vargpt-rl", "eval", "sha"], "shapes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_shell_completes(runs, words, expected):
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_VARGPT_RL_COMPLETE": "complete_bash",
    }
    done = subprocess.run([sys.executable, "-m", "vargpt_rl"], env=environment, capture_output=True, text=True)
    assert expected in done.stdout.split()

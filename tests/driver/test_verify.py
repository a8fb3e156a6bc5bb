"""A run with damaged files goes back to before they were made."""

from pathlib import Path

import pytest
import torch

from tests.helpers.preferences import row
from vargpt_rl.data.preferences import write_table
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.verify import check_steps
from vargpt_rl.storage.checkpoint import save_checkpoint

STEPS = [
    "understands/before",
    "iter-00/sft",
    "iter-00/after_sft",
    "iter-00/sample",
    "iter-00/judge",
    "iter-00/pair",
    "iter-00/dpo",
    "iter-00/after_dpo",
]


@pytest.fixture
def run(tmp_path) -> Run:
    """A run that has done these steps, each with its files."""
    run = Run(tmp_path / "run", {})
    (run.directory / "preferences").mkdir()
    weights = {"iter-00/sft": ("iter-00-sft/step-000002", "iter-00-sft/final"), "iter-00/dpo": ("iter-00-dpo/final",)}
    tables = {"iter-00/after_sft": "iter-00-held-out", "iter-00/pair": "iter-00"}
    for step in STEPS:
        for name in weights.get(step, ()):
            save_checkpoint(run.directory / "checkpoints" / name, {"weight": torch.arange(100.0)})
        if name := tables.get(step):
            write_table(run.directory / "preferences" / f"{name}.parquet", [row("a", chosen_bits=bytes(range(200)))])
        run.step(step, lambda step=step: {"pairs": 1} if step == "iter-00/after_sft" else {})
    return run


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(bytes(range(50, 60))) if file.suffix == ".parquet" else -1] ^= 1
    file.write_bytes(data)


def test_a_run_without_preferences_needs_no_table(tmp_path):
    run = Run(tmp_path / "run", {})
    run.step("iter-00/after_sft", lambda: {"overall": 0.5})
    check_steps(run)
    assert list(run.state["steps"]) == ["iter-00/after_sft"] and run.state["events"] == []


@pytest.mark.parametrize(
    ("file", "writer", "user"),
    [
        ("rollouts/iter-00/samples.parquet", "iter-00/sample", "iter-00/pair"),
        ("rollouts/iter-00-grpo/batch-00000.parquet", "iter-00/grpo", "iter-00/grpo"),
        ("samples/iter-00/before-00.png", "iter-00/before", None),
    ],
)
def test_files_that_were_used_up_are_not_missed(tmp_path, file, writer, user):
    """A run that was killed between deleting them and recording the step that used them resumes where it was."""
    run = Run(tmp_path / "run", {})
    path = run.directory / file
    path.parent.mkdir(parents=True)
    run.step(writer, lambda: path.write_bytes(b"data") and {})
    path.unlink()
    if user is None:
        path.parent.with_suffix(".png").write_bytes(b"grid")
    elif user != writer:
        run.state["steps"][user] = {}  # recorded, but the files were not looked at again
        (run.directory / "preferences").mkdir()
        write_table(tmp_path / "run/preferences/iter-00.parquet", [row("a", chosen_bits=bytes(range(200)))])
    steps = list(run.state["steps"])
    check_steps(run)
    assert list(run.state["steps"]) == steps and run.state["events"] == []


def test_a_whole_run_stays_as_it_is(run):
    check_steps(run)
    assert list(run.state["steps"]) == STEPS and run.state["events"] == []


@pytest.mark.parametrize(
    ("file", "step"),
    [
        ("checkpoints/iter-00-sft/step-000002/weights.safetensors", "iter-00/sft"),
        ("checkpoints/iter-00-sft/final/weights.safetensors", "iter-00/sft"),
        ("checkpoints/iter-00-dpo/final/weights.safetensors", "iter-00/dpo"),
        ("preferences/iter-00-held-out.parquet", "iter-00/after_sft"),
        ("preferences/iter-00.parquet", "iter-00/pair"),
    ],
)
@pytest.mark.parametrize("damage", ["byte", "missing"])
def test_the_step_whose_file_is_damaged_is_done_again_and_all_after_it(run, file, step, damage):
    (flip if damage == "byte" else Path.unlink)(run.directory / file)
    check_steps(run)
    again = Run(run.directory, {})
    assert list(again.state["steps"]) == STEPS[: STEPS.index(step)]
    (event,) = again.state["events"]
    assert event.startswith(f"redoing {step}: ") and str(Path(file).parent) in event

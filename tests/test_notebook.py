"""The notebook runs from top to bottom, with a smaller run in the place of its settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples/draw_and_align.ipynb"
SMALL = """name = "small"
settings = [
    *("evaluation.prompts=4", "evaluation.grid=2", "rollout.workers=1", "learner.ranks=1", "tracking.wandb=disabled"),
    *("at.256.rl.recipe.steps=2", "rl.prompts=4", "rl.group=4", "rl.recipe.batch=16", "rl.recipe.micro_batch=4"),
]
"""


def cells():
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_is_kept_without_outputs():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in cells()}) == len(cells())
    assert [cell["metadata"].get("tags") for cell in code].count(["parameters"]) == 1


@pytest.mark.loop
@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path):
    sources = [
        SMALL if cell["metadata"].get("tags") == ["parameters"] else "".join(cell["source"])
        for cell in cells()
        if cell["cell_type"] == "code"
    ]
    (tmp_path / "notebook.py").write_text("\n\n".join(sources))
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/small/samples/iter-00.png").exists() and (tmp_path / "runs/small/report.html").exists()
    assert "iteration 0, 256 px: GRPO against the start on the same 4 images" in done.stdout

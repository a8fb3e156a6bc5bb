"""Training checkpoints on disk: hashes tell the good from the damaged, and old ones go by rule."""

from pathlib import Path

import pytest

from learners.checkpoints import LAYOUT, Layout, check, last_checkpoint, mark, prune, read_layout, write_layout
from learners.config import LearnerConfig
from vargpt_rl.storage.checkpoint import MARKER


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints after 2, 4, 6, 8 and 10 steps, each with a file of its own and one in a sub-folder."""
    for step in range(2, 12, 2):
        checkpoint = tmp_path / f"checkpoint-{step:06d}"
        (checkpoint / "global_step").mkdir(parents=True)
        (checkpoint / "state").write_text(f"state {step}")
        write_layout(checkpoint, Layout(ranks=2, micro_batch=4, zero=2, seed=0), step)
        (checkpoint / "global_step/optimizer.pt").write_bytes(bytes(range(step)))
        mark(checkpoint)
    return tmp_path


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in sorted(folder.glob("checkpoint-*"))]


@pytest.mark.parametrize("damage", ["byte", "length", "missing", "marker"])
def test_a_damaged_checkpoint_is_named_and_the_previous_used(folder, damage):
    assert last_checkpoint(folder) == (folder / "checkpoint-000010", [])
    file = folder / "checkpoint-000010/global_step/optimizer.pt"
    changed = bytearray(file.read_bytes())
    changed[3] ^= 1
    if damage == "byte":
        file.write_bytes(changed)
    elif damage == "length":
        file.write_bytes(changed[:-1])
    else:
        (file if damage == "missing" else folder / "checkpoint-000010" / MARKER).unlink()
    found, (reason,) = last_checkpoint(folder)
    assert found == folder / "checkpoint-000008"
    assert reason.startswith(f"training checkpoint {folder}/checkpoint-000010: ")
    assert {"missing": "optimizer.pt is missing", "marker": "incomplete"}.get(
        damage, "size or blake2b differs"
    ) in reason
    with pytest.raises(ValueError, match="checkpoint-000010"):
        check(folder / "checkpoint-000010")


def test_without_a_good_checkpoint_the_stage_restarts(folder, tmp_path):
    for path in folder.glob("checkpoint-*/state"):
        path.write_text("torn")
    found, refused = last_checkpoint(folder)
    assert found is None and len(refused) == 5
    assert last_checkpoint(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize(
    ("last", "every", "left"),
    [(2, None, [8, 10]), (1, 4, [4, 8, 10]), (0, 4, [4, 8]), (9, None, [2, 4, 6, 8, 10]), (0, None, [])],
)
def test_pruning_keeps_the_newest_and_every_nth_step(folder, last, every, left):
    prune(folder, last, every)
    assert steps(folder) == left
    assert folder.exists() == bool(left)
    prune(folder, last, every)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"keep_every": 300}, "learner.keep_every=300: expected null or a multiple of save_every=200"),
        ({"keep_every": 300, "save_every": None}, "learner.keep_every=300"),
    ],
)
def test_impossible_learner_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        LearnerConfig(**settings)


def test_a_layout_tells_what_differs(folder):
    layout, updates = read_layout(folder / "checkpoint-000004")
    assert (layout, updates) == (Layout(ranks=2, micro_batch=4, zero=2, seed=0), 4)
    other = Layout(ranks=1, micro_batch=4, zero=3, seed=5)
    assert other.differences(layout) == "learner.ranks=1 instead of 2, zero=3 instead of 2"
    assert layout.differences(layout) == "" and not other.reads_as(layout)
    assert Layout(ranks=2, micro_batch=4, zero=0, seed=1).reads_as(layout)


def test_a_checkpoint_without_a_layout_is_refused(folder):
    (folder / "checkpoint-000010" / LAYOUT).unlink()
    mark(folder / "checkpoint-000010")
    found, (reason,) = last_checkpoint(folder)
    assert found == folder / "checkpoint-000008" and reason.endswith(f"{LAYOUT} is missing")

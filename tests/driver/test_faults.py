"""Faults of a whole run: whatever dies, hangs or fills up, it ends in the preference tables and the summary of a run
that nothing happened to. Real processes, the smallest model, a deadline for each start.

``make test-faults`` runs these; ``make test`` does not, and has what is quick about faults beside what it is about.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.helpers.faults import ask
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl.common.failpoints import VARIABLE
from vargpt_rl.driver.run import differences
from vargpt_rl.driver.session import Step
from vargpt_rl.storage.lock import HOLDER, LOCK

pytestmark = [pytest.mark.faults, pytest.mark.timeout(7200)]

ROOT = Path(__file__).parents[2]
SMALL = """
stages=[align] align.methods=[dpo] reward.path=null
iterations=1 resolutions=[32] learner.ranks=1 learner.save_every=1 rollout.workers=1 rollout.batch_size=4
sft.records=8 sft.recipe.steps=3 sft.recipe.batch=4 sft.recipe.micro_batch=2
dpo.recipe.steps=3 dpo.recipe.batch=4 dpo.recipe.micro_batch=2
preference.count=8 evaluation.prompts=4 evaluation.questions=4 evaluation.grid=2 tracking.wandb=disabled
"""
STEPS = [
    "understands/before",
    *(f"iter-00/{step}" for step in Step if step not in (Step.REWARD, Step.ENCODE, Step.PROPOSE)),
    "understands/after",
]
TIMES = ("seconds", "images_per_second", "time", "mfu", "peak_memory")
"""Fields of a summary that differ between equal runs."""
DEADLINE_S = 600.0


class Ran:
    """One start of the loop: its exit code (negative: the signal), output, faults that did not come about, and
    processes that are left (and killed then).

    ``disturb`` is called with the driver's process every tenth of a second until it returns True.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *overrides: str,
        runs: Path | None = None,
        faults: dict[str, str] | None = None,
        disturb: Callable[[psutil.Process], bool] = lambda driver: True,
    ):
        points = folder / "faults" / name
        points.mkdir(parents=True, exist_ok=True)
        for point, fault in (faults or {}).items():
            ask(points, point, fault)
        log, model = folder / f"{name}.log", folder / "model"
        arguments = [f"runs={runs or folder}", f"checkpoint={model}", f"name={name}", *SMALL.split(), *overrides]
        command, environment = (
            [sys.executable, "-m", "vargpt_rl.loop", *arguments],
            os.environ | {VARIABLE: str(points)},
        )
        with log.open("w") as output:
            driver = psutil.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            end, done, started = time.monotonic() + DEADLINE_S, False, set()
            while driver.poll() is None:
                done = done or disturb(driver)
                with suppress(psutil.NoSuchProcess):
                    started |= set(driver.children(recursive=True))
                if time.monotonic() > end:
                    driver.kill()
                time.sleep(0.1)
        self.ended = time.monotonic()
        self.code, self.said = driver.wait(), log.read_text()
        self.left = [str(path.relative_to(points)) for path in points.rglob("*") if path.is_file()]
        # Ray's own agents outlive a driver that is killed by a minute and more: there it is not worth waiting.
        _, alive = psutil.wait_procs(started, timeout=0 if self.code < 0 else 60)
        self.orphans = []
        for orphan in alive:
            with suppress(psutil.NoSuchProcess):
                self.orphans.append(orphan.name())
                orphan.kill()


def outcome(directory: Path, but: tuple[str, ...]) -> tuple[dict[str, pd.DataFrame], dict]:
    """The preference tables and the summary, without times and what ``but`` names of both."""

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(each) for key, each in value.items() if key not in (*TIMES, *but)}
        return dict(enumerate(map(timeless, value))) if isinstance(value, list) else value

    tables = {
        path.name: pd.read_parquet(path).drop(columns=[*but], errors="ignore")
        for path in sorted((directory / "preferences").glob("*.parquet"))
    }
    return tables, timeless(json.loads((directory / "summary.json").read_text()))


def same(directory: Path, undisturbed: Path, but: tuple[str, ...] = ()) -> list[str]:
    """Return the recorded faults. Fails unless tables, summary and grids equal those of the undisturbed run."""
    but += ("events", "restarts")
    (tables, summary), (expected, reference) = outcome(directory, but), outcome(undisturbed, but)
    assert differences(reference, summary) == []
    assert tables.keys() == expected.keys() and len(tables) == 2
    for name, table in expected.items():
        pd.testing.assert_frame_equal(tables[name], table)
    for image in {*(undisturbed / "samples").iterdir()} - {undisturbed / "samples" / name for name in but}:
        assert (directory / "samples" / image.name).read_bytes() == image.read_bytes(), image.name
    assert {path.name for path in directory.rglob(".*")} <= {LOCK, HOLDER}, "nothing unfinished is left"
    return json.loads((directory / "summary.json").read_text())["events"]


def flip(file: Path) -> None:
    """Damage one byte in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny_checkpoint(folder / "model")
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    ran = Ran(folder, "undisturbed")
    assert ran.code == 0, ran.said[-3000:]
    assert ran.orphans == []
    return folder / "undisturbed"


def test_the_driver_is_killed_at_every_step(folder, undisturbed):
    """When the work of a step is done and nothing is recorded: so its files are there, and it is done again."""
    for step in STEPS:
        ran = Ran(folder, "driver", faults={step: "kill"})
        assert (ran.code, ran.left) == (-signal.SIGKILL, []), (step, ran.said[-3000:])
    ran = Ran(folder, "driver")
    assert ran.code == 0, ran.said[-3000:]
    assert same(folder / "driver", undisturbed) == [f"resuming after {step}" for step in STEPS[:-1]]


def test_learner_ranks_are_killed_in_sft_in_dpo_and_while_saving(folder):
    faults = ["iter-00-sft/rank-1/step-2", "iter-00-sft/final/written", "iter-00-dpo/rank-0/step-2"]
    faults += ["iter-00-dpo/rank-1/save", "iter-00-dpo/checkpoint/marked", "iter-00-dpo/checkpoint/there"]
    limit = f"learner.max_restarts={len(faults)}"
    whole = Ran(folder, "two-ranks", "learner.ranks=2")
    assert whole.code == 0, whole.said[-3000:]
    ran = Ran(folder, "ranks", "learner.ranks=2", limit, faults=dict.fromkeys(faults, "kill"))
    assert (ran.code, ran.left, ran.orphans) == (0, [], []), ran.said[-3000:]
    lost = ["sft", "sft", "dpo", "dpo", "dpo", "dpo"]
    assert same(folder / "ranks", folder / "two-ranks") == [
        f"learner rank lost during {stage}: restart {i} of {len(faults)}" for i, stage in enumerate(lost, start=1)
    ]


def test_workers_are_killed_drawing_and_in_a_swap_and_hang_and_a_reward_never_answers(folder, undisturbed):
    (folder / "never.py").write_text("import time\n\n\ndef never(images, prompts):\n    time.sleep(10**6)\n")
    terms = "+reward.options.terms"
    reward = ["reward.path=rewards.combined:WeightedSum", f"{terms}.sharp.path=rewards.technical:sharpness"]
    reward += [f"{terms}.never.path={folder}/never.py:never", f"{terms}.never.required=false"]
    reward += [f"{terms}.never.timeout_s=1", f"{terms}.never.retries=0"]
    faults = {"worker/generate_images": "kill", "worker/swap": "kill", "worker/score": "hang"}
    ran = Ran(folder, "workers", "rollout.call_timeout_s=120", *reward, faults=faults)
    assert (ran.code, ran.left, ran.orphans) == (0, [], []), ran.said[-3000:]
    rewards = "chosen_reward", "rejected_reward", "rewards"
    assert same(folder / "workers", undisturbed, but=rewards) == [
        f"worker 0 lost during {during}: restart {i} of 3"
        for i, during in enumerate(["generate_images", "receive", "score"], start=1)
    ]
    lines = map(json.loads, (folder / "workers/metrics.jsonl").read_text().splitlines())
    (never,) = [line for line in lines if line["stage"] == "reward/never"]
    assert never["scored"] == 0 and never["unscored/timeout"] > 0


def test_a_disk_is_full_and_files_are_damaged(folder, undisturbed, small_disk):
    """The disk is a real one, too full for a training checkpoint; at the table, the error is injected."""
    run, ballast = small_disk / "disk", small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2_000_000))
    ran = Ran(folder, "disk", runs=small_disk)
    assert ran.code == 1 and not list(run.glob("checkpoints/*/trainer/checkpoint-*")), ran.said[-3000:]
    assert re.search(r"no room for a checkpoint, which needs [0-9,]+ bytes: the disk has [0-9,]+", ran.said)
    ballast.unlink()

    ran = Ran(folder, "disk", runs=small_disk, faults={"iter-00.parquet/written": "full"})
    assert ran.code == 1 and "No space left on device" in ran.said, ran.said[-3000:]
    assert ran.left == [] and not list(run.glob("preferences/iter-00.parquet*")), "no half of a table"
    weights = run / "checkpoints/iter-00-sft/final/weights.safetensors"
    flip(weights)

    ran = Ran(folder, "disk", runs=small_disk, faults={"iter-00/dpo": "kill"})
    assert (ran.code, ran.left) == (-signal.SIGKILL, []), ran.said[-3000:]
    trainer = run / "checkpoints/iter-00-dpo/trainer"
    assert sorted(path.name for path in trainer.iterdir()) == ["checkpoint-000001", "checkpoint-000002"]
    flip(max((trainer / "checkpoint-000002").glob("state-*.safetensors")))

    ran = Ran(folder, "disk", runs=small_disk)
    assert ran.code == 0, ran.said[-3000:]
    first, again, on, _, refused = same(run, undisturbed)
    assert first == "resuming after iter-00/before"
    assert again.startswith(f"redoing iter-00/sft: checkpoint {weights.parent}: weights.safetensors is not what")
    assert on == "resuming after iter-00/before"
    assert refused.startswith(f"training checkpoint {trainer}/checkpoint-000002: ")
    assert refused.endswith("is not what was written (size or blake2b differs); resuming from checkpoint-000001")


def test_rays_head_is_killed(folder, undisturbed):
    def kill_head(driver: psutil.Process) -> bool:
        if not list((folder / "head/checkpoints/iter-00-sft/trainer").glob("checkpoint-*")):
            return False
        (head,) = [child for child in driver.children(recursive=True) if child.name() == "gcs_server"]
        head.kill()
        return True

    ran = Ran(folder, "head", disturb=kill_head)
    assert ran.code not in (0, 2), ran.said[-3000:]
    assert not [name for name in ran.orphans if "Rank" in name or "Worker" in name]
    assert not (folder / "head/summary.json").exists()
    ran = Ran(folder, "head")
    assert ran.code == 0, ran.said[-3000:]
    (event,) = same(folder / "head", undisturbed)
    assert event.startswith("resuming after iter-00/")

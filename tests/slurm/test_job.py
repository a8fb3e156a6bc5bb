"""Jobs on a real Slurm, real Ray and DeepSpeed: two nodes, time limits, lost nodes, exit codes, and what is left."""

import json
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import Slurm, wait_for
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = """
iterations=1 resolutions=[32] stages=[pretrain,align] rollout.workers=2 learner.ranks=2 placement=colocated
pretrain.records=4 pretrain.recipe.steps=1 pretrain.recipe.batch=4 pretrain.recipe.micro_batch=2
sft.records=8 sft.checkpoints=[] sft.recipe.steps=2 sft.recipe.batch=4 sft.recipe.micro_batch=2
dpo.recipe.steps=2 dpo.recipe.batch=4 dpo.recipe.micro_batch=2 dpo.control=false
preference.count=4 evaluation.prompts=4 evaluation.questions=2 evaluation.grid=2
"""
in_a_checkout = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="the tests do not run in a git checkout"
)
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


class Job:
    """A loop that is submitted with ``sbatch``, or ``launch``ed. It writes temporary files below ``scratch``."""

    def __init__(self, slurm: Slurm, folder: Path, name: str, settings: str, asked: list[str], launch: bool = False):
        self.slurm, self.directory = slurm, folder / name
        self.scratch = slurm.folder / name  # a short path, for sockets
        self.scratch.mkdir()
        own = [f"runs={folder}", f"name={name}", f"checkpoint={folder}/model", *settings.split()]
        # The working directory is not the root of the code.
        if launch:
            command = [sys.executable, "-m", "vargpt_rl.launch", f"setup=export TMPDIR={self.scratch}"]
            self.number = slurm(*command, *asked, *own, cwd=folder).split()[-1]
            self.log = self.directory / f"slurm/{self.number}.log"
            return
        text, marker = (ROOT / "slurm/loop.sbatch").read_text(), "# -- settings of the site\n"
        assert marker in text
        script, self.log = folder / f"{name}.sbatch", folder / f"{name}.log"
        script.write_text(text.replace(marker, f"code={ROOT} python={sys.executable}\n"))
        exported = f"--export=ALL,TMPDIR={self.scratch}"
        command = ["sbatch", "--parsable", f"--output={self.log}", exported, *asked, str(script)]
        self.number = slurm(*command, *own, cwd=folder)

    def shown(self, what: str) -> str:
        return self.slurm.job(self.number)[what]

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def steps(self) -> list[str]:
        state = self.directory / "state.json"
        return list(json.loads(state.read_text())["steps"]) if state.exists() else []

    def wait(self, condition, seconds: float = 300) -> None:
        """Until the condition holds; a job that ends before has failed the test."""

        def situation() -> str:
            return f"{self.shown('JobState')}:\n{self.said()[-3000:]}"

        wait_for(lambda: condition() or self.shown("JobState") in OVER, seconds, situation)
        assert condition(), situation()

    def start_now(self) -> None:
        """Slurm lets a requeued job wait for two minutes."""
        self.slurm("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def exit_code(self) -> str:
        self.wait(lambda: self.shown("JobState") in OVER)
        return self.shown("ExitCode").split(":")[0]

    def leaves_nothing(self, seconds: float = 45) -> None:
        """No process within so many seconds, no token, no files but the run's; but Ray's logs of every node."""
        running = self.slurm.processes
        wait_for(lambda: not running(self.number), seconds, lambda: f"left: {running(self.number)}")
        assert not list(self.directory.glob("slurm/*/token"))
        assert not list(self.scratch.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    tiny_checkpoint(folder / "model")
    return folder


@pytest.mark.timeout(1200)
def test_a_run_is_cut_requeued_loses_a_node_and_completes(slurm, folder):
    job = Job(slurm, folder, "whole", SMALL, ["--nodes=2"])
    job.wait(lambda: "pretrain" in job.steps())
    (token,) = job.directory.glob("slurm/*.0/token")
    secret = token.read_text()
    assert len(secret) == 64 and stat.S_IMODE(token.stat().st_mode) == 0o600
    assert not any(secret in " ".join(process.cmdline()) for process in slurm.processes(job.number))

    # What Slurm sends before the time limit.
    slurm("scancel", "--batch", "--signal=USR2", job.number)
    job.wait(lambda: job.shown("Restarts") == "1")
    job.leaves_nothing()
    job.start_now()
    assert {path.name for path in job.directory.glob("slurm/*.0/*-ray")} == {"node1-ray", "node2-ray"}
    done = len(job.steps())

    # A node is lost: Slurm ends the job and puts it back into the queue by itself.
    job.wait(lambda: len(job.steps()) > done)
    slurm("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    job.wait(lambda: job.shown("Restarts") == "2")
    job.leaves_nothing()
    slurm("scontrol", "update", "NodeName=node2", "State=RESUME")
    job.start_now()

    assert job.exit_code() == "0", job.said()
    job.leaves_nothing()
    summary = json.loads((job.directory / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["restarts"] == 0
    (iteration,) = summary["iterations"]
    assert iteration["pairs"]["built"] + iteration["pairs"]["dropped"] == 4
    assert iteration["swap"]["verified"] and iteration["dpo"]["step0_max_abs_logratio"] <= 1e-4
    assert "going on after" in job.said() and secret not in job.said()
    for path in job.directory.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_a_wrong_setting_ends_the_job_with_2_before_ray_is_started(slurm, folder):
    job = Job(slurm, folder, "wrong", "dpo.bta=1", [])
    assert job.exit_code() == "2"
    assert "bta" in job.said() and not job.directory.exists()
    job.leaves_nothing()


@in_a_checkout
@pytest.mark.timeout(600)
def test_a_launched_job_names_the_missing_gpus_at_the_deadline(slurm, folder, monkeypatch):
    monkeypatch.setitem(slurm.environ, "VARGPT_RL_READY_S", "20")
    monkeypatch.setitem(slurm.environ, "PYTHONPATH", str(ROOT))
    job = Job(slurm, folder, "gpus", SMALL, ["nodes=2", "gpus_per_node=1"], launch=True)
    assert job.exit_code() == "1"
    assert "node1 has 0 of 1 GPUs, node2 has 0 of 1 GPUs" in job.said()
    job.leaves_nothing()


@pytest.mark.timeout(600)
def test_a_learner_that_dies_ends_the_job_with_1(slurm, folder):
    job = Job(slurm, folder, "dies", f"{SMALL} pretrain.recipe.steps=500", ["--nodes=1"])
    log = job.directory / "checkpoints/pretrain/log.jsonl"
    job.wait(lambda: log.exists() and log.read_text())
    rank = next(process for process in slurm.processes(job.number) if process.name().startswith("ray::Rank"))
    rank.send_signal(signal.SIGKILL)
    assert job.exit_code() == "1"
    job.leaves_nothing()

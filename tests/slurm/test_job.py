"""Jobs on a real Slurm, real Ray and DeepSpeed: two nodes, time limits, lost nodes, exit codes, and what is left.

Deadlines are for machines that are busy with much else.
"""

import json
import shutil
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest

from tests.helpers.access import listening, nodes_shown
from tests.helpers.tiny import tiny_checkpoint
from tests.slurm.conftest import Slurm, wait_for

ROOT = Path(__file__).parents[2]
SMALL = """
iterations=1 resolutions=[32] stages=[pretrain,align] align.methods=[dpo] reward.path=null
rollout.workers=2 learner.ranks=2 placement=colocated
pretrain.records=4 pretrain.recipe.steps=1 pretrain.recipe.batch=4 pretrain.recipe.micro_batch=2
sft.records=8 sft.checkpoints=[] sft.recipe.steps=2 sft.recipe.batch=4 sft.recipe.micro_batch=2
dpo.recipe.steps=2 dpo.recipe.batch=4 dpo.recipe.micro_batch=2 dpo.control=false
preference.count=4 evaluation.prompts=4 evaluation.questions=2 evaluation.grid=2
"""
HELD = """
import pathlib, time
from rewards.preferences import external_winner
def held(samples, winners, rewards, winner_rewards):
    while samples and pathlib.Path({hold!r}).exists():
        time.sleep(0.1)
    return external_winner(samples, winners, rewards, winner_rewards)
"""
SECRETS = {"WANDB_API_KEY": "5ec4e7" * 6 + "abcd", "HF_TOKEN": "hf_" + "NotSeen" * 5, "REWARD_TOKEN": "not-to-be-seen"}
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

    def wait(self, condition, seconds: float = 1200) -> None:
        """Until the condition holds; a job that ends before has failed the test."""

        def situation() -> str:
            return f"{self.shown('JobState')}:\n{self.said()[-3000:]}"

        wait_for(lambda: condition() or self.over(), seconds, situation)
        assert condition(), situation()

    def over(self) -> bool:
        """For good: one that puts itself back into the queue has failed for a moment."""
        for _ in range(5):
            if self.shown("JobState") not in OVER:
                return False
            time.sleep(1)
        return True

    def start_now(self) -> None:
        """Slurm lets a requeued job wait for two minutes, from when it has let go of the nodes.

        In the same second they would still take it for the one that was ended.
        """
        self.wait(lambda: self.shown("JobState") == "PENDING")
        time.sleep(5)
        self.update("StartTime=now", "TimeLimit=60")

    def end_in_five_minutes(self) -> None:
        """Which is when the run is to be told."""
        minutes, _ = self.shown("RunTime").split(":")[1:]
        self.update(f"TimeLimit={int(minutes) + 5}")

    def update(self, *changes: str) -> None:
        self.slurm("scontrol", "update", f"JobId={self.number}", *changes)

    def exit_code(self) -> str:
        self.wait(self.over)
        return self.shown("ExitCode").split(":")[0]

    def leaves_nothing(self, seconds: float = 120) -> None:
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


@pytest.mark.timeout(3600)
def test_a_run_survives_its_time_limit_and_a_lost_node(slurm, folder, monkeypatch, tmp_path):
    for name, value in SECRETS.items():
        monkeypatch.setitem(slurm.environ, name, value)
    hold = folder / "hold"  # while it exists, the run waits for it before it makes pairs
    hold.touch()
    (folder / "held.py").write_text(HELD.format(hold=str(hold)))
    job = Job(slurm, folder, "whole", f"{SMALL} preference.builder=held.py:held", ["--nodes=2"])
    job.wait(lambda: "iter-00/after_sft" in job.steps())
    secret = keeps_to_itself(job, tmp_path)

    job.end_in_five_minutes()
    job.wait(lambda: job.shown("Restarts") == "1")
    job.leaves_nothing()
    assert "SIGUSR2: stopping" in job.said()
    assert {path.name for path in job.directory.glob("slurm/*.0/*-ray")} == {"node1-ray", "node2-ray"}
    done = job.steps()
    job.start_now()

    # A node is lost: Slurm ends the job and puts it back into the queue by itself.
    job.wait(lambda: job.said().count("resuming after") == 1)
    slurm("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    job.wait(lambda: job.shown("Restarts") == "2")
    job.leaves_nothing()
    assert job.steps() == done
    slurm("scontrol", "update", "NodeName=node2", "State=RESUME")
    hold.unlink()
    job.start_now()

    assert job.exit_code() == "0", job.said()
    job.leaves_nothing()
    summary = json.loads((job.directory / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["restarts"] == 0
    (iteration,) = summary["iterations"]
    assert iteration["pairs"]["built"] + iteration["pairs"]["dropped"] == 4
    assert iteration["swap"]["verified"] and iteration["dpo"]["step0_max_abs_logratio"] <= 1e-4
    assert summary["events"] == [f"resuming after {done[-1]}"] * 2
    written = [path for path in [job.log, *job.directory.rglob("*")] if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written) and any(path.parent.name == "node1-ray" for path in written)
    for path in written:
        text = path.read_bytes()
        found = [name for name, value in (SECRETS | {"Ray's token": secret}).items() if value.encode() in text]
        assert not found, f"{path} shows {found}"


def keeps_to_itself(job: Job, home: Path) -> str:
    """The cluster of a running job lets in who has its token, which is returned, and nobody else."""
    (token,) = job.directory.glob("slurm/*.0/token")
    secret = token.read_text()
    assert len(secret) == 64 and stat.S_IMODE(token.stat().st_mode) == 0o600
    processes = job.slurm.processes(job.number)
    assert not any(secret in " ".join(process.cmdline()) for process in processes)
    sockets, first = listening(processes), 20000 + 3 * int(job.number)
    port = next(port for port in range(first, first + 300, 3) if port in sockets)  # the next three, if these are taken
    address, dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}/api/jobs/"
    assert nodes_shown(address, secret, home) == 2
    assert nodes_shown(address, None, home) is None and nodes_shown(address, "0" * 64, home) is None
    assert sockets[port + 1] == {"127.0.0.1"}, "the dashboard's"
    allowed = urllib.request.Request(dashboard, headers={"Authorization": f"Bearer {secret}"})
    assert urllib.request.urlopen(allowed, timeout=60).status == 200
    with pytest.raises(HTTPError, match="401"):
        urllib.request.urlopen(dashboard, timeout=60)
    return secret


@pytest.mark.timeout(1800)
def test_a_bad_setting_ends_the_job_with_2(slurm, folder):
    job = Job(slurm, folder, "wrong", "dpo.bta=1", [])
    assert job.exit_code() == "2"
    assert "bta" in job.said() and not job.directory.exists()
    job.leaves_nothing()


@in_a_checkout
@pytest.mark.timeout(1800)
def test_missing_nodes_and_gpus_are_named(slurm, folder, monkeypatch):
    monkeypatch.setitem(slurm.environ, "VARGPT_RL_READY_S", "90")
    monkeypatch.setitem(slurm.environ, "PYTHONPATH", str(ROOT))
    python = folder / "python"  # on the second node Ray never starts
    hangs = '[[ ${SLURMD_NODENAME-} == node2 && "$*" == *slurm.node* ]] && exec sleep 600'
    python.write_text(f'#!/bin/bash\n{hangs}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    asked = ["nodes=2", "gpus_per_node=1", "partition=main", f"python={python}"]
    job = Job(slurm, folder, "gpus", SMALL, asked, launch=True)
    assert job.exit_code() == "1"
    assert "error: after 90 s node1 has 0 of 1 GPUs, node2 has no Ray" in job.said()
    job.leaves_nothing()
    # Only now, for jobs of one name wait for each other.
    script = job.directory / "slurm/loop.sbatch"
    slurm("sbatch", "--test-only", str(script))
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.timeout(1800)
def test_a_node_whose_ray_dies_ends_the_job_with_1(slurm, folder):
    job = Job(slurm, folder, "dies", f"{SMALL} pretrain.recipe.steps=5000", ["--nodes=2"])
    log = job.directory / "checkpoints/pretrain/log.jsonl"
    job.wait(lambda: log.exists() and log.read_text())

    def of_node2(process: psutil.Process) -> bool:
        return process.name() == "raylet" and process.environ()["SLURMD_NODENAME"] == "node2"

    (raylet,) = filter(of_node2, slurm.processes(job.number))
    raylet.kill()
    assert job.exit_code() == "1"
    job.leaves_nothing()

"""Soak of a whole run: a random process is killed or stopped at a random time, again and again.

``python -m tests.driver.soak minutes=15 seed=0 folder=build/soak`` runs rounds until the time is up. In each, one small
run is started and disturbed until it is done, by one fault a start. Its tables, summary, grids and weights must equal
those of an undisturbed run of the same variant, which is kept in ``folder`` for later calls. A line tells each round;
the exit code is 1 if any was wrong, hung or left a process.
"""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.driver.test_faults import SMALL, same
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl.common.command import run_command
from vargpt_rl.storage.checkpoint import MARKER

ROOT = Path(__file__).parents[2]
PATIENT = ["learner.stall_timeout_s=60", "rollout.call_timeout_s=90", "rollout.max_restarts=9", "rollout.keep_every=4"]
REWARD = [
    "reward.path=rewards.technical:sharpness",
    "preference.builder=rewards.preferences:best_of_n",
    "preference.samples=2",
]
VARIANTS = {
    "plain": [],
    "ranks": ["learner.ranks=2"],
    "reward": REWARD,
    "overlap": ["dpo.min_pairs=4", "rollout.workers=2"],
}
"""Settings of each variant, over those of ``tests.driver.test_faults``."""
RAYS = ("gcs_server", "raylet")
"""Processes of Ray's own that are hit; its agents and dashboards matter to no run."""
STARTS = 6
"""Most starts of a round; the last is not disturbed."""
ENDS_S = 90.0
"""Longest time until all processes of a start are gone."""


@dataclass
class SoakConfig:
    """Arguments."""

    minutes: float = 15.0
    seed: int = 0
    folder: str = "build/soak"
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))


@dataclass
class Start:
    """One start of a run: its exit code, None if it hung; processes it left; seconds; what was done to it."""

    code: int | None
    orphans: list[str]
    seconds: float
    fault: str


def main_processes(driver: psutil.Process) -> list[psutil.Process]:
    """Return the driver, its workers, ranks, rewards and data workers, and Ray's own two."""
    found = [driver]
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in driver.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                name = child.name()
                if name in RAYS or (name.startswith("ray::") and name != "ray::IDLE") or name.startswith("pt_data"):
                    found.append(child)
    return found


def hit(driver: psutil.Process, rng: random.Random) -> str:
    """Kill or stop a process, or send the driver a signal; return what was done. A stopped driver is continued."""
    victim = rng.choice(main_processes(driver))
    with contextlib.suppress(psutil.NoSuchProcess):
        name = "driver" if victim.pid == driver.pid else victim.name()
        faults = [signal.SIGKILL]
        if name not in RAYS:  # Ray takes a minute and more to notice that one of those is stopped
            faults.append(signal.SIGSTOP)
        if name == "driver":
            faults += [signal.SIGTERM, signal.SIGINT]
        fault = rng.choice(faults)
        victim.send_signal(fault)
        if name == "driver" and fault is signal.SIGSTOP:
            time.sleep(10)
            victim.send_signal(signal.SIGCONT)
        return f"{fault.name} {name}"
    return "nothing: it had ended"


def run_once(command: list[str], log: Path, limit_s: float, at_s: float | None, rng: random.Random) -> Start:
    """Start a run, disturb it after ``at_s`` seconds, and wait for its end."""
    began = time.monotonic()
    fault = ""
    seen: set[psutil.Process] = set()
    with log.open("a") as output:
        driver = psutil.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        while driver.poll() is None and time.monotonic() - began < limit_s:
            with contextlib.suppress(psutil.NoSuchProcess):
                seen |= set(driver.children(recursive=True))
            if at_s is not None and not fault and time.monotonic() - began > at_s:
                fault = f"{hit(driver, rng)} at {at_s:.0f} s"
            time.sleep(0.2)
    code = driver.poll()
    _, left = psutil.wait_procs(seen, timeout=ENDS_S if code is not None else 0)
    orphans = []
    for process in [*left, *([driver] if code is None else [])]:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphans.append(process.name())
            process.kill()
    return Start(code, orphans if code is not None else [], time.monotonic() - began, fault)


def weights(run: Path) -> dict[str, dict]:
    """Return the recorded hashes of all final weights of a run."""
    return {path.parent.parent.name: json.loads(path.read_text()) for path in run.glob(f"checkpoints/*/final/{MARKER}")}


def soak(config: SoakConfig) -> int:
    """Run rounds until the time is up; return the exit code."""
    end = time.monotonic() + 60 * config.minutes
    folder = Path(config.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model/config.json").exists():
        tiny_checkpoint(folder / "model")
    totals = dict.fromkeys(("rounds", "faults", "wrong", "hung", "orphans"), 0)
    number = 0
    while time.monotonic() < end:
        seed = 1000 * config.seed + number
        rng = random.Random(seed)
        variant = config.variants[number % len(config.variants)]
        number += 1
        whole = _undisturbed(folder, variant)
        seconds = float((folder / f"undisturbed-{variant}.seconds").read_text())
        if time.monotonic() + 2 * seconds > end:
            break
        _round(folder, variant, seed, rng, seconds, whole, totals)
    print(json.dumps(totals), flush=True)
    return int(bool(totals["wrong"] or totals["hung"] or totals["orphans"]))


def _command(folder: Path, variant: str, name: str) -> list[str]:
    own = [f"runs={folder}", f"checkpoint={folder}/model", f"name={name}"]
    return [sys.executable, "-m", "vargpt_rl.loop", *own, *SMALL.split(), *PATIENT, *VARIANTS[variant]]


def _undisturbed(folder: Path, variant: str) -> Path:
    name = f"undisturbed-{variant}"
    if not (folder / f"{name}.seconds").exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        began = time.monotonic()
        subprocess.run(_command(folder, variant, name), cwd=ROOT, check=True, capture_output=True)
        (folder / f"{name}.seconds").write_text(str(time.monotonic() - began))
    return folder / name


def _round(
    folder: Path, variant: str, seed: int, rng: random.Random, seconds: float, whole: Path, totals: dict[str, int]
) -> None:
    name = f"{variant}-{seed}"
    run = folder / name
    shutil.rmtree(run, ignore_errors=True)
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    told = []
    verdict = "same"
    for number in range(STARTS):
        at_s = rng.uniform(0, seconds) if number < STARTS - 1 and rng.random() < (1.0 if number == 0 else 0.5) else None
        start = run_once(_command(folder, variant, name), log, 5 * seconds + 240, at_s, rng)
        told.append(f"{start.fault or 'undisturbed'} -> {start.code} after {start.seconds:.0f} s")
        totals["faults"] += bool(start.fault)
        if start.orphans:
            totals["orphans"] += len(start.orphans)
            told.append(f"left {sorted(start.orphans)}")
        if start.code and not start.fault:
            verdict = "wrong: a start failed that nothing disturbed"
            break
        if start.code is None:
            totals["hung"] += 1
            verdict = "hung"
            break
        if start.code == 0:
            break
    else:
        verdict = "wrong: never done"
    if verdict == "same":
        try:
            same(run, whole, but=("kept_step",))
            if weights(run) != weights(whole):
                raise AssertionError("other weights")
        except AssertionError as error:
            verdict = f"wrong: {' '.join(str(error).split())[:300]}"
    totals["rounds"] += 1
    totals["wrong"] += verdict.startswith("wrong")
    print(f"{name}: {verdict}: {'; '.join(told)}", flush=True)
    if verdict == "same":
        shutil.rmtree(run)
        log.unlink()


if __name__ == "__main__":
    sys.exit(run_command(SoakConfig, soak))

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from safetensors.torch import load_file, save_file

import actors.batches
import actors.pool
from actors.batches import BatchJob
from actors.config import RolloutConfig
from actors.pool import RolloutPool
from actors.resources import plan
from actors.transport import SharedFileTransfer
from actors.weights import checksum
from actors.worker import Failure, Worker
from actors.worker_group import State
from tests.helpers.tiny import Patches, tiny_checkpoint
from vargpt_rl.data.samples import Prompt
from vargpt_rl.model.generate import SamplingConfig

SIDE = 64
SAMPLING = SamplingConfig(cfg=1.0)
PROMPTS = [Prompt(f"p{i}", f"{'a red circle ' * (i % 3)}and {i} stars") for i in range(20)]
JOBS = [(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
PATIENT_S, IMPATIENT_S = 300.0, 5.0
"""Seconds after which a worker that does not answer is lost: usually, and where it was stopped."""


def deadly_patches(marker: Path) -> Patches:
    """A source that hangs on ``"hang"``, and on ``"die"`` kills its own process, once in the life of ``marker``."""

    class DeadlyPatches(Patches):  # defined in here, so that it travels to the workers by value
        def load(self, key, side):
            if key == "hang":
                time.sleep(60)
            if key == "die":
                if not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                key = "black"
            return super().load(key, side)

    return DeadlyPatches()


@pytest.fixture(scope="module")
def cluster():
    """Resources for one pool; there is room for two."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray.cluster_resources() | {"CPU": 2.0}
    ray.shutdown()


def open_pool(cluster, checkpoint, source, wait=True, **settings) -> RolloutPool:
    """A pool that waits for its workers for 300 seconds, or, until the next is replaced, for ``call_timeout_s``."""
    config = RolloutConfig(**{"workers": 2, "batch_size": 2, "call_timeout_s": PATIENT_S, **settings})

    def note(event: str, restart: bool = False) -> None:
        config.call_timeout_s = PATIENT_S

    placement = plan([cluster], config, ranks=1, dtype="fp32")
    return RolloutPool(config, placement, str(checkpoint), source, progress=unseen, note=note, wait=wait)


def unseen(label: str, done: int, total: int) -> None:
    """Ignore the progress."""


@pytest.fixture
def start(cluster, checkpoint, tmp_path):
    pools = []

    def start(source=None, **settings):
        pools.append(open_pool(cluster, checkpoint, source or deadly_patches(tmp_path / "died"), **settings))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def shared(cluster, checkpoint):
    """Two workers for several tests, some of which replace one and publish weights."""
    pool = open_pool(cluster, checkpoint, Patches(), max_restarts=9)
    yield pool
    pool.close()


@pytest.fixture
def pool(shared):
    """The shared pool, without a test's way of following it."""
    yield shared
    shared.progress = unseen


def test_run_keeps_order_and_raises_errors_as_they_are(pool, tmp_path):
    told, version, events, restarts = [], pool.version, list(pool.workers.events), pool.workers.restarts
    pool.progress = lambda *what: told.append(what)
    samples = pool.run(Worker.generate_images, JOBS[:8], SIDE, SAMPLING, "ckpt", batch_size=3)
    assert [(s.prompt, s.seed, s.version) for s in samples] == [(p, i, version) for i, p in enumerate(PROMPTS[:8])]
    assert told[-1] == ("generate_images", 8, 8)
    assert len(told) == 3
    assert pool.run(Worker.encode, [], SIDE) == []

    assert pool.time_batch(JOBS[:2], SIDE, SAMPLING) > 0

    drawn = [(s.prompt, s.bits) for s in samples]
    scores = pool.run(Worker.score, drawn, SIDE)
    first, second = pool.probe(*drawn[0], SIDE)
    assert first == second == pytest.approx(scores[0].total, abs=1e-4)
    assert pool.run(Worker.reward, drawn, SIDE, lambda images, prompts: [len(p) for p in prompts]) == [
        len(p.text) for p in PROMPTS[:8]
    ]
    named = list(zip(drawn, ["a.png", "b.png"], strict=False))
    paths = pool.run(Worker.write_images, named, SIDE, str(tmp_path))
    assert sorted(tmp_path.iterdir()) == paths == [tmp_path / "a.png", tmp_path / "b.png"]
    assert len(pool.run(Worker.answer, [("red", "What is it?"), ("blue", "How many?")], SIDE)) == 2
    red, failed = pool.run(Worker.encode, ["red", "nothing"], SIDE)
    assert red.key == "red"
    assert isinstance(failed, Failure)
    with pytest.raises(ZeroDivisionError):
        pool.run(Worker.reward, drawn, SIDE, lambda images, prompts: 1 / 0)
    with pytest.raises(ValueError, match="multiple of 16"):
        pool.run(Worker.generate_images, JOBS[:2], 33, SAMPLING, "")
    assert (pool.workers.restarts, pool.workers.events) == (restarts, events)


def test_a_replacement_has_the_published_weights(pool, tmp_path, checkpoint):
    whole = load_file(tiny_checkpoint(tmp_path / "other", seed=1) / "model.safetensors")
    decoder = {name: tensor for name, tensor in whole.items() if name.startswith("image_decoder")}
    nudged = {name: tensor * 1.5 for name, tensor in decoder.items()}
    for name, tensors in {"whole": whole, "decoder": decoder, "nudged": nudged}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")

    def kill_once(label, done, total):
        if victim in alive:
            alive.remove(victim)
            os.kill(victim, signal.SIGKILL)

    base, restarts = pool.version, pool.workers.restarts
    for version, name in enumerate(["whole", "decoder", "nudged"], start=base + 1):
        report = pool.publish(tmp_path / f"{name}.safetensors", version)
        assert (report.version, report.workers, report.verified) == (version, 2, True)
    assert report.checksum == checksum(tmp_path / "nudged.safetensors")
    assert [kept.version for kept in pool.weights.sets] == [base + 1, base + 3], "the second set is superseded"
    with pytest.raises(ValueError, match=f"version {version} published after version {version}"):
        pool.publish(tmp_path / "nudged.safetensors", version)
    undisturbed = pool.run(Worker.generate_images, JOBS, SIDE, SAMPLING, "ckpt")

    alive = [status["pid"] for status in pool.status()]
    victim = alive[0]
    pool.progress = kill_once
    samples = pool.run(Worker.generate_images, JOBS, SIDE, SAMPLING, "ckpt")
    assert samples == undisturbed
    assert pool.workers.restarts == restarts + 1
    assert pool.workers.events[restarts:] == [f"worker 0 lost during generate_images: restart {restarts + 1} of 9"]
    statuses = pool.status()
    assert victim not in [status["pid"] for status in statuses]
    assert {(status["version"], status["checksum"]) for status in statuses} == {(version, report.checksum)}
    first, second = pool.probe(samples[0].prompt, samples[0].bits, SIDE)
    assert first == second


def test_deaths_and_hangs_are_survived_up_to_a_limit(start):
    pool = start(workers=1, max_restarts=2)
    keys = ["red", "die", "blue"]
    assert [encoded.key for encoded in pool.run(Worker.encode, keys, SIDE)] == keys
    assert pool.workers.restarts == 1
    os.kill(pool.status()[0]["pid"], signal.SIGKILL)
    assert pool.status()[0]["version"] == 0
    assert pool.workers.restarts == 2
    pool.config.call_timeout_s = 1.0
    with pytest.raises(RuntimeError, match="more than 2 rollout workers lost: .* lost during encode, after 2 restarts"):
        pool.run(Worker.encode, ["red", "hang"], SIDE)
    assert pool.workers.restarts == 2, "the loss after the last restart is none"


@pytest.mark.parametrize("transport", ["object_store", "broadcast"])
def test_publish_survives_a_lost_worker(start, tmp_path, transport, monkeypatch):
    monkeypatch.setattr(actors.pool, "BROADCAST_TIMEOUT_S", 10.0)
    whole = tiny_checkpoint(tmp_path / "other", seed=1) / "model.safetensors"
    pool = start(transport=transport)
    report = pool.publish(whole, 1)
    assert (report.verified, report.workers, report.checksum) == (True, 2, checksum(whole))
    os.kill(pool.status()[1]["pid"], signal.SIGKILL)
    report = pool.publish(whole, 2)
    assert (report.verified, report.workers, pool.workers.restarts) == (True, 2, 1)
    assert {(status["version"], status["checksum"]) for status in pool.status()} == {(2, checksum(whole))}
    if transport == "broadcast":
        assert pool.workers.events[0].startswith("broadcast of version 2 failed, sending to each worker instead: ")


def slow_patches(folder: Path) -> Patches:
    """A source with which ``"slow"`` takes for as long as there is a file ``slow``, in the process that was first."""

    class SlowPatches(Patches):
        def load(self, key, side):
            if key == "slow":
                key = "black"
                try:
                    (folder / "first").mkdir()
                except FileExistsError:
                    return super().load(key, side)
                while (folder / "slow").exists():
                    time.sleep(0.05)
            return super().load(key, side)

    return SlowPatches()


def test_a_late_batch_is_repeated_and_counts_once(start, tmp_path, monkeypatch):
    """Also where the driver does not run for a while between looking for late batches and waiting for news."""
    look, pauses = BatchJob.late_batches, [0.0]

    def look_and_pause(job, calls):
        late = look(job, calls)
        time.sleep(pauses[-1])
        return late

    monkeypatch.setattr(BatchJob, "late_batches", look_and_pause)
    pool = start(slow_patches(tmp_path), batch_size=1)
    for rounds, pause_s in enumerate([0.0, 0.6], start=1):
        pauses.append(pause_s)
        states: list[list[State]] = []
        pool.progress = lambda *_, states=states: states.append(pool.health())
        monkeypatch.setattr(actors.batches, "LATE_S", 0.5)
        (tmp_path / "slow").touch()
        keys = ["slow", *["red"] * 5]
        assert [encoded.key for encoded in pool.run(Worker.encode, keys, SIDE)] == keys
        assert pool.repeated == rounds and pool.workers.restarts == 0
        assert pool.health() == [State.SUSPECT, State.HEALTHY], "the first worker is still at it"
        assert len(pool.run(Worker.encode, ["blue"] * 3, SIDE)) == 3, "the other one works on"
        (tmp_path / "slow").unlink()
        monkeypatch.setattr(actors.batches, "LATE_S", 60.0)  # on a busy machine, any batch may take half a second
        assert [status["health"] for status in pool.status()] == [State.HEALTHY] * 2
        assert len(pool.run(Worker.encode, ["green"] * 4, SIDE)) == 4
        assert pool.health() == [State.HEALTHY] * 2, "it came back, and its second result is dropped"
        assert len(states) == 6 + 3 + 4 and pool.workers.restarts == 0
        assert all(len(seen) == 2 for seen in states)
        (tmp_path / "first").rmdir()


@dataclass(frozen=True)
class Delayed(SharedFileTransfer):
    """A weight set that comes once there is a file ``go``."""

    go: Path

    def chunks(self):
        while not self.go.exists():
            time.sleep(0.05)
        yield from super().chunks()


def test_a_replacement_is_stale_until_it_has_the_weights(pool, tmp_path, checkpoint, monkeypatch):
    whole = tiny_checkpoint(tmp_path / "other", seed=1) / "model.safetensors"
    version, restarts = pool.version + 1, pool.workers.restarts
    pool.publish(whole, version)
    undisturbed = pool.run(Worker.generate_images, JOBS[:6], SIDE, SAMPLING, "ckpt")
    monkeypatch.setattr(pool.weights, "transfer", lambda old: Delayed(old.layout, old.path, tmp_path / "go"))
    os.kill(pool.status()[0]["pid"], signal.SIGKILL)
    assert pool.run(Worker.generate_images, JOBS[:6], SIDE, SAMPLING, "ckpt") == undisturbed
    seen, end = [pool.health()[0]], time.monotonic() + 200
    assert seen[0] in (State.RESTARTING, State.STALE) and pool.workers.restarts == restarts + 1
    while seen[-1] != State.STALE:
        assert time.monotonic() < end, "the replacement does not come up"
        time.sleep(0.1)
        seen.append(pool.health()[0])
    assert pool.run(Worker.generate_images, JOBS[:6], SIDE, SAMPLING, "ckpt") == undisturbed
    assert pool.health() == [State.STALE, State.HEALTHY], "all was drawn by the other one"
    (tmp_path / "go").touch()
    assert {(status["version"], status["health"]) for status in pool.status()} == {(version, State.HEALTHY)}
    assert pool.run(Worker.generate_images, JOBS[:6], SIDE, SAMPLING, "ckpt") == undisturbed


def own_processes(title: str) -> list[psutil.Process]:
    """Return the processes of this cluster whose titles begin so, the newest last."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)


def test_a_stopped_worker_is_replaced_whatever_it_does(start):
    """A process that is stopped neither answers nor ends itself."""
    pool = start(workers=1, max_restarts=2)
    stopped = []

    def stop() -> None:
        stopped.append(psutil.Process(pool.status()[0]["pid"]))
        stopped[-1].send_signal(signal.SIGSTOP)
        pool.config.call_timeout_s = IMPATIENT_S

    stop()
    assert [encoded.key for encoded in pool.run(Worker.encode, ["red", "blue"], SIDE)] == ["red", "blue"]
    stop()
    assert len(pool.probe(PROMPTS[0], pool.run(Worker.encode, ["red"], SIDE)[0].bits, SIDE)) == 1
    assert pool.workers.events == [f"worker 0 lost during encode: restart {i} of 2" for i in (1, 2)]
    psutil.wait_procs(stopped, timeout=20)
    assert not any(process.is_running() for process in stopped)


def test_a_worker_that_is_stopped_while_it_starts_is_replaced(cluster, checkpoint):
    before = own_processes("ray::Worker")
    pool = open_pool(cluster, checkpoint, Patches(), wait=False, workers=1)
    try:
        while not (new := [process for process in own_processes("ray::Worker") if process not in before]):
            time.sleep(0.05)
        new[0].send_signal(signal.SIGSTOP)
        pool.config.call_timeout_s = IMPATIENT_S
        pool.wait_until_ready()
        assert pool.workers.events == ["worker 0 lost during starting: restart 1 of 3"]
        assert [encoded.key for encoded in pool.run(Worker.encode, ["red"], SIDE)] == ["red"]
        psutil.wait_procs(new, timeout=20)
        assert not new[0].is_running()
    finally:
        pool.close()

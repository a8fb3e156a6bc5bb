"""Settings that are auto: found once, recorded, and the same after a resume."""

import pytest
import torch

from actors.resources import Placement
from configs.load import load_config
from vargpt_rl.common import dtypes
from vargpt_rl.driver import settled
from vargpt_rl.driver.plan import planned_steps
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.settled import batch_limits, best_size, record_dtype, settled_batch_size, settled_dtype
from vargpt_rl.memory.fit import Devices
from vargpt_rl.model.hub import EMBEDDED

SETTINGS = ["resolutions=[32,48]", "rollout.batch_size=auto", "at.48.rollout.batch_size=3", "align.methods=[dpo]"]
NO_DEVICES = Devices(gpus=0, gpu_memory=0, memory=0)


class TimedPool:
    """Stands in for a pool: a batch takes as long as ``seconds`` says."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.tried = []

    def time_batch(self, jobs, resolution, sampling) -> float:
        self.tried.append((resolution, len(jobs)))
        return self.seconds(len(jobs))


def full_at_16(size: int) -> float:
    """Seconds of a machine on which 16 images take hardly longer than one, and more take their share."""
    if size > 32:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return 1.0 + size / 100 if size <= 16 else size / 14


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", {})


@pytest.fixture(autouse=True)
def most(monkeypatch) -> dict[str, int]:
    """The largest batch that fits, as the memory plan would say."""
    found = {"size": 64}
    monkeypatch.setattr(settled, "largest_batch", lambda *given: found["size"])
    return found


def settle(run, pool):
    config = load_config(SETTINGS)
    return settled_batch_size(config, run, pool, batch_limits(config, run, str(EMBEDDED), lambda: NO_DEVICES))


def test_the_batch_size_is_found_once_and_recorded(run, tmp_path):
    pool = TimedPool(full_at_16)
    config = settle(run, pool)
    assert [config.at_resolution(pixels).rollout.batch_size for pixels in (32, 48)] == [16, 3]
    assert {pixels for pixels, _ in pool.tried} == {32} and max(size for _, size in pool.tried) == 64
    assert run.state["steps"]["batch_size"] == {"32": 16}
    assert run.state["events"][-1].startswith("rollout.batch_size=auto: 16 at 32 px, by images/s of a worker (1: 0.99")
    again = TimedPool(lambda size: 1.0)
    assert settle(Run(tmp_path / "run", {}), again) == config and not again.tried


def test_a_batch_that_does_not_fit_ends_the_search(run):
    pool = TimedPool(lambda size: full_at_16(8 * size))
    assert settle(run, pool).at_resolution(32).rollout.batch_size == 2
    with pytest.raises(torch.cuda.OutOfMemoryError):
        settle(Run(run.directory.with_name("other"), {}), TimedPool(lambda size: full_at_16(64)))


def test_no_batch_above_the_memory_plan_is_tried(run, most):
    most["size"] = 4
    pool = TimedPool(lambda size: 1.0)
    assert settle(run, pool).at_resolution(32).rollout.batch_size == 4 and {size for _, size in pool.tried} == {1, 2, 4}
    assert run.state["events"][-1].endswith("; at most 4 fit)")


def test_the_smallest_of_nearly_equal_sizes_is_best():
    assert best_size({1: 1.0, 2: 1.9, 4: 1.95, 8: 1.5}) == 2


def test_numbers_need_no_probe(run):
    config = load_config(["resolutions=[32]"])
    assert batch_limits(config, run, str(EMBEDDED), lambda: pytest.fail("asked for devices")) == {}
    assert settled_batch_size(config, run, TimedPool(pytest.fail), {}) == config and not run.state["steps"]


def test_a_resumed_run_keeps_its_dtype(run, monkeypatch):
    config = load_config(["dtype=auto"])
    monkeypatch.setattr(dtypes, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    assert settled_dtype(config, run, on_gpu=False) == "bf16"
    record_dtype(config, run, Placement(workers=1, worker_options={}, bf16=True))
    monkeypatch.setattr(dtypes, "cpu_flags", frozenset)
    assert settled_dtype(config, run, on_gpu=False) == "bf16"
    assert run.state["events"] == [
        "dtype=auto: resuming in bf16, in which the run began; on this machine it would be fp32"
    ]


def test_a_given_dtype_is_not_recorded(run):
    config = load_config(["dtype=bf16"])
    assert settled_dtype(config, run, on_gpu=False) == "bf16"
    record_dtype(config, run, Placement(workers=1, worker_options={}, bf16=True))
    assert not run.state["steps"]


def test_settling_is_among_the_planned_steps():
    assert list(planned_steps(load_config([*SETTINGS, "dtype=auto"])))[:2] == ["dtype", "batch_size"]
    assert "batch_size" in planned_steps(load_config(["at.256.rollout.batch_size=auto"]))

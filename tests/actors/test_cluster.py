"""A real Ray cluster: what is reserved, which code its workers run, who is let in, how a signal ends its driver."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from actors.cluster import cluster_address, connect, nodes, own_gpus, reserve
from actors.config import PlacementConfig, RolloutConfig
from actors.resources import plan
from tests.helpers.access import listening, nodes_shown
from vargpt_rl.common.network import free_port

ROOT = Path(__file__).parents[2]
DRIVER = """
import os
import time
import ray
from actors import cluster
cluster.connect()
def where():
    from actors import cluster
    return cluster.__file__
def wait():
    time.sleep(300)
assert ray.get(ray.remote(where).remote()) == cluster.__file__
try:
    print("ready", ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    ray.get(ray.remote(wait).remote())
except SystemExit:
    print("stopped", flush=True)
"""


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote
class Process:
    def bundle(self) -> str:
        return ray.get_runtime_context().get_assigned_resources()


@pytest.mark.parametrize("kind", ["split", "colocated"])
def test_a_reservation_holds_all_processes(cluster, kind):
    decided = plan(nodes(), RolloutConfig(workers=3), ranks=2, dtype="fp32", placement=PlacementConfig(kind))
    workers, ranks = reserve(decided, 30)
    assert (len(workers), len(ranks)) == (3, 2)
    free = ray.available_resources().get("CPU", 0)
    assert free == pytest.approx(4 - sum(bundle["CPU"] for bundle in decided.bundles), abs=1e-3)
    share = decided.rank_bundle["CPU"]
    actors = [Process.options(num_cpus=share, scheduling_strategy=place).remote() for place in workers + ranks]
    assert len(ray.get([actor.bundle.remote() for actor in actors], timeout=60)) == 5
    shared = {place.placement_group_bundle_index for place in workers} & {p.placement_group_bundle_index for p in ranks}
    assert len(shared) == (2 if kind == "colocated" else 0)
    for actor in actors:
        ray.kill(actor)
    ray.util.remove_placement_group(workers[0].placement_group)


def test_reserve_fails_in_time_without_room(cluster):
    decided = plan([{"CPU": 8.0}], RolloutConfig(workers=2), ranks=2, dtype="fp32")
    with pytest.raises(RuntimeError, match=r"no room for .*'CPU': 2.0.* on nodes with .*'CPU': 4.0.* within 1 s"):
        reserve(decided, 1)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_local_cluster_is_private_and_stops_cleanly(tmp_path, number):
    shadow = tmp_path / "actors"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("")
    (shadow / "cluster.py").write_text("raise RuntimeError('the code of the working directory')")
    command = [sys.executable, "-P", "-c", DRIVER]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True) as driver:
        ready, *told = driver.stdout.readline().split() or [""]
        assert ready == "ready", driver.stderr.read()
        address, token = told
        assert nodes_shown(address, token, tmp_path) == 1
        assert nodes_shown(address, None, tmp_path) is None and nodes_shown(address, "0" * 64, tmp_path) is None
        addresses = listening(psutil.Process(driver.pid).children(recursive=True))
        assert int(address.rpartition(":")[2]) in addresses
        assert set.union(*addresses.values()) == {"127.0.0.1"}, addresses
        assert not (tmp_path / ".ray").exists()
        driver.send_signal(number)
        output, errors = driver.communicate(timeout=60)
    assert (driver.returncode, output) == (0, "stopped\n"), errors
    assert f"{number.name}: stopping" in errors and "Traceback" not in errors


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}", "no-such-host.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_told_at_once(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address.format(free_port()))
    began = time.monotonic()
    with pytest.raises(OSError, match="nothing answers there"):
        connect()
    assert time.monotonic() - began < 12


@pytest.mark.parametrize("address", [None, "", " ", "local"])
def test_a_cluster_of_its_own_has_the_gpus_of_the_machine(monkeypatch, address):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert (cluster_address(), own_gpus()) == (None, 0)


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://10.0.0.1:10001"])
def test_the_gpus_of_a_cluster_that_is_joined_are_unknown(monkeypatch, address):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert (cluster_address(), own_gpus()) == (address, None)

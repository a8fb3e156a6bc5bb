"""Run the loop on a job's Ray cluster, once all nodes are up: ``python -m slurm.drive [key=value ...]``.

Exit codes are the loop's; also 1 if nodes or GPUs are missing at the deadline, or if a stopped loop made no progress
since its start, because within the same time limit it would never finish.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import ray

from slurm.node import wait_for
from vargpt_rl import loop
from vargpt_rl.common.signals import Stop, stop
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.driver.run import STATE
from vargpt_rl.storage.checkpoint import MARKER


def missing(found: list[dict], names: list[str], gpus: int) -> list[str]:
    """Return what each named node lacks in ``found``, the answer of ``ray.nodes()``."""
    nodes = {node["Labels"].get("slurm-node"): node for node in found if node["Alive"]}
    lacking = []
    for name in names:
        if name not in nodes:
            lacking.append(f"{name} has no Ray")
        elif (has := nodes[name]["Resources"].get("GPU", 0)) < gpus:
            lacking.append(f"{name} has {has:g} of {gpus} GPUs")
    return lacking


def gather(address: str, names: list[str], gpus: int, seconds: float) -> None:
    """Wait until the cluster is complete. TimeoutError, naming what is missing, after ``seconds``."""
    end = time.monotonic() + seconds
    wait_for(address, seconds)
    ray.init(address=address, log_to_driver=False)
    signal.signal(signal.SIGTERM, stop)  # Ray has replaced the handler
    while lacking := missing(ray.nodes(), names, gpus):
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds:g} s {', '.join(lacking)}")
        time.sleep(1)
    ray.shutdown()


def finished(directory: Path) -> tuple[set[str], float]:
    """A run's progress: its finished steps, and the time of its last checkpoint."""
    state = directory / STATE
    steps = set(json.loads(state.read_text())["steps"]) if state.exists() else set()
    markers = (directory / "checkpoints").rglob(MARKER)
    return steps, max((marker.stat().st_mtime for marker in markers), default=0.0)


def main() -> int:
    """Wait for the cluster, then run the loop; return the exit code."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, stop)
    directory = Path(os.environ["VARGPT_RL_LOGS"]).parents[1]
    before, address = finished(directory), os.environ["VARGPT_RL_HEAD"]
    names, gpus = os.environ["VARGPT_RL_NODES"].split(), int(os.environ["VARGPT_RL_GPUS"])
    try:
        gather(address, names, gpus, float(os.environ["VARGPT_RL_READY_S"]))
        os.environ["RAY_ADDRESS"] = address
        status = loop.main(sys.argv[1:])
    except TimeoutError as error:
        print(f"error: {error}; see {os.environ['VARGPT_RL_LOGS']}", file=sys.stderr)
        return 1
    except SystemExit:  # raised by ``stop`` before the loop
        status = os.EX_TEMPFAIL
    # Without a signal, EX_TEMPFAIL means that the run waits for people's labels.
    if Stop.code is not None and status == os.EX_TEMPFAIL and finished(directory) == before:
        print("error: no step was finished since the start: set a longer time limit", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())

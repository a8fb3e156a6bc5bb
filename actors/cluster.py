"""The Ray cluster of a run: join or start it, list its nodes, reserve the resources of a placement."""

import contextlib
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Protocol, TypeAlias

import psutil
import ray
from ray._private import ray_constants
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.resources import Placement, Resources
from vargpt_rl.common.bars import HIDDEN
from vargpt_rl.common.signals import handle_signals

Place: TypeAlias = PlacementGroupSchedulingStrategy
"""One bundle of a placement group, as an actor's scheduling strategy."""

LOST = (RayActorError, OutOfMemoryError, ObjectLostError)
"""Ray's errors when an actor, or the node that held its answer, is lost."""


ANSWER_S = 10.0
"""Seconds that a cluster at RAY_ADDRESS has to answer."""

END_S = 2.0
"""Seconds in which processes of a cluster end when it does, unless they are stopped."""


class Note(Protocol):
    """Called with a fault that was repaired, in words; ``restart`` if processes were started again."""

    def __call__(self, event: str, restart: bool = False) -> None: ...


def unnoted(event: str, restart: bool = False) -> None:
    """Ignore the event."""


def cluster_address() -> str | None:
    """Return the address of the cluster to join, from RAY_ADDRESS; None if one is started on this machine instead.

    That is so without the variable, if it is empty, and for Ray's own word for it, "local".
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def connect() -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine; then handle the signals that stop a run.

    Raises what ``ray.init`` does: OSError, RuntimeError, ValueError or RayError.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; silences its notice
    logging.getLogger("ray").setLevel(logging.ERROR)  # before it says that it starts, and has a token
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | HIDDEN
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": {"env_vars": environment}}
    if address := cluster_address():
        _check_answers(address)
    else:
        # By default Ray listens on every network, with a token in the home directory that others may read.
        ray_constants.ENABLE_RAY_CLUSTER = False
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {"address": "local", "include_dashboard": False}
    # Ray puts the working directory first on its workers' path: there it must not hide the code that runs here.
    code, package = Path(__file__).parents[1], Path(__file__).parent.name
    with contextlib.chdir(code if Path(package).is_dir() else "."):
        ray.init(**options)
    handle_signals()  # again: Ray sets that of SIGTERM itself


def own_gpus() -> int | None:
    """Count the GPUs that `connect` will find on this machine; None if it joins a cluster, which is not asked yet."""
    manager = get_accelerator_manager_for_resource("GPU")
    if cluster_address() or manager is None:
        return None
    visible = manager.get_current_process_visible_accelerator_ids()
    found = manager.get_current_node_num_accelerators()
    return found if visible is None else min(found, len(visible))


def _check_answers(address: str) -> None:
    """Raise OSError if nothing listens at ``host:port``: Ray itself tries for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError, ValueError) as error:
        raise OSError(
            f"RAY_ADDRESS={address}: nothing answers there ({error}); without the variable, a cluster is started on "
            "this machine"
        ) from error


def disconnect() -> None:
    """Leave the cluster. If it was started here, end all of its processes: one that is stopped does not end itself."""
    started = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "raylet":
                started += child.children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=END_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_process(pid: int, began: float) -> None:
    """Kill a process of this node and its children, unless the id is now another's, which began at another time."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.create_time() == began:
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


def nodes() -> list[Resources]:
    """The resources of every living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def reserve(plan: Placement, timeout_s: float) -> tuple[list[Place], list[Place]]:
    """Reserve a place for each worker and each learner rank. RuntimeError if there is no room for all in time."""
    group = placement_group(plan.bundles, strategy=plan.strategy)
    if not group.wait(timeout_s):
        remove_placement_group(group)
        raise RuntimeError(f"no room for {plan.bundles} on nodes with {nodes()} within {timeout_s:g} s")
    return [Place(group, i) for i in plan.worker_bundles], [Place(group, i) for i in plan.rank_bundles]

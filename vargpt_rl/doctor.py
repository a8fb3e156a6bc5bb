"""Check an installation and a run before it starts: versions with known vulnerabilities, devices, and memory needed.

    python -m vargpt_rl.doctor [experiment=vargpt_v1_1] [stage=dpo] [gpus=8] [gpu_memory_gib=80] [key=value ...]

``gpus`` and ``gpu_memory_gib`` plan for other GPUs than the ones found; ``stage`` shows a single stage; all other keys
are the loop's. Without a checkpoint, the plan uses the sizes of the released v1.1 model, or those of v1 with
``checkpoint=release_v1``. Exit codes: 0 the run fits, 1 it does not, 2 a setting is wrong.
"""

import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.version import Version
from rich.box import SIMPLE_HEAD
from rich.table import Table

from actors import resources
from configs.consistency import check_devices
from configs.load import load_config
from configs.schema import LoopConfig
from vargpt_rl.common.command import load_command, run_program
from vargpt_rl.common.console import print_table, wide_console
from vargpt_rl.common.memory import available_memory
from vargpt_rl.common.settings import Count, Positive
from vargpt_rl.memory.fit import Devices, Load, loads, refusal
from vargpt_rl.memory.inputs import TEXT_TOKENS
from vargpt_rl.memory.plan import RELEASE, SIZES, MemoryPlan, model_config, plan
from vargpt_rl.memory.rollout import RolloutMemory
from vargpt_rl.memory.training import TrainingMemory
from vargpt_rl.memory.units import GIB, RUNTIME
from vargpt_rl.model.hub import check_model

PACKAGES = ("torch", "transformers", "deepspeed", "trl", "ray", "vllm")
ADVISORIES = (
    ("torch", "2.6", "CVE-2025-32434: torch.load runs code from a file despite weights_only=True"),
    ("torch", "2.10", "CVE-2026-24747: torch.load can corrupt memory despite weights_only=True"),
    ("ray", "2.52", "CVE-2025-62593: a web page can run code through the dashboard"),
    ("ray", "2.54", "CVE-2026-27482: anyone who reaches the dashboard can end jobs"),
)
"""Package, first fixed version, vulnerability."""

SHARED = Path("/dev/shm")
SHARED_NEEDED = 2**30
"""Bytes of shared memory below which doctor warns."""


@dataclass
class DoctorSettings:
    """The keys that are not the loop's."""

    stage: str | None = None
    """Show this stage only; null shows all."""
    gpus: Count | None = None
    """Number of GPUs to plan for; null takes those found."""
    gpu_memory_gib: Positive | None = None
    """Memory of each GPU; null takes that of the GPUs found."""


def found_gpus() -> list[tuple[str, int]]:
    """Return the name and memory in bytes of each GPU of this machine."""
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(gpu.name, gpu.total_memory) for gpu in properties]


def planned(asked: DoctorSettings, found: list[tuple[str, int]]) -> Devices:
    """Return the devices to plan for. ValueError if the memory of requested GPUs is unknown."""
    gpus = asked.gpus or len(found)
    if gpus and not found and asked.gpu_memory_gib is None:
        raise ValueError(f"gpu_memory_gib is not given: gpus={gpus} needs it, since no GPU was found")
    if asked.gpu_memory_gib is not None and not gpus:
        raise ValueError(f"gpu_memory_gib={asked.gpu_memory_gib:g}: expected gpus=N too, since no GPU was found")
    each = asked.gpu_memory_gib * GIB if asked.gpu_memory_gib else min((size for _, size in found), default=0)
    return Devices(gpus, int(each), available_memory())


def warnings(installed: dict[str, str]) -> list[str]:
    """Return a line per advisory that applies to an installed version, build (``+cpu``) or pre-release."""
    return [
        f"warning: {package} {installed[package]} has {what}; update to {fixed} or newer"
        for package, fixed, what in ADVISORIES
        if package in installed and Version(installed[package]) < Version(fixed)
    ]


def installed_versions() -> dict[str, str]:
    """Return the versions of the ``PACKAGES`` that are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def about(found: list[tuple[str, int]]) -> list[str]:
    """Return lines with versions, warnings and devices."""
    installed = installed_versions()
    versions = [f"{package} {installed.get(package, 'not installed')}" for package in PACKAGES]
    gpus = [f"GPU {i}: {name}, {size / GIB:.1f} GiB" for i, (name, size) in enumerate(found)] or ["no GPU"]
    machine = f"{os.cpu_count()} CPU cores, {available_memory() / GIB:.1f} GiB of memory"
    python = f"python {platform.python_version()}"
    return [", ".join([python, *versions]), *warnings(installed), *gpus, machine, *_shared_memory()]


def _shared_memory() -> list[str]:
    """Return a warning if /dev/shm is small, as it is in containers by default."""
    if not SHARED.is_dir() or (free := shutil.disk_usage(SHARED).free) >= SHARED_NEEDED:
        return []
    have = f"{SHARED} has {free / GIB:.2f} GiB free, expected {SHARED_NEEDED / GIB:g} or more"
    return [f"warning: {have}: data workers and Ray pass tensors through it (docker run --shm-size=8g)"]


def _cells(need: TrainingMemory | RolloutMemory, names: list[str]) -> list[str]:
    return [f"{getattr(need, name) / GIB:.2f}" for name in names]


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for column in left + right:
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    return table


def training_table(training: list[TrainingMemory]) -> Table:
    """Build the table of stages. A star marks the activations of the configured gradient checkpointing."""
    names = ["weights", "gradients", "optimizer", "buffers", "update"]
    right = [*names, "activations", "checkpointed", "sum"]
    table = _table("a learner rank, in GiB", ["stage", "px", "batch", "ZeRO"], right)
    for need in training:
        recipe = need.recipe
        assert need.otherwise is not None  # the plan computes both choices
        checkpointed = recipe.gradient_checkpointing > 0
        by_choice = {checkpointed: need.activations, not checkpointed: need.otherwise}
        activations = [f"{by_choice[choice] / GIB:.2f}{'*' * (choice == checkpointed)}" for choice in (False, True)]
        row = [need.stage, str(need.resolution), str(recipe.micro_batch), str(recipe.zero)]
        table.add_row(*row, *_cells(need, names), *activations, *_cells(need, ["total"]))
    return table


def rollout_table(rollouts: list[RolloutMemory]) -> Table:
    """Build the table of resolutions."""
    table = _table("a rollout worker, in GiB", ["px", "batch"], ["weights", "caches", "activations", "sum"])
    for need in rollouts:
        names = ["weights", "caches", "activations", "total"]
        table.add_row(str(need.resolution), str(need.batch), *_cells(need, names))
    return table


CARDS = {"24 GB": 23.6, "48 GB": 47.4, "80 GB": 79.1, "141 GB": 139.8}
"""Usual sizes of GPUs, with the GiB that programs find on them."""


def card_table(need: MemoryPlan, config: LoopConfig, only: str | None) -> Table:
    """Build the table of what the fullest GPU holds in each stage, or in one, and which cards it fits."""
    table = _table("the fullest GPU, in GiB, and the cards that it fits", ["px", "stage"], ["sum", *CARDS])
    fullest: dict[tuple[str, int], Load] = {}
    for load in loads(need, config.rollout, config.learner, config.placement, on_gpu=True):
        key = load.training.stage, load.training.resolution
        if load.ranks and (key not in fullest or load.total > fullest[key].total):
            fullest[key] = load
    for (stage, resolution), load in fullest.items():
        if only not in (None, stage):
            continue
        fits = ["yes" if load.total <= size * GIB else "no" for size in CARDS.values()]
        table.add_row(str(resolution), stage, f"{load.total / GIB:.1f}", *fits)
    return table


def notes(found: MemoryPlan) -> str:
    """Explain the tables' sums."""
    return (
        f"* as configured. Sum: weights + gradients + optimizer + the larger of (buffers + activations) and update + "
        f"{RUNTIME / GIB:g} GiB for the runtime; at least the whole model, {found.rollouts[0].weights / GIB:.2f} GiB, "
        f"which ZeRO-3 loads before it partitions it. Rows have {TEXT_TOKENS} tokens of text."
    )


def verdict(need: MemoryPlan, config: LoopConfig, devices: Devices) -> str | None:
    """Explain why the loop would reject the run; None if it would not."""
    learner = config.learner
    if devices.gpus:
        found = [{"CPU": float(os.cpu_count() or 1), "GPU": float(devices.gpus)}]
        try:
            resources.plan(found, config.rollout, learner.ranks, config.dtype, learner.gpus_per_rank, config.placement)
        except ValueError as error:
            return str(error)
    try:
        check_devices(config, devices.gpus > 0)
    except ValueError as error:
        return str(error)
    return refusal(need, config, devices)


def settings(arguments: list[str]) -> tuple[DoctorSettings, LoopConfig]:
    """Split the arguments into the doctor's settings and the loop's. ValueError for a wrong one."""
    keys = tuple(f"{field.name}=" for field in fields(DoctorSettings))
    own = [argument for argument in arguments if argument.startswith(keys)]
    others = [argument for argument in arguments if not argument.startswith(keys)]
    config = load_config(others, {"checkpoint": RELEASE})
    if config.checkpoint not in SIZES:
        config.checkpoint = check_model(config.checkpoint)
    return load_command(DoctorSettings, own), config


def examine(arguments: list[str]) -> int:
    """Print the report; return 1 if the loop would reject the run."""
    found = found_gpus()
    asked, config = settings(arguments)
    devices = planned(asked, found)
    need = plan(config, model_config(config.checkpoint, config.resolutions[0]), devices.gpus > 0, compare=True)
    stages = dict.fromkeys(training.stage for training in need.training)
    if asked.stage not in (None, *stages):
        raise ValueError(f"stage={asked.stage}: expected one of {', '.join(stages)}")
    console = wide_console()
    for line in about(found):
        console.print(line, highlight=False)
    shown = [training for training in need.training if asked.stage in (None, training.stage)]
    print_table(training_table(shown), console)
    print_table(rollout_table(need.rollouts), console)
    if devices.gpus:
        print_table(card_table(need, config, asked.stage), console)
    console.print(notes(need), highlight=False)
    reason = verdict(need, config, devices)
    where = f"{devices.gpus} GPUs of" if devices.gpus else "this machine's"
    console.print(reason or f"the run fits into {where} {devices.room / GIB:.1f} GiB", highlight=False)
    return 1 if reason else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return run_program(examine, arguments)


if __name__ == "__main__":
    sys.exit(main())

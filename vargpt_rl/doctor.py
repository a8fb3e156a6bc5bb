"""What is installed, with warnings about versions known to be open to attack, which devices there are, and how much of
their memory a run needs, before it is started.

    python -m vargpt_rl.doctor [experiment=vargpt_v1_1] [stage=dpo] [gpus=8] [gpu_memory_gib=80] [key=value ...]

``gpus`` and ``gpu_memory_gib`` plan for other GPUs than those found; ``stage`` shows one stage alone; all other keys
are the loop's. Without a checkpoint an experiment is planned with the sizes of the released model of v1.1, and with
those of v1 for ``checkpoint=release_v1``. Exit codes: 0 the run fits, 1 it does not, 2 a setting is wrong.
"""

import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version
from rich.box import SIMPLE_HEAD
from rich.table import Table

from actors import resources
from configs.load import load_config
from configs.schema import LoopConfig
from vargpt_rl.common.command import load_command, run_program
from vargpt_rl.common.console import wide_console
from vargpt_rl.memory.plan import (
    GIB,
    RELEASE,
    RUNTIME,
    SIZES,
    TEXT_TOKENS,
    Devices,
    MemoryPlan,
    Rollout,
    TrainingMemory,
    model_config,
    plan,
    refusal,
)
from vargpt_rl.model.hub import check_model

PACKAGES = ("torch", "transformers", "deepspeed", "trl", "ray", "vllm")
ADVISORIES = (
    ("torch", "2.6", "CVE-2025-32434: torch.load runs code of a file despite weights_only=True"),
    ("torch", "2.10", "CVE-2026-24747: torch.load can corrupt memory despite weights_only=True"),
    ("ray", "2.52", "CVE-2025-62593: a web page can run code through the dashboard"),
    ("ray", "2.54", "CVE-2026-27482: whoever reaches the dashboard can end jobs"),
)
"""Package, first version without it, what it is."""


@dataclass
class Question:
    """The keys that are not the loop's. ``gpus`` and ``gpu_memory_gib`` null take what is found."""

    stage: str | None = None
    gpus: int | None = None
    gpu_memory_gib: float | None = None

    def __post_init__(self):
        if self.gpus is not None and self.gpus < 1:
            raise ValueError(f"gpus={self.gpus}: expected 1 or more")
        if self.gpu_memory_gib is not None and self.gpu_memory_gib <= 0:
            raise ValueError(f"gpu_memory_gib={self.gpu_memory_gib}: expected a number above 0")


def found_gpus() -> list[tuple[str, int]]:
    """Name and bytes of each GPU of this machine."""
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(gpu.name, gpu.total_memory) for gpu in properties]


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def planned(question: Question, found: list[tuple[str, int]]) -> Devices:
    """The devices to plan for. ValueError if GPUs are asked for whose memory is not known."""
    gpus = question.gpus or len(found)
    if gpus and not found and question.gpu_memory_gib is None:
        raise ValueError(f"gpu_memory_gib is not given: gpus={gpus} needs it where no GPU is found")
    if question.gpu_memory_gib is not None and not gpus:
        raise ValueError(f"gpu_memory_gib={question.gpu_memory_gib:g}: expected gpus=N too where no GPU is found")
    each = question.gpu_memory_gib * GIB if question.gpu_memory_gib else min((size for _, size in found), default=0)
    return Devices(gpus, int(each), machine_memory())


def warnings(installed: dict[str, str]) -> list[str]:
    """A line for each advisory that concerns an installed version; builds (``+cpu``) and pre-releases count as such."""
    return [
        f"warning: {package} {installed[package]} has {what}; update to {fixed} or newer"
        for package, fixed, what in ADVISORIES
        if package in installed and Version(installed[package]) < Version(fixed)
    ]


def installed_versions() -> dict[str, str]:
    """Of ``PACKAGES``, those that are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def about(found: list[tuple[str, int]]) -> list[str]:
    """Versions, warnings and devices, a line each."""
    installed = installed_versions()
    versions = [f"{package} {installed.get(package, 'not installed')}" for package in PACKAGES]
    gpus = [f"GPU {i}: {name}, {size / GIB:.1f} GiB" for i, (name, size) in enumerate(found)] or ["no GPU"]
    machine = f"{os.cpu_count()} CPU cores, {machine_memory() / GIB:.1f} GiB of memory"
    python = f"python {platform.python_version()}"
    return [", ".join([python, *versions]), *warnings(installed), *gpus, machine]


def _cells(need: TrainingMemory | Rollout, names: list[str]) -> list[str]:
    return [f"{getattr(need, name) / GIB:.2f}" for name in names]


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for column in left + right:
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    return table


def training_table(training: list[TrainingMemory]) -> Table:
    """A row a stage and micro-batch; the activations of the choice that is set are starred."""
    names = ["weights", "gradients", "optimizer", "buffers", "update"]
    right = [*names, "activations", "checkpointed", "sum"]
    table = _table("a learner rank, in GiB", ["stage", "px", "batch", "ZeRO"], right)
    for need in training:
        recipe = need.recipe
        by_choice = {recipe.gradient_checkpointing: need.activations, not recipe.gradient_checkpointing: need.otherwise}
        activations = [
            f"{by_choice[choice] / GIB:.2f}{'*' * (choice == recipe.gradient_checkpointing)}"
            for choice in (False, True)
        ]
        row = [need.stage, str(need.resolution), str(recipe.micro_batch), str(recipe.zero)]
        table.add_row(*row, *_cells(need, names), *activations, *_cells(need, ["total"]))
    return table


def rollout_table(rollouts: list[Rollout]) -> Table:
    """A row a resolution."""
    table = _table("a rollout worker, in GiB", ["px", "batch"], ["weights", "caches", "activations", "sum"])
    for need in rollouts:
        names = ["weights", "caches", "activations", "total"]
        table.add_row(str(need.resolution), str(need.batch), *_cells(need, names))
    return table


def notes(found: MemoryPlan) -> str:
    """How the tables' sums come about."""
    return (
        f"* as set. Sum: weights, gradients, optimizer, and the larger of buffers with activations and of update; with "
        f"{RUNTIME / GIB:g} GiB for the runtime. At least the whole model, {found.rollouts[0].weights / GIB:.2f} GiB, "
        f"which ZeRO-3 loads before it takes it apart. Rows of {TEXT_TOKENS} tokens of text."
    )


def verdict(need: MemoryPlan, config: LoopConfig, devices: Devices) -> str | None:
    """Why the loop would refuse the run; None if it would not."""
    learner = config.learner
    if devices.gpus:
        found = [{"CPU": float(os.cpu_count()), "GPU": float(devices.gpus)}]
        try:
            resources.plan(found, config.rollout, learner.ranks, learner.gpus_per_rank, placement=config.placement)
        except ValueError as error:
            return str(error)
    return refusal(need, config, devices)


def settings(arguments: list[str]) -> tuple[Question, LoopConfig]:
    """The doctor's own keys and the loop's. ValueError for whatever is wrong."""
    keys = tuple(f"{field.name}=" for field in fields(Question))
    own = [argument for argument in arguments if argument.startswith(keys)]
    others = [argument for argument in arguments if not argument.startswith(keys)]
    config = load_config(others, {"checkpoint": RELEASE})
    if config.checkpoint not in SIZES:
        config.checkpoint = check_model(config.checkpoint)
    return load_command(Question, own), config


def examine(arguments: list[str]) -> int:
    """Print the whole report; return 1 if the loop would refuse the run."""
    found = found_gpus()
    question, config = settings(arguments)
    devices = planned(question, found)
    need = plan(config, model_config(config.checkpoint, config.resolutions[0]), devices.gpus > 0, compare=True)
    stages = dict.fromkeys(training.stage for training in need.training)
    if question.stage not in (None, *stages):
        raise ValueError(f"stage={question.stage}: expected one of {', '.join(stages)}")
    console = wide_console()
    for line in about(found):
        console.print(line, highlight=False)
    shown = [training for training in need.training if question.stage in (None, training.stage)]
    console.print(training_table(shown))
    console.print(rollout_table(need.rollouts))
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

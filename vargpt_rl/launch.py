"""Submit the loop as a Slurm job.

    python -m vargpt_rl.launch nodes=4 gpus_per_node=8 time=24:00:00 [key=value ...] [--dry-run]

Checks the loop's settings as the loop does, then writes everything the job needs into the run's directory: its script,
the settings, and a copy of the code including uncommitted changes, so that later edits do not affect a queued job.
``--dry-run`` submits nothing. All keys that are not ``SlurmJob``'s are the loop's. Exit codes: 0 submitted, 1 Slurm
rejected the job, 2 a setting or an input is wrong.
"""

import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from dataclasses import dataclass, fields
from pathlib import Path

from actors.resources import plan
from configs.schema import LoopConfig
from vargpt_rl.common.command import CommandFailed, load_command, run_program
from vargpt_rl.common.secret_check import check_shell
from vargpt_rl.common.settings import Count, CountOrNone, NotNegative
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.start import prepare
from vargpt_rl.memory.fit import Devices, check_fits
from vargpt_rl.memory.plan import model_config
from vargpt_rl.memory.units import GIB
from vargpt_rl.storage.files import atomic_dir, write_atomically

ROOT = Path(__file__).parents[1]
TEMPLATE = "slurm/loop.sbatch"
# Marker lines of the template, replaced by the job's lines.
OPTIONS = "# -- options of the site\n"
SETTINGS = "# -- settings of the site\n"
DRY_RUN = "--dry-run"
PLAIN = re.compile(r"[\w.,:+/@%=\[\]-]+")


@dataclass
class SlurmJob:
    """Resources to request from Slurm and settings of the site; null leaves a resource to Slurm's default."""

    nodes: Count = 1
    """Number of nodes."""
    gpus_per_node: CountOrNone = 0
    """GPUs of each node."""
    cpus_per_node: Count | None = None
    """CPUs of each node."""
    memory: str | None = None
    """Memory per node, in Slurm's notation (``500G``)."""
    time: str | None = None
    """Time limit, in Slurm's notation (``24:00:00``)."""
    partition: str | None = None
    """Partition that the job is queued in."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    options: str | None = None
    """Further options of sbatch."""
    setup: str | None = None
    """Shell code that the job runs first (``module load cuda``)."""
    python: str | None = None
    """Interpreter on the nodes, or in the container; null is this one, or the container's ``python``."""
    container: str | None = None
    """Command prefix that runs a command in a container (``apptainer exec --nv image.sif``)."""
    gpu_memory_gib: NotNegative | None = None
    """Memory of each GPU, to check that the run fits before submitting it; null skips the check."""

    def __post_init__(self):
        for key in ("memory", "time", "partition", "account", "qos"):
            value = getattr(self, key)
            if value is not None and not PLAIN.fullmatch(value):
                raise ValueError(f"{key}={value}: expected a word without spaces or quotes")
        for key in ("options", "setup", "container"):
            check_shell(key, getattr(self, key) or "")

    def sbatch(self, name: str, log: Path) -> list[str]:
        """Return the options of sbatch. Jobs of one name run one after another: no two write to one run."""
        options = {
            "nodes": self.nodes,
            "gres": f"gpu:{self.gpus_per_node}" if self.gpus_per_node else None,
            "cpus-per-task": self.cpus_per_node,
            "mem": self.memory,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "job-name": f"vargpt_rl-{name}",
            "dependency": "singleton",
            "output": log,
        }
        given = [f"--{key}={value}" for key, value in options.items() if value is not None]
        return [*given, *shlex.split(self.options or "")]


def split(arguments: list[str]) -> tuple[SlurmJob, list[str]]:
    """Split the arguments into the job and the loop's. ValueError for a wrong setting of the job."""
    keys = tuple(f"{field.name}=" for field in fields(SlurmJob))
    own = [argument for argument in arguments if argument.startswith(keys)]
    return load_command(SlurmJob, own), [argument for argument in arguments if argument not in own]


def check_resources(job: SlurmJob, config: LoopConfig, model: str) -> None:
    """Raise ValueError if the requested resources are too small for the run."""
    node = {"CPU": float(job.cpus_per_node or max(1, job.gpus_per_node)), "GPU": float(job.gpus_per_node)}
    learner = config.learner
    plan([node] * job.nodes, config.rollout, learner.ranks, config.dtype, learner.gpus_per_rank, config.placement)
    if job.gpus_per_node and job.gpu_memory_gib:
        gpus = Devices(job.nodes * job.gpus_per_node, int(job.gpu_memory_gib * GIB), 0)
        check_fits(config, model_config(model), gpus)


def git(*arguments: str) -> bytes:
    """Run git in this repository; return its output. ValueError if it fails."""
    identity = ("-c", "user.name=vargpt_rl", "-c", "user.email=vargpt_rl@localhost")
    try:
        done = subprocess.run(["git", *identity, *arguments], cwd=ROOT, capture_output=True)
    except FileNotFoundError as error:
        raise ValueError("git is not installed: expected git, to copy the code for the job") from error
    if done.returncode:
        raise ValueError(f"git {arguments[0]} in {ROOT}: {' '.join(done.stderr.decode().split())}")
    return done.stdout


def snapshot(directory: Path) -> Path:
    """Copy the tracked files, as they are now, below ``directory``; return the folder. Equal code is copied once.

    Untracked files are listed on stderr but not copied, since they may be data or secrets. An installed package is not
    copied: the job uses it where it is.
    """
    if not (ROOT / ".git").exists():
        print(f"not copied, since it is installed: {ROOT}; the job runs what is there when it starts", file=sys.stderr)
        return ROOT
    # A commit of the uncommitted changes, on no branch; empty if there are none.
    commit = git("stash", "create").decode().strip() or git("rev-parse", "HEAD").decode().strip()
    tree = git("rev-parse", f"{commit}^{{tree}}").decode().strip()
    if untracked := git("ls-files", "--others", "--exclude-standard").decode().split("\n")[:-1]:
        print(f"not copied, since git does not track them: {', '.join(untracked)}", file=sys.stderr)
    folder = directory / "code" / tree[:12]
    if not folder.exists():
        with atomic_dir(folder) as unfinished, tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
            archive.extractall(unfinished, filter="data")
        write_atomically(folder.with_suffix(".commit"), git("rev-parse", "HEAD"))
        write_atomically(folder.with_suffix(".diff"), git("diff", "--binary", "HEAD"))
    return folder


def script(job: SlurmJob, code: Path, directory: Path, arguments: list[str]) -> str:
    """Fill in ``slurm/loop.sbatch`` of that code with this job's options and settings."""
    text = (code / TEMPLATE).read_text()
    options = job.sbatch(directory.name, directory / "slurm" / "%j.log")
    python = job.python or ("python" if job.container else sys.executable)
    settings = [
        f"code={shlex.quote(str(code))}",
        f"python={shlex.quote(python)}",
        f"container=({shlex.join(shlex.split(job.container or ''))})",
        f"cd {shlex.quote(os.getcwd())} || exit",
        f"set -- {shlex.join(arguments)}",
        *([job.setup] if job.setup else []),
    ]
    for marker, lines in ((OPTIONS, [f"#SBATCH {option}" for option in options]), (SETTINGS, settings)):
        text = text.replace(marker, "".join(f"{line}\n" for line in lines))
    return text


def launch(job: SlurmJob, run: Run, arguments: list[str], dry_run: bool) -> None:
    """Write the job's files and submit it. Raises CommandFailed if Slurm rejects it."""
    directory = run.directory.resolve()
    code = snapshot(directory)
    path = directory / TEMPLATE
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, script(job, code, directory, arguments).encode())
    print(f"settings {directory / 'config.yaml'}\ncode     {code}\nscript   {path}")
    if dry_run:
        return
    try:
        done = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CommandFailed(
            f"the job is written, not submitted: sbatch not found. On a machine with Slurm: sbatch {path}"
        ) from error
    if done.returncode:
        raise CommandFailed(done.stderr.strip())
    print(f"job      {done.stdout.strip()}")


def execute(arguments: list[str]) -> None:
    """Check the settings, then write and submit the job."""
    job, own = split([argument for argument in arguments if argument != DRY_RUN])
    config, inputs, run = prepare(own, lock=False)  # the run itself may be in progress
    check_resources(job, config, inputs.model)
    if run.summary is not None:
        print(f"{run.directory} is complete; another name=... starts a new one")
        return
    launch(job, run, own, DRY_RUN in arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return run_program(execute, arguments)


if __name__ == "__main__":
    sys.exit(main())

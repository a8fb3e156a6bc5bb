"""The loop as a Slurm job.

    python -m vargpt_rl.launch nodes=4 gpus_per_node=8 time=24:00:00 [key=value ...] [--dry-run]

Checks the loop's settings as the loop does, then writes into the run's directory what the job runs: its script, the
settings, and a copy of the code with all changes that are not committed, so that later edits do not reach a job that
waits. ``--dry-run`` submits nothing. All keys that are not ``SlurmJob``'s are the loop's. Exit codes: 0 submitted, 1
Slurm refused the job, 2 a setting or an input is wrong.
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
from vargpt_rl.driver.run import Run
from vargpt_rl.loop import prepare
from vargpt_rl.memory.plan import GIB, Devices, check_fits, model_config
from vargpt_rl.storage.files import atomic_dir, write_atomically

ROOT = Path(__file__).parents[1]
TEMPLATE = "slurm/loop.sbatch"
OPTIONS, SETTINGS = "# -- options of the site\n", "# -- settings of the site\n"
DRY_RUN = "--dry-run"
PLAIN = re.compile(r"[\w.,:+/@%=\[\]-]+")


@dataclass
class SlurmJob:
    """What is asked of Slurm, and what the site needs; null leaves it to Slurm's defaults.

    ``memory`` is of a node, as Slurm writes it (``500G``); ``options`` are further ones of sbatch. ``setup`` is shell
    code for the job to begin with (``module load cuda``); ``python`` the interpreter on the nodes, by default this one;
    ``container`` a command that runs others in a container (``apptainer exec --nv image.sif``), in which ``python`` is
    then one of. ``gpu_memory_gib`` lets the launch check that the run fits into the GPUs, as the loop does.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    options: str | None = None
    setup: str | None = None
    python: str | None = None
    container: str | None = None
    gpu_memory_gib: float | None = None

    def __post_init__(self):
        for key, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_node", 1), ("gpu_memory_gib", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"{key}={value}: expected {least} or more")
        for key in ("memory", "time", "partition", "account", "qos"):
            value = getattr(self, key)
            if value is not None and not PLAIN.fullmatch(value):
                raise ValueError(f"{key}={value}: expected a word without spaces or quotes")
        for key in ("options", "setup", "container"):
            check_shell(key, getattr(self, key) or "")

    def sbatch(self, name: str, log: Path) -> list[str]:
        """The options of sbatch. Jobs of one name run one after the other, so that no two write to one run."""
        asked = {
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
        given = [f"--{key}={value}" for key, value in asked.items() if value is not None]
        return [*given, *shlex.split(self.options or "")]


def split(arguments: list[str]) -> tuple[SlurmJob, list[str]]:
    """The job, and the arguments that are the loop's. ValueError for a wrong key of the job."""
    keys = tuple(f"{field.name}=" for field in fields(SlurmJob))
    own = [argument for argument in arguments if argument.startswith(keys)]
    return load_command(SlurmJob, own), [argument for argument in arguments if argument not in own]


def check_resources(job: SlurmJob, config: LoopConfig, model: str) -> None:
    """ValueError if what is asked of Slurm cannot hold the run."""
    node = {"CPU": float(job.cpus_per_node or max(1, job.gpus_per_node)), "GPU": float(job.gpus_per_node)}
    learner = config.learner
    plan([node] * job.nodes, config.rollout, learner.ranks, learner.gpus_per_rank, placement=config.placement)
    if job.gpus_per_node and job.gpu_memory_gib:
        gpus = Devices(job.nodes * job.gpus_per_node, int(job.gpu_memory_gib * GIB), 0)
        check_fits(config, model_config(model), gpus)


def git(*arguments: str) -> bytes:
    """What git says of this code. ValueError if it says no."""
    named = ("-c", "user.name=vargpt_rl", "-c", "user.email=vargpt_rl@localhost")
    try:
        done = subprocess.run(["git", *named, *arguments], cwd=ROOT, capture_output=True)
    except FileNotFoundError as error:
        raise ValueError("git is not installed: the job runs a copy of the code, which git makes") from error
    if done.returncode:
        raise ValueError(f"git {arguments[0]} in {ROOT}: {' '.join(done.stderr.decode().split())}")
    return done.stdout


def snapshot(directory: Path) -> Path:
    """Copy the code, as it is in tracked files, below ``directory``; the folder. Equal code is copied once.

    Files that git does not track stay out: they may be data or secrets. They are named on stderr.
    """
    # A commit of the changes, on no branch; nothing if there are none.
    commit = git("stash", "create").decode().strip() or git("rev-parse", "HEAD").decode().strip()
    tree = git("rev-parse", f"{commit}^{{tree}}").decode().strip()
    if untracked := git("ls-files", "--others", "--exclude-standard").decode().split("\n")[:-1]:
        print(f"not in the copy of the code, for git does not track them: {', '.join(untracked)}", file=sys.stderr)
    folder = directory / "code" / tree[:12]
    if not folder.exists():
        with atomic_dir(folder) as unfinished, tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
            archive.extractall(unfinished, filter="data")
        write_atomically(folder.with_suffix(".commit"), git("rev-parse", "HEAD"))
        write_atomically(folder.with_suffix(".diff"), git("diff", "--binary", "HEAD"))
    return folder


def script(job: SlurmJob, code: Path, directory: Path, arguments: list[str]) -> str:
    """``slurm/loop.sbatch`` of that code, with what this job asks for and is set to."""
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
    """Write what the job runs, and submit it. Raises CommandFailed if it is not accepted."""
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
        raise CommandFailed("sbatch is not installed: launch on a machine where jobs can be submitted") from error
    if done.returncode:
        raise CommandFailed(done.stderr.strip())
    print(f"job      {done.stdout.strip()}")


def execute(arguments: list[str]) -> None:
    """Check the settings, then write and submit the job."""
    job, own = split([argument for argument in arguments if argument != DRY_RUN])
    config, _, inputs, run = prepare(own)
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

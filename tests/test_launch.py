"""Checks, files and submission of a Slurm job. `tests.slurm` runs such a job on a real Slurm."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import LoopConfig
from vargpt_rl import launch
from vargpt_rl.launch import SlurmJob, main

ROOT = Path(__file__).parents[1]
in_a_checkout = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="the tests do not run in a git checkout"
)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small repository instead of this one, with an uncommitted change and an untracked file."""
    folder = tmp_path / "repository"
    (folder / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / launch.TEMPLATE, folder / launch.TEMPLATE)
    (folder / "code.py").write_text("committed")
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "all")):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "code.py").write_text("changed")
    (folder / "key.txt").write_text("secret")
    monkeypatch.setattr(launch, "ROOT", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def run(*arguments: str) -> int:
    return main(["name=a", "runs=runs", *arguments])


def test_job_and_loop_share_no_key():
    assert not {field.name for field in fields(SlurmJob)} & {field.name for field in fields(LoopConfig)}


def test_dry_run_writes_script_settings_and_code(repository, capsys):
    site = ["nodes=4", "gpus_per_node=8", "time=1-00:00:00", "partition=big", "account=me", "qos=high", "memory=500G"]
    site += ["cpus_per_node=64", "setup=module load cuda", "container=apptainer exec --nv 'my image.sif'"]
    site += ["options=--constraint=h100 --exclusive"]
    loop = ["resolutions=[32]", "iterations=1", "placement=colocated", "reward.path=rewards.shapes:shapes_reward"]
    assert run(*site, *loop, "--dry-run") == 0
    directory = repository.parent / "runs/a"
    text = (directory / "slurm/loop.sbatch").read_text()
    for option in (
        "--nodes=4", "--gres=gpu:8", "--time=1-00:00:00", "--partition=big", "--account=me", "--qos=high",
        "--mem=500G", "--cpus-per-task=64", "--constraint=h100", "--exclusive", "--dependency=singleton",
        "--signal=B:USR2@300", f"--output={directory}/slurm/%j.log",
    ):  # fmt: skip
        assert f"\n#SBATCH {option}\n" in text
    assert subprocess.run(["bash", "-n", directory / "slurm/loop.sbatch"]).returncode == 0
    begin = text[text.index("code=") : text.index("set -u")]
    shown = 'printf \'%s\\n\' "$PWD" "$code" "$python" "${container[@]}" "$@"'
    begin = f"module() {{ :; }}; SLURM_SUBMIT_DIR=/nowhere; {begin} {shown}"
    said = subprocess.run(["bash", "-c", begin], capture_output=True, text=True, cwd="/").stdout.splitlines()
    (code,) = (path for path in (directory / "code").iterdir() if path.is_dir())
    container = ["apptainer", "exec", "--nv", "my image.sif"]
    assert said == [str(repository.parent), str(code), "python", *container, "name=a", "runs=runs", *loop]
    assert (code / "code.py").read_text() == "changed" and not (code / "key.txt").exists()
    assert "+changed" in code.with_suffix(".diff").read_text()
    assert "resolutions" in (directory / "config.yaml").read_text()
    output = capsys.readouterr()
    assert "key.txt" in output.err and "job" not in output.out
    assert load_config(said[7:]).directory == Path("runs/a")

    assert run(*loop, "--dry-run") == 0  # equal code is not copied again
    assert len([path for path in (directory / "code").iterdir() if path.is_dir()]) == 1
    text = (directory / "slurm/loop.sbatch").read_text()
    assert f"python={sys.executable}\ncontainer=()\n" in text and "#SBATCH --gres" not in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nodes=0"], "nodes=0"),
        (["nodes=two"], "nodes"),
        (["partition=a b"], "partition=a b"),
        (["dpo.bta=1"], "bta"),
        (["checkpoint=nowhere"], "checkpoint=nowhere"),
        (["rollout.workers=20", "gpus_per_node=8"], "need 22 GPUs in placement=split, but the cluster has 8"),
        (["rollout.workers=20", "gpus_per_node=8", "nodes=2", "placement=colocated"], "but the cluster has 16"),
        (["gpus_per_node=8", "gpu_memory_gib=0.5"], "which has 0.5 GiB"),
    ],
)
def test_rejects_bad_jobs_before_writing(repository, capsys, arguments, named):
    assert run(*arguments, "--dry-run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1
    assert not list(repository.parent.glob("runs/a/slurm")) and not list(repository.parent.glob("runs/a/code"))


def test_rejects_changed_settings_of_a_run(repository, capsys):
    assert run("--dry-run") == 0
    assert run("dpo.beta=0.5", "--dry-run") == 2
    assert "dpo.beta: 0.1 -> 0.5" in capsys.readouterr().err


def test_exit_code_follows_sbatch(repository, capsys, monkeypatch):
    programs = repository.parent / "bin"
    programs.mkdir()
    sbatch = programs / "sbatch"
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    sbatch.write_text('#!/bin/sh\ntest "$1" = --parsable && test -f "$2" && echo 41\n')
    sbatch.chmod(0o755)
    assert run() == 0
    assert "job      41" in capsys.readouterr().out
    sbatch.write_text("#!/bin/sh\necho no such partition >&2; exit 3\n")
    assert run() == 1
    assert "no such partition" in capsys.readouterr().err


@in_a_checkout
def test_copied_code_runs(tmp_path):
    code = launch.snapshot(tmp_path)
    command = [sys.executable, "-P", "-m", "slurm.where", "name=a", f"runs={tmp_path}"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(code)}, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/a\n", done.stderr


def test_an_installed_package_needs_no_clone(tmp_path, monkeypatch, capsys):
    installed = tmp_path / "site-packages"
    (installed / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / launch.TEMPLATE, installed / launch.TEMPLATE)
    monkeypatch.setattr(launch, "ROOT", installed)
    monkeypatch.chdir(tmp_path)
    assert run("resolutions=[32]", "iterations=1", "--dry-run") == 0
    text = (tmp_path / "runs/a/slurm/loop.sbatch").read_text()
    assert f"code={installed}\n" in text and "not copied, since it is installed" in capsys.readouterr().err


@in_a_checkout
def test_a_wheel_has_what_a_job_needs(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "tests", "docs"))
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert {launch.TEMPLATE, "slurm/drive.py", "slurm/node.py", "slurm/where.py"} <= names
    assert {"vargpt_rl/page/templates/run.html", "configs/data/pairs.yaml", "vargpt_rl/tiny/model.safetensors"} <= names


def test_a_browser_that_cannot_be_installed_is_no_error(tmp_path):
    environment = {"PATH": str(tmp_path), "CHROMIUM": str(tmp_path / "none")}
    (tmp_path / "id").symlink_to(shutil.which("id"))
    done = subprocess.run(["/bin/bash", ROOT / ".ci/browser"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "the tests of pages will be skipped" in done.stdout
    (tmp_path / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    (tmp_path / "timeout").symlink_to(shutil.which("timeout"))
    done = subprocess.run(["/bin/bash", ROOT / ".ci/browser"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "cannot install Chromium here" in done.stdout

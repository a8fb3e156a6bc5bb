"""Shared fixtures, and marks by what a test starts; see `tests.helpers.tiny` for the tiny models."""

import os
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.families import TinyFamily
from tests.helpers.tiny import tiny_checkpoint, tiny_v1_checkpoint
from vargpt_rl.model.families import load_config, load_model, markup_for
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat

# One for all clusters of this process: Ray reads it once, and ``actors.cluster.connect`` sets it where it is not.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# Two files run at once on two cores. Runs that are compared bit by bit need one thread: how a product is split among
# threads changes its last bits. Programs and forked processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs inherit ignored signals: under nohup, or in the background of a script, those of the tests would not stop.
for ignored, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(ignored) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(ignored, handler)

TESTS = Path(__file__).parent
# Marks by path below tests/, for files and whole folders; those that take longest first. `make test-fast` runs what
# has none of them.
MARKS = {
    "loop": [
        "driver/test_adapter_run.py",
        "driver/test_dtype.py",
        "driver/test_faults.py",
        "driver/test_hanging.py",
        "driver/test_interrupted.py",
        "driver/test_interrupted_parts.py",
        "driver/test_online_faults.py",
        "driver/test_online_interrupted.py",
        "driver/test_own_pairs_run.py",
        "driver/test_stored_states.py",
        "page/test_labelled_run.py",
        "test_loop.py",
        "test_loop_v1.py",
    ],
    "deepspeed": [
        "learners/test_adapter.py",
        "learners/test_families.py",
        "learners/test_gradient_norms.py",
        "learners/test_group.py",
        "learners/test_policy_gradient.py",
        "learners/test_resume.py",
        "learners/test_reward.py",
    ],
    "ray": [
        "actors/test_cluster.py",
        "actors/test_pool.py",
        "actors/test_text_engine.py",
        "actors/test_transport.py",
        "rewards/test_combined.py",
        "rewards/test_judge.py",
        "slurm",
    ],
    "slow": [
        "actors/test_worker.py",
        "bench",
        "common/test_bars.py",
        "common/test_signals.py",
        "configs/test_load.py",
        "data/instruct/test_llm.py",
        "data/records/test_reader.py",
        "data/records/test_stream.py",
        "learners/test_dpo.py",
        "learners/test_image_tokenizer.py",
        "learners/test_policy_gradient.py",
        "learners/test_pretrain_tiny.py",
        "learners/test_tokenizer_job.py",
        "memory",
        "model/test_hub.py",
        "page/test_browser.py",
        "page/test_chat_browser.py",
        "page/test_labels.py",
        "page/test_watch.py",
        "rewards/test_ocr.py",
        "rewards/test_published.py",
        "rewards/test_remote.py",
        "rewards/test_serve.py",
        "rewards/test_testing.py",
        "simulate",
        "storage/test_adapter.py",
        "test_assemble.py",
        "test_chat.py",
        "test_convert.py",
        "test_doctor.py",
        "test_generate.py",
        "test_launch.py",
    ],
}

# The time of an example depends on the machine only.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items):
    for item in items:
        path = item.path.relative_to(TESTS)
        places = {path.as_posix(), *(parent.as_posix() for parent in path.parents)}
        for mark, marked in MARKS.items():
            if places.intersection(marked):
                item.add_marker(mark)
    _put_long_files_first(items)


def _put_long_files_first(items):
    """Sort files by their marks, in the order of ``MARKS``: no process shall be left with a long file at the end."""
    ranks = {mark: rank for rank, mark in enumerate(MARKS)}
    of_file = {}
    for item in items:
        rank = min((ranks[mark.name] for mark in item.iter_markers() if mark.name in ranks), default=len(ranks))
        of_file[item.path] = min(rank, of_file.get(item.path, rank))
    items.sort(key=lambda item: of_file[item.path])


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their argument: gzip writes the time into them, and all workers must collect the same ids."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _started_clusters_are_marked(request):
    """Fail a test that starts Ray without a mark, which would slow down `make test-fast`."""
    yield
    ray = sys.modules.get("ray")
    started = ray is not None and ray.is_initialized()
    marks = {mark.name for mark in request.node.iter_markers()}
    assert not started or marks & MARKS.keys(), "this test starts Ray: add its file to MARKS in tests/conftest.py"


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 32 MB. Skips if mounting is not allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Directory of a whole tiny model; tests only read it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return Vargpt.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="session")
def chat(checkpoint):
    return ChatFormat(str(checkpoint), Vargpt.config_class.from_pretrained(checkpoint))


@pytest.fixture(scope="session")
def v1_checkpoint(tmp_path_factory):
    """Directory of a whole tiny v1 model; tests only read it."""
    return tiny_v1_checkpoint(tmp_path_factory.mktemp("tiny_v1"))


@pytest.fixture(scope="session", params=["v1.1", "v1"])
def family(request):
    """Each family in turn."""
    if request.param == "v1.1":
        return TinyFamily("v1.1", request.getfixturevalue("checkpoint"), tiny_checkpoint)
    return TinyFamily("v1", request.getfixturevalue("v1_checkpoint"), tiny_v1_checkpoint)


@pytest.fixture(scope="module")
def v1_model(v1_checkpoint):
    return load_model(v1_checkpoint, "auto").eval()


@pytest.fixture(scope="session")
def v1_chat(v1_checkpoint):
    return markup_for(v1_checkpoint, load_config(v1_checkpoint))

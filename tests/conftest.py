"""What most tests of the model, its workers and its learners start from; see `tests.helpers.tiny`."""

import os
import secrets
import subprocess

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.families import TinyFamily
from tests.helpers.tiny import tiny_checkpoint, tiny_v1_checkpoint
from vargpt_rl.model.families import load_config, load_model, markup_for
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat

# One for all clusters of this process: Ray reads it once, and ``actors.cluster.connect`` sets it where it is not.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# How long an example takes says something of the machine only.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MB. Skips where none may be mounted."""
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

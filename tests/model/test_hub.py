"""Models by their name on the hub: pushed and fetched as transformers does, found in the cache without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from tests.helpers.hub_server import Hub
from vargpt_rl.inference.conversation import load
from vargpt_rl.model.hub import FETCHED, check_model, model_folder

COMMIT = "a" * 40
PUSH_AND_FETCH = """
import sys
import torch
from vargpt_rl.inference.conversation import load
from vargpt_rl.driver.inputs import check_model
folder = sys.argv[1]
model, chat = load(folder, "cpu")
model.push_to_hub("org/pushed")
chat.tokenizer.push_to_hub("org/pushed")
chat.image_processor.push_to_hub("org/pushed")
fetched, _ = load("org/pushed", "cpu")
own = model.state_dict()
assert all(torch.equal(own[name], tensor) for name, tensor in fetched.state_dict().items())
print(check_model("org/pushed"))
try:
    load("org/missing", "cpu")
except ValueError as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, which itself is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def cached(cache: Path, name: str, files: Path) -> Path:
    """Put a model into the cache, in the layout of huggingface_hub."""
    root = cache / repo_folder_name(repo_id=name, repo_type="model")
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text(COMMIT)
    return Path(shutil.copytree(files, root / "snapshots" / COMMIT))


def test_a_model_in_the_cache_is_found_by_its_name(cache, checkpoint, model):
    snapshot = cached(cache, "org/name", checkpoint)
    loaded, chat = load("org/name", "cpu")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert chat.text("a star")
    assert check_model("org/name") == str(snapshot)


def test_a_directory_comes_before_the_hub(cache, checkpoint, tmp_path, monkeypatch):
    cached(cache, "org/name", checkpoint)
    own = shutil.copytree(checkpoint, tmp_path / "org/name")
    monkeypatch.chdir(tmp_path)
    assert model_folder("org/name") == own


@pytest.mark.parametrize("name", ["org/name", "runs/typo"])
def test_a_name_that_is_nowhere_is_one_line(cache, name):
    for use in (load, check_model):
        with pytest.raises(ValueError) as error:
            use(name)
        assert str(error.value).startswith(f"checkpoint={name}: no such directory, and not on the hub: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["name", "a/b/c", "/nowhere/name", "org/na me"])
def test_what_is_no_name_of_the_hub_is_not_looked_for_there(cache, name):
    with pytest.raises(ValueError, match=f"^checkpoint={name}: no such directory$"):
        model_folder(name)


def test_another_architecture_is_named(cache, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    cached(cache, "org/bert", tmp_path / "bert")
    with pytest.raises(
        ValueError, match="^checkpoint=org/bert: model_type is 'bert', expected 'vargpt' or 'vargpt_v1'$"
    ):
        check_model("org/bert")


def test_nothing_that_holds_code_is_fetched():
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".pkl", ".py", "*")) for pattern in FETCHED)


def test_a_pushed_model_is_fetched_again(checkpoint, tmp_path):
    with Hub() as hub:
        network = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
        hub.files["org/pushed"]["pytorch_model.bin"] = b"a pickle"
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_FETCH, checkpoint],
            env={**os.environ, **network},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    *_, fetched, refused = done.stdout.splitlines()
    assert Path(fetched).parent.name == "snapshots" and Path(fetched).is_relative_to(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in Path(fetched).iterdir()}
    assert not list(Path(fetched).glob("*.bin"))
    assert refused.startswith("checkpoint=org/missing: no such directory, and not on the hub: 404")

import importlib.util
import os
import pickle
import py_compile
import sys

import pytest

from vargpt_rl.common.plugins import BUILDER, load_plugin, make_callable, make_plugin

PLUGIN = """
from __future__ import annotations
from dataclasses import KW_ONLY, dataclass

@dataclass
class Scale:
    _: KW_ONLY
    factor: float = 1.0

    def __call__(self, images, prompts):
        return [self.factor] * len(images)

def ones(images, prompts):
    return [1.0] * len(images)

def several(images, prompts, *, value, offset=0.0):
    return [value + offset] * len(images)

class Silent:
    def score(self, images, prompts):
        return [0.0] * len(images)

class OfImages:
    def __call__(self, images):
        return [0.0] * len(images)

def of_three(images, prompts, seeds):
    return [0.0] * len(images)

def of_any(*arguments):
    return [0.0] * len(arguments[0])

NUMBER = 3
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "broken.py").write_text("import no_such_library\n")


def test_a_name_in_a_module():
    assert load_plugin("pickle:dumps") is pickle.dumps


def test_a_name_in_a_file(plugin):
    before = set(sys.modules)
    scale = make_callable(load_plugin("mine.py:Scale"), {"factor": 2.0})
    assert scale([None], ["a"]) == [2.0]
    assert make_callable(load_plugin("mine.py:ones"), {})([None], ["a"]) == [1.0]
    assert make_callable(load_plugin("mine.py:several"), {"value": 2.0})([None], ["a"]) == [2.0]
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("mine.py", "expected 'package.module:Name' or 'file.py:name'"),
        (":ones", "expected"),
        ("mine.py:", "expected"),
        ("mine.py:one two", "expected"),
        ("other.py:ones", "there is no file .*other.py"),
        ("mine.py:twos", "has no 'twos'; it has .*ones"),
        ("no_such_package.rewards:ones", "there is no module 'no_such_package'"),
        ("json.no_such_module:ones", "there is no module 'json.no_such_module'"),
        ("./mine:ones", "neither a module's name nor a .py file"),
    ],
)
def test_a_wrong_path_is_named(plugin, path, said):
    with pytest.raises(ValueError, match=said) as raised:
        load_plugin(path)
    assert repr(path) in str(raised.value)


def test_a_file_that_others_can_change_is_not_run(plugin, tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.chmod(0o666)
    with pytest.raises(ValueError, match=f"'mine.py:ones': {file} can be written by every user here"):
        load_plugin("mine.py:ones")
    file.chmod(0o664)
    tmp_path.chmod(0o1777)  # as /tmp
    load_plugin("mine.py:ones")
    if os.getuid() == 0:  # only root gives files away
        os.chown(file, 12345, -1)
        with pytest.raises(ValueError, match="every user"):
            load_plugin("mine.py:ones")
        os.chown(file, os.getuid(), -1)
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match="every user"):
        load_plugin("mine.py:ones")
    tmp_path.chmod(0o755)
    load_plugin("mine.py:ones")


@pytest.mark.parametrize("open_to_all", ["deep", "links", "links/link.py's target folder"])
def test_no_folder_or_link_on_the_way_may_be_open_to_all(tmp_path, monkeypatch, open_to_all):
    deep, links = tmp_path / "deep" / "er", tmp_path / "links"
    deep.mkdir(parents=True)
    links.mkdir()
    (deep / "mine.py").write_text(PLUGIN)
    (links / "link.py").symlink_to(deep / "mine.py")
    load_plugin(f"{links}/link.py:ones")
    load_plugin(f"{deep}/mine.py:ones")
    folder = {"deep": tmp_path / "deep", "links": links}.get(open_to_all, deep)
    folder.chmod(0o777)
    with pytest.raises(ValueError, match=f"{folder} can be written by every user here"):
        load_plugin(f"{links}/link.py:ones")
    folder.chmod(0o755)
    if os.getuid() == 0:
        os.chown(folder, 12345, -1)
        with pytest.raises(ValueError, match=f"{folder} can be written by every user here, or belongs to another"):
            load_plugin(f"{links}/link.py:ones")


def test_a_module_that_others_can_change_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "shared_module.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match=f"'shared_module:ones': {tmp_path} can be written by every user here"):
        load_plugin("shared_module:ones")
    tmp_path.chmod(0o755)
    load_plugin("shared_module:ones")
    sys.modules.pop("shared_module")


@pytest.mark.parametrize("open_to_all", ["bundle", "bundle/part", "bundle/part/mine.py", "bundle/part/__pycache__"])
@pytest.mark.parametrize("initialised", [True, False])
def test_a_package_that_others_can_change_is_not_imported(tmp_path, monkeypatch, open_to_all, initialised):
    part = tmp_path / "bundle" / "part"
    (part / "__pycache__").mkdir(parents=True)
    (part / "mine.py").write_text(PLUGIN)
    if initialised:
        (part / "__init__.py").touch()
        (part.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / open_to_all).chmod(0o777)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{tmp_path / open_to_all} can be written by every user here"):
            load_plugin("bundle.part.mine:ones")
        assert "bundle.part.mine" not in sys.modules
    (tmp_path / open_to_all).chmod(0o755)
    load_plugin("bundle.part.mine:ones")
    for name in ("bundle.part.mine", "bundle.part", "bundle"):
        sys.modules.pop(name)


def test_compiled_code_beside_a_plugin_is_not_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def which(images, prompts):\n    return 'source'\n")
    time = file.stat()
    other = tmp_path / "other.py"
    other.write_text("def which(images, prompts):\n    return 'poison'\n")
    os.utime(other, ns=(time.st_atime_ns, time.st_mtime_ns))
    cached = importlib.util.cache_from_source(str(file))
    py_compile.compile(str(other), cfile=cached)
    os.utime(file, ns=(time.st_atime_ns, time.st_mtime_ns))
    assert load_plugin(f"{file}:which")([], []) == "source"


def test_errors_of_the_plugin_itself_are_its_own(plugin, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("broken.py:ones", "broken:ones"):
        with pytest.raises(ModuleNotFoundError, match="no_such_library"):
            load_plugin(path)


def test_options_must_fit(plugin):
    with pytest.raises(ValueError, match="Scale.*unexpected keyword argument 'power'"):
        make_callable(load_plugin("mine.py:Scale"), {"power": 2})
    with pytest.raises(ValueError, match="ones takes no options.*factor"):
        make_callable(load_plugin("mine.py:ones"), {"factor": 2})
    for wrong in ({"value": 1, "factor": 2}, {"offset": 1}, {"images": [], "value": 1}):
        with pytest.raises(ValueError, match="several takes the options value, offset, but was given {"):
            make_callable(load_plugin("mine.py:several"), wrong)
    with pytest.raises(ValueError, match="3 cannot be called"):
        make_callable(load_plugin("mine.py:NUMBER"), {})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Silent", r"Silent cannot be called: give the class a method __call__\(self, images, prompts\)"),
        ("OfImages", r"OfImages.__call__\(self, images\): too many.*called with \(self, images, prompts\)"),
        ("of_three", r"of_three\(images, prompts, seeds\): missing.*'seeds'; it is called with \(images, prompts\)"),
    ],
)
def test_what_cannot_be_called_with_images_and_prompts_is_refused_unmade(plugin, name, said):
    with pytest.raises(ValueError, match=said):
        make_plugin(f"mine.py:{name}", {})


def test_a_builder_is_called_with_something_else(plugin):
    assert make_plugin("mine.py:of_any", {}, BUILDER)([None], {}, [], {}) == [0.0]
    with pytest.raises(ValueError, match=r"ones\(images, prompts\).*called with \(samples, winners, "):
        make_plugin("mine.py:ones", {}, BUILDER)

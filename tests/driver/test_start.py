"""Where a resumed run works."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from configs.load import load_config
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.start import enter_beginning, plain, prepare

SETTINGS = ["data=captioned", "data.captions=captions.jsonl", "data.images=photos", "preference.winners=photos"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with captioned images and a run on them, begun there."""
    folder = tmp_path / "project"
    (folder / "photos").mkdir(parents=True)
    lines = [{"id": f"{k}", "caption": f"thing {k}", "file": f"{k}.png"} for k in range(40)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        Image.new("RGB", (32, 32), "red").save(folder / "photos" / line["file"])
    monkeypatch.chdir(folder)
    config = load_config([*SETTINGS, "name=first"])
    Run(config.directory, plain(config)).close(failed=False)
    return folder


@pytest.mark.parametrize("named", ["{project}/runs/first", "../project/runs/first"])
def test_relative_paths_of_a_resumed_run_start_where_it_was_begun(project, named, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="vargpt_rl")
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    config, inputs, run = prepare([f"resume={named.format(project=project)}"])
    run.close(failed=False)
    assert config.directory == project / "runs/first" == run.directory and Path.cwd() == project
    assert inputs.source.records(1, 0)[0].prompt.text.startswith("thing")
    assert "where the run was begun" in caplog.text


def test_a_damaged_directory_is_named_and_not_used(project, tmp_path, monkeypatch):
    path = project / "runs/first/state.json"
    (tmp_path / "other").mkdir()
    path.write_text(path.read_text().replace(f'"{project}"', f'"{tmp_path}/other"'))
    config = load_config(["resume=runs/first"])
    enter_beginning(config)
    assert Path.cwd() == project
    run = Run(config.directory, plain(config))
    assert any("the directory in which the run was begun is damaged" in event for event in run.state["events"])
    run.close(failed=False)


def test_a_run_that_moved_with_its_project_stays_where_it_is(project, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    os.rename(project, moved)
    monkeypatch.chdir(moved)
    config = load_config(["resume=runs/first"])
    enter_beginning(config)
    assert Path.cwd() == moved and config.directory == Path("runs/first")

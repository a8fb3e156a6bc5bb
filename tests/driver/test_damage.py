"""Any damage to any file of a run that is read back is named, and repaired by redoing its step, or refused."""

import json
import os
import shutil

import pytest
import torch

from tests.helpers.preferences import row
from vargpt_rl.data.preferences import write_table
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.verify import check_steps
from vargpt_rl.evaluate.paired import ScoredImage, write_scores
from vargpt_rl.storage.checkpoint import save_checkpoint
from vargpt_rl.storage.files import write_atomically

CONFIG = {"seed": 0, "rollout": {"workers": 2}, "name": "run"}


def _weights(directory, *names):
    for name in names:
        save_checkpoint(directory / "checkpoints" / name, {"weight": torch.arange(100.0)})


def _table(directory, name):
    write_table(directory / "preferences" / f"{name}.parquet", [row("a", chosen_bits=bytes(range(200)))])


def _scores(directory, moment):
    image = ScoredImage(prompt_id="a", prompt="a star", seed=1, score=0.5)
    write_scores(directory / "evaluations" / f"iter-00-{moment}.jsonl", [image])


def work(directory, step):
    """Write the files of a step."""
    (directory / "preferences").mkdir(exist_ok=True)
    if step == "iter-00/before":
        (directory / "samples/iter-00").mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "samples/iter-00/before-00.png", b"a picture")
    if step == "iter-00/sft":
        _weights(directory, "iter-00-sft/step-000002", "iter-00-sft/final")
        Quarantine(directory / "quarantine.jsonl").add("file:1", "x", "unreadable")
    if step == "iter-00/after_sft":
        _table(directory, "iter-00-held-out")
        _scores(directory, "after_sft")
    if step == "iter-00/pair":
        _table(directory, "iter-00")
    if step == "iter-00/dpo":
        _weights(directory, "iter-00-dpo/final")
    if step == "iter-00/after_dpo":
        _scores(directory, "after_dpo")
        (directory / "best/64").mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "best/64/best.json", b'{"value": 0.5}')
        write_atomically(directory / "best/64/model.safetensors", b"weights")
    return {"step": step, "score": 0.5} | ({"pairs": 1} if step == "iter-00/after_sft" else {})


STEPS = [f"iter-00/{name}" for name in ("before", "sft", "after_sft", "pair", "dpo", "after_dpo")]
MADE_BY = {
    "samples/iter-00/before-00.png": "iter-00/before",
    "checkpoints/iter-00-sft/step-000002/weights.safetensors": "iter-00/sft",
    "checkpoints/iter-00-sft/step-000002/COMPLETE": "iter-00/sft",
    "checkpoints/iter-00-sft/final/weights.safetensors": "iter-00/sft",
    "checkpoints/iter-00-sft/final/COMPLETE": "iter-00/sft",
    "checkpoints/iter-00-dpo/final/weights.safetensors": "iter-00/dpo",
    "checkpoints/iter-00-dpo/final/COMPLETE": "iter-00/dpo",
    "preferences/iter-00-held-out.parquet": "iter-00/after_sft",
    "preferences/iter-00.parquet": "iter-00/pair",
    "evaluations/iter-00-after_sft.jsonl": "iter-00/after_sft",
    "evaluations/iter-00-after_dpo.jsonl": "iter-00/after_dpo",
    "best/64/best.json": "iter-00/after_dpo",
    "best/64/model.safetensors": "iter-00/after_dpo",
    "checkpoints/iter-00-sft/final": "iter-00/sft",
    "checkpoints/iter-00-sft": "iter-00/sft",
    "checkpoints": "iter-00/sft",
    "preferences": "iter-00/after_sft",
    "best": "iter-00/after_dpo",
}
OWN = ("config.yaml", "state.json", "summary.json", "metrics.jsonl", "quarantine.jsonl")


def go(directory, finish=True):
    """Open the run as the loop does, check it and do what is missing. Return its events and steps that were done."""
    quarantine = Quarantine(directory / "quarantine.jsonl")
    run = Run(directory, CONFIG)
    if finish and run.summary is not None:
        return run.state["events"], [], run
    check_steps(run)
    done = []
    for step in STEPS:

        def do(step=step):
            done.append(step)
            return work(directory, step)

        run.step(step, do)
        if step in done:
            run.log("sft", STEPS.index(step), {"loss": 0.5}, {})
    run.finish({"status": "complete", "lost": quarantine.lost})
    return run.state["events"], done, run


@pytest.fixture(scope="module", autouse=True)
def no_sync():
    """Skip fsync, which says nothing here and takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    go(directory)
    return directory


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def folder(path):
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut at the end": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "flip first": lambda path: flip(path, 0),
    "flip middle": lambda path: flip(path, 0.5),
    "flip last": lambda path: flip(path, 0.97),
    "empty": lambda path: path.write_bytes(b""),
    "object": lambda path: path.write_text("{}"),
    "list": lambda path: path.write_text("[]\n"),
    "null": lambda path: path.write_text("null\n"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "folder": folder,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [name for name in MADE_BY if "." in name or name.endswith("COMPLETE")])
def test_a_damaged_file_is_named_and_its_step_is_redone(run, file, damage):
    (run / "summary.json").unlink()  # a finished run reads nothing else
    step = MADE_BY[file]
    DAMAGES[damage](run / file)
    events, done, _ = go(run)
    assert done == STEPS[STEPS.index(step) :]
    assert any(f"redoing {step}: " in event and str((run / file).parent) in event for event in events)
    assert go(run, finish=False)[1] == [] and (run / file).is_file()


@pytest.mark.parametrize("name", [name for name in MADE_BY if not ("." in name or name.endswith("COMPLETE"))])
def test_a_vanished_folder_is_named_and_its_step_is_redone(run, name):
    (run / "summary.json").unlink()
    shutil.rmtree(run / name)
    events, done, _ = go(run)
    assert done == STEPS[STEPS.index(MADE_BY[name]) :]
    assert any(str(run / name) in event for event in events)


def judge(directory, before):
    """Return whether a start named the file that was changed, or how it went on all the same."""
    try:
        events, _, _ = go(directory)
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    new = [event for event in events if event not in before]
    return " ".join(new)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", OWN)
def test_damage_to_the_runs_own_files_is_named(run, file, damage, complete):
    if not complete and file != "summary.json":
        (run / "summary.json").unlink()
    DAMAGES[damage](run / file)
    told = judge(run, [])
    assert str(run / file) in told, told


@pytest.mark.parametrize("file", OWN)
def test_every_flipped_byte_is_named(finished, tmp_path, file):
    size = (finished / file).stat().st_size
    for number in range(40):
        run = shutil.copytree(finished, tmp_path / str(number))
        content = bytearray((run / file).read_bytes())
        content[number * (size - 1) // 39] ^= 1 << (number % 8)
        (run / file).write_bytes(content)
        told = judge(run, [])
        assert str(run / file) in told, (number, told)
        shutil.rmtree(run)


def test_a_damaged_record_sends_the_run_back_to_its_step(run):
    (run / "summary.json").unlink()
    state = json.loads((run / "state.json").read_text())
    state["steps"]["iter-00/pair"]["score"] = 0.9
    (run / "state.json").write_text(json.dumps(state))
    events, done, _ = go(run)
    assert done == STEPS[3:] and f"redoing iter-00/pair: {run / 'state.json'}: its record" in " ".join(events)


def test_forgetting_the_last_steps_is_no_damage(run):
    (run / "summary.json").unlink()
    state = json.loads((run / "state.json").read_text())
    for step in STEPS[4:]:
        del state["steps"][step], state["served"][step]
    (run / "state.json").write_text(json.dumps(state))
    events, done, _ = go(run)
    assert done == STEPS[4:] and len(events) == 1, "the summary alone is told"


def test_a_whole_run_is_left_alone(run):
    def contents():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "state.json"}

    before = contents()
    assert go(run)[:2] == ([], []) and contents() == before


def test_without_its_settings_a_run_goes_on_with_the_same_ones_only(run):
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=f"{run / 'config.yaml'} is gone, and the run was begun with other settings"):
        Run(run, CONFIG | {"seed": 1})
    assert f"{run / 'config.yaml'} is gone: written again" in " ".join(Run(run, CONFIG).state["events"])

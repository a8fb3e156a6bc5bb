"""What a page reads of a run directory, and what it makes of what is missing or damaged."""

import datetime
import json
import os
import socket
import subprocess
import sys

import pytest
import yaml
from markupsafe import escape

from configs.load import load_config
from tests.helpers.run_folder import CONFIG, make_run
from vargpt_rl.driver.plan import planned_steps
from vargpt_rl.driver.start import plain
from vargpt_rl.page.contents import read_metrics, read_run, read_runs
from vargpt_rl.page.images import galleries
from vargpt_rl.page.listing import differing_settings, run_lines
from vargpt_rl.page.plan import expected_steps
from vargpt_rl.page.render import PAGE, render, script_json, update_page, write_page
from vargpt_rl.page.sections import pair_sections

DEMO = [
    *("pretrain", "pretrain/swap", "pretrain/eval"),
    *("understanding", "understanding/swap", "understanding/eval"),
    *("iter-00/before", "iter-00/sft", "iter-00/sft_swap", "iter-00/after_sft"),
    *("iter-00/sample", "iter-00/judge", "iter-00/pair", "iter-00/dpo"),
    *("iter-00/control", "iter-00/control_swap", "iter-00/after_control"),
    *("iter-00/dpo_swap", "iter-00/after_dpo"),
    *("iter-00/grpo", "iter-00/grpo_swap", "iter-00/after_grpo"),
    *("iter-00/grid", "understands/after"),
]


def test_steps_ahead_are_those_of_the_loop():
    assert expected_steps(CONFIG | {"iterations": 1}) == DEMO
    assert expected_steps({}) == []


def test_a_setting_that_is_not_there_is_what_older_versions_did():
    older = {key: value for key, value in CONFIG.items() if key not in ("align", "dpo", "learned_reward", "preference")}
    steps = expected_steps(older)
    assert "iter-00/sft" in steps and "iter-00/dpo" in steps and "iter-00/control" not in steps


def test_pairs_are_made_once_an_iteration():
    methods = {"align": {"sft": True, "methods": ["dpo", "reward", "grpo"]}}
    steps = expected_steps(CONFIG | methods | {"iterations": 1, "stages": ["align"]})
    assert steps[0] == "understands/before" and steps.count("iter-00/pair") == 1 and "iter-00/reward" in steps


def test_a_torn_line_of_metrics_is_left_out(tmp_path):
    line = {"time": 1.0, "stage": "sft", "step": 1, "loss": 0.5}
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(line).encode() + b"\n[]\n\xff\xfe\n" + json.dumps(line).encode()[:20])
    assert read_metrics(path) == [line]
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize("done", [0, 1, 9, 22])
def test_a_run_that_is_not_finished_has_a_page(tmp_path, done):
    run = read_run(make_run(tmp_path / "run", done=done))
    page = render([run])
    assert run.status == "stopped" and "vargpt-rl resume" in page
    assert f"{done} of {len(expected_steps(CONFIG))} steps" in page


def test_a_run_that_is_locked_by_a_live_process_is_running(tmp_path):
    folder = make_run(tmp_path / "run", done=9)
    (folder / ".lock.json").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": ""}))
    assert read_run(folder).status == "running" and "left" in render([read_run(folder)])
    (folder / ".lock.json").write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "since": ""}))
    assert read_run(folder).status == "stopped"


def test_an_empty_folder_has_a_page(tmp_path):
    assert "Nothing has been recorded here yet" in write_page([tmp_path]).read_text()


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected a run directory"):
        write_page([tmp_path / "none"])


@pytest.mark.parametrize("name", ["state.json", "summary.json", "config.yaml", "evaluations/iter-00-after_dpo.jsonl"])
def test_a_damaged_file_is_named_on_the_page(tmp_path, name):
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(b'{"a": [\n')
    assert name.rpartition("/")[2] in render([read_run(folder)])


CUTS = [yaml.safe_dump(CONFIG, sort_keys=False)[:length] for length in range(0, 420, 60)]
ODD = [
    *({key: value} for key in CONFIG for value in (3, [1], {"a": None})),
    {"stages": datetime.date(2026, 1, 1)},
    {"align": {"methods": "dpo"}},
    {"align": {"methods": [1], "sft": "no"}},
    {"at": {128: {"dpo": 3}}},
    {"at": {"128": 3}},
    {"resolutions": []},
]


@pytest.fixture(scope="module")
def some_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", done=22)


@pytest.mark.parametrize("text", [*CUTS, *(yaml.safe_dump(CONFIG | change) for change in ODD), "- a list", "&a [*a]"])
def test_settings_that_are_cut_or_of_other_types_are_no_traceback(some_run, text):
    path = some_run / "config.yaml"
    path.write_text(text)
    page = render([read_run(some_run), read_run(some_run)])
    (_, _, *problems) = run_lines([read_run(some_run)])
    assert all(problem.startswith(str(path)) and "\n" not in problem for problem in problems)
    assert all(str(escape(problem)) in page for problem in problems)
    differing_settings([read_run(some_run)])
    if not isinstance(read_run(some_run).config.get("iterations"), int):
        assert problems


def test_a_run_without_scores_has_a_page(tmp_path):
    """A captioned run without reward or judge: images, but no verdicts."""
    folder = make_run(tmp_path / "run")
    for path in (folder / "evaluations").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        nothing = {"score": None, "reward": None, "skill": None, "reason": None}
        path.write_text("".join(json.dumps(line | nothing) + "\n" for line in lines))
    page = render([read_run(folder)])
    assert "No two policies have been scored" in page and "data:image/webp" in page


def test_images_outside_the_run_are_not_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    run = read_run(make_run(tmp_path / "run", done=1))
    assert run.image("../secret.png") is None and run.image("/etc/hostname") is None


def test_text_of_a_run_cannot_become_markup(finished_run):
    page = render([read_run(finished_run)])
    assert "<script>document.title" not in page and "&lt;script&gt;document.title" in page
    assert script_json({"a": "</script><!--", "b": float("nan")}) == '{"a":"\\u003c/script\\u003e\\u003c!--","b":null}'


def test_the_page_says_what_differs_from_the_defaults(finished_run):
    page = render([read_run(finished_run)])
    assert '<th scope="row">iterations</th><td>1</td><td>2</td>' in page
    assert '<th scope="row">dpo.beta</th>' not in page


def test_counts_of_pairs_are_shown_where_dpo_begins_before_all_are_there(finished_run):
    run = read_run(finished_run)
    counts = pair_sections([run])[0].counts
    assert counts == [("built", "4"), ("dropped", "1"), ("identical bits", "1")]
    run.steps["iter-00/pair"] = {"rollout": {"images": 8}, "pairs": run.steps["iter-00/pair"]}
    assert pair_sections([run])[0].counts == counts


def test_two_runs_stand_side_by_side(finished_run, tmp_path):
    other = make_run(tmp_path / "other")
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("beta: 0.1", "beta: 0.5"))
    page = render([read_run(finished_run), read_run(other)])
    assert '<th scope="row">dpo.beta</th><td>0.1</td><td>0.5</td>' in page
    assert "shown: GRPO" in page and "other: GRPO" in page
    assert "other&#39;s GRPO against shown&#39;s GRPO on the same 8 images" in page


def test_runs_of_the_same_name_are_told_apart(finished_run, tmp_path):
    folders = [make_run(tmp_path / place / "demo") for place in ("a/runs", "b/runs")]
    page = write_page(folders).read_text()
    assert (folders[0] / "compare-b-runs-demo.html").is_file()
    for name in ("a/runs/demo", "b/runs/demo"):
        assert f"<b>{name}, iteration 0, 64 px</b>" in page and f"{name}: GRPO" in page
    assert "b/runs/demo&#39;s GRPO against a/runs/demo&#39;s GRPO on the same 8 images" in page
    cells = galleries(read_runs(folders))[0].rows[0].by_run
    assert [(name, len(shown)) for name, shown in cells.items()] == [("a/runs/demo", 4), ("b/runs/demo", 4)]
    assert [run.name for run in read_runs([finished_run, folders[0]])] == ["shown", "demo"]


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vargpt_rl.page.render.render", lambda runs: 1 / 0)
    update_page(make_run(tmp_path / "run", done=3))
    assert "report.html was not written: ZeroDivisionError" in caplog.text
    assert not (tmp_path / "run" / PAGE).exists()


def test_a_page_is_made_without_torch(finished_run):
    code = (
        "import sys; from vargpt_rl.page.__main__ import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(finished_run)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().endswith(PAGE)


def test_the_plan_of_the_page_is_that_of_the_loop():
    for settings in (
        [],
        ["align.methods=[dpo,reward,grpo]"],
        ["stages=[align,edit]", "align.methods=[dpo]", "dpo.control=false"],
        ["align.methods=[dpo,reward]", "dpo.min_pairs=64"],
        ["at.256.dpo.control=false", "at.256.align.methods=[dpo]"],
        ["adapter.kind=lora", "stages=[align]"],
        ["preference.pairs=FILE", "align.methods=[dpo,reward]"],
        ["preference.builder=rewards.preferences:human", "preference.samples=2"],
    ):
        config = load_config(settings)
        assert expected_steps(plain(config)) == list(planned_steps(config)), settings

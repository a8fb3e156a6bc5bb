"""``report`` and ``compare`` write pages; wrong runs are one line and exit code 2."""

from typer.testing import CliRunner

from tests.helpers.run_folder import make_run
from vargpt_rl.cli.app import make_app


def invoke(*arguments):
    return CliRunner().invoke(make_app(), [str(argument) for argument in arguments])


def test_a_page_is_written_into_the_run(tmp_path):
    run = make_run(tmp_path / "first", done=9)
    found = invoke("report", run)
    assert found.exit_code == 0 and found.stdout.strip() == str(run / "report.html")
    assert invoke("report", run, "--out", tmp_path / "own.html").exit_code == 0
    assert (tmp_path / "own.html").read_text().startswith("<!doctype html>")


def test_two_runs_leave_the_page_of_the_first_alone(tmp_path):
    first, second = make_run(tmp_path / "first", done=9), make_run(tmp_path / "second", done=9)
    assert invoke("compare", first, second).stdout.strip() == str(first / "compare-second.html")
    assert not (first / "report.html").exists()


def test_a_run_is_not_compared_with_itself(tmp_path):
    run = make_run(tmp_path / "first", done=9)
    found = invoke("compare", run, tmp_path / "first/../first")
    assert found.exit_code == 2 and found.stderr == f"error: {run}: expected different runs, this one is given twice\n"


def test_a_run_that_is_not_there_is_one_line(tmp_path):
    for command in ("report", "watch"):
        found = invoke(command, tmp_path / "none")
        assert found.exit_code == 2 and "there is no run here" in found.stderr and found.stderr.count("\n") == 1


def test_runs_are_listed_with_status_and_score(tmp_path):
    make_run(tmp_path / "whole")
    make_run(tmp_path / "begun", done=2)
    found = invoke("runs", tmp_path)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in found.stdout.splitlines()}
    assert found.exit_code == 0 and lines["run"] == "status steps time last score"
    assert lines["whole"].startswith("complete") and "at 128 px, GRPO" in lines["whole"]
    assert "2/" in lines["begun"] and lines["begun"].endswith("-")


def test_a_run_with_damaged_settings_is_listed_with_the_others(tmp_path):
    make_run(tmp_path / "whole")
    damaged = make_run(tmp_path / "damaged", done=2) / "config.yaml"
    damaged.write_text("name: damaged\nstages: [align]\nresolutions:\n")
    found = invoke("runs", tmp_path)
    assert found.exit_code == 0 and "2/?" in found.stdout and "complete" in found.stdout
    assert f"{damaged}: resolutions is missing\n" in found.stdout
    for command in (("report", damaged.parent), ("config", "diff", damaged.parent)):
        found = invoke(*command)
        assert found.exit_code == 0, found.stderr
    assert f"{damaged}: runs, seed, checkpoint" in found.stdout and "missing, but in defaults.yaml" in found.stdout


def test_no_run_to_list_is_one_line(tmp_path):
    found = invoke("runs", tmp_path)
    assert found.exit_code == 2 and "there is no run here" in found.stderr


def test_settings_that_differ_are_listed(tmp_path):
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    assert invoke("config", "diff", first, second).stdout == "no setting differs\n"
    path = second / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 7"))
    assert invoke("config", "diff", first, second).stdout == "seed: 0 -> 7\n"

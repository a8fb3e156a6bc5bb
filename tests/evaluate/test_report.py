"""Reports of benchmarks: what stands beside and below the table."""

from types import SimpleNamespace

from vargpt_rl.evaluate.__main__ import other_resolutions
from vargpt_rl.evaluate.report import Column, Scores, write_report
from vargpt_rl.model.hub import EMBEDDED

COLUMNS = [Column("overall", "all"), Column("edits", "edits")]


def report(folder, *counts):
    rows = {f"model {i}": Scores({"overall": 0.5, "edits": 0.25}, counts=each) for i, each in enumerate(counts)}
    about = {name: {"checkpoint": name} for name in rows}
    return write_report(folder, "shapes", settings={}, columns=COLUMNS, rows=rows, models=about)


def test_numbers_behind_the_values_are_said_once(tmp_path):
    text = report(tmp_path, {"overall": 8, "edits": 4}, {"overall": 8, "edits": 4})
    assert text.count("n: all 8, edits 4.") == 1 and (tmp_path / "shapes.md").read_text() == text


def test_numbers_that_differ_are_said_for_each_checkpoint(tmp_path):
    text = report(tmp_path, {"overall": 8}, {"overall": 7})
    assert "n of model 0: all 8." in text and "n of model 1: all 7." in text
    assert "n" not in report(tmp_path, {}, {}).split()


def test_a_checkpoint_that_draws_at_another_resolution_is_named():
    models = [SimpleNamespace(name="tiny", path=EMBEDDED)]
    told = "tiny draws at 128 px, but is measured at 256 px here: resolution=128 changes that"
    assert other_resolutions(models, 256) == [told]
    assert other_resolutions(models, 128) == []

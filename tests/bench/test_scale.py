"""The benchmark of bookkeeping does the work that it times."""

import pytest

from vargpt_rl.bench import dry_run, scale
from vargpt_rl.common.settings import parse
from vargpt_rl.data.preferences import read_table


def test_every_part_is_measured(tmp_path):
    found = scale.measure(40, tmp_path)
    assert list(found) == ["plan", "build", "write table", "describe", "pair order", "batches", "MiB"]
    assert len(read_table(tmp_path / "40.parquet")) == 40


def test_every_item_is_handed_out_once():
    assert scale.hand_out(100) == 100


def test_numbers_of_pairs_are_checked():
    with pytest.raises(ValueError, match="pairs"):
        parse(scale.ScaleSettings, {"pairs": [0]}, "")


def test_a_dry_run_takes_the_steps_of_a_run(tmp_path):
    context = dry_run.enter_iteration(40, tmp_path)
    found = dry_run.measure_steps(context)
    assert [each.name.split()[0] for each in found] == ["sample,", "the", "judge", "score"]
    assert all(each.seconds > 0 and each.peak > 0 for each in found)
    table = read_table(context.table())
    assert len(table) == 40 and table.prompt_id.nunique() == 40
    assert list(context.run.state["steps"]) == ["iter-00/sample", "iter-00/judge", "iter-00/pair"]

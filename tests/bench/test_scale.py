"""The benchmark of bookkeeping does the work that it times."""

import pytest

from vargpt_rl.bench import scale
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

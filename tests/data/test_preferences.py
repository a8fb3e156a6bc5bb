import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.faults import ask
from tests.helpers.preferences import row
from vargpt_rl.common.failpoints import VARIABLE
from vargpt_rl.data.preferences import COLUMNS, main, read_table, write_table

ROOT = Path(__file__).parents[2]
numbers = st.floats(allow_nan=False, allow_infinity=False)
KINDS = {
    pa.string(): st.text(st.characters(codec="utf-8")),
    pa.binary(): st.binary(),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): numbers,
    pa.list_(pa.float64()): st.lists(numbers, max_size=3),
}
SEEDS = st.none() | st.integers(-(2**31), 2**32 - 1)  # to a reader that knows of no nulls they are float64
NULLABLE = {pa.int64(): SEEDS, pa.float64(): st.none() | numbers}
rows = st.lists(
    st.fixed_dictionaries({f.name: NULLABLE[f.type] if f.nullable else KINDS[f.type] for f in COLUMNS}),
    max_size=4,
    unique_by=lambda row: row["pair_id"],
)


@settings(max_examples=60)
@given(rows)
def test_what_is_written_is_read(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "iter-00.parquet"
        write_table(path, rows)
        assert [file.name for file in Path(folder).iterdir()] == [path.name]
        for table in (read_table(path), pd.read_parquet(path)):
            assert list(table.columns) == COLUMNS.names
            read = table.to_dict("records")
            assert [{name: plain(value) for name, value in row.items()} for row in read] == rows


def plain(value: object) -> object:
    """A value as it was before pandas made NaN of None and arrays of lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if value is pd.NA:
        return None
    return None if isinstance(value, float) and math.isnan(value) else value


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("a"), row("b"), row("a")], "1 pair ids occur more than once, among them 'a'"),
        ([row(reference_chosen_logp=math.nan)], "pair 'a': reference_chosen_logp is nan, expected finite numbers"),
        ([row(reference_rejected_logp=-math.inf)], "pair 'a': reference_rejected_logp is -inf"),
        ([row(reference_chosen_by_scale=[-1.0, math.nan])], "pair 'a': reference_chosen_by_scale is"),
        ([row(resolution="256 px")], "column resolution is not of type int32"),
        ([row(rejected_seed=2**63)], "column rejected_seed is not of type int64"),
        ([row(chosen_bits=3)], "column chosen_bits is not of type binary"),
        ([row(prompt=None)], "column prompt has 1 empty values"),
        ([row(reward=1.0)], "pair 'a': missing or unknown columns: reward"),
        ([{"pair_id": "a"}], "pair 'a': missing or unknown columns: chosen_bits, "),
    ],
)
def test_bad_rows_are_refused_and_the_old_table_stays(tmp_path, rows, said):
    path = tmp_path / "iter-00.parquet"
    write_table(path, [row("old")])
    with pytest.raises(ValueError, match=f"iter-00.parquet: {said}"):
        write_table(path, rows)
    assert list(read_table(path).pair_id) == ["old"]


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "table.parquet"
    table = pa.Table.from_pylist([row()], schema=COLUMNS)
    pq.write_table(table.drop_columns(["reply"]), path)
    with pytest.raises(ValueError, match="table.parquet: column reply is missing"):
        read_table(path)
    pq.write_table(table.set_column(4, "resolution", pa.array(["256"])), path)
    with pytest.raises(ValueError, match="table.parquet: column resolution is of type string, expected int32"):
        read_table(path)
    pq.write_table(table.set_column(2, "prompt", pa.array([None], pa.string())), path)
    with pytest.raises(ValueError, match="table.parquet: column prompt has 1 empty values"):
        read_table(path)
    path.write_bytes(b"no table")
    with pytest.raises(ValueError, match="table.parquet: not a Parquet file"):
        read_table(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_table(tmp_path / "nowhere")


def test_a_table_that_went_through_pandas_is_read(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, [row("a"), row("b"), row("c")])
    table = pd.read_parquet(path)
    table["note"] = "mine"
    table[table.pair_id != "b"].to_parquet(path)
    assert list(read_table(path).pair_id) == ["a", "c"]
    assert list(read_table(path).columns) == COLUMNS.names
    assert list(read_table(path).rejected_seed) == [1, 1] and read_table(path).chosen_seed.isna().all()
    table["chosen_seed"] = [0.5, None, 2.0]
    table.to_parquet(path)
    with pytest.raises(ValueError, match="column chosen_seed is of type double, expected int64"):
        read_table(path)


def test_where_a_table_is_from_is_kept_in_it(tmp_path):
    path = tmp_path / "table.parquet"
    origin = {"samples": 3, "prompts": 2, "prompts_without_winner": 1, "dropped_by_reason": {"no winner": 2}}
    write_table(path, [row()], origin)
    assert read_table(path).attrs == {"origin": origin}
    for bad in ("[1]", '{"samples": 3}', "{"):
        pq.write_table(pq.read_table(path).replace_schema_metadata({"origin": bad}), path)
        assert main(["describe", str(path)]) == 2


def test_seeds_stay_integers_beside_nulls(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, [row("a"), row("b", rejected_seed=None, chosen_seed=2**53 + 1)])
    table = read_table(path)
    assert list(table.rejected_seed) == [1, pd.NA] and table.chosen_seed[1] == 2**53 + 1


def test_a_file_that_is_no_table_is_one_line_and_exit_code_2(tmp_path, capsys):
    path = tmp_path / "table.parquet"
    for make, said in {
        "nothing": "no such file",
        "folder": "table.parquet",
        "text": "not a Parquet file",
        "scales": "table.parquet: images of one resolution differ in how many scales",
    }.items():
        path.unlink(missing_ok=True)
        if make == "folder":
            path.mkdir()
        elif make == "text":
            path.write_text("no\ntable")
        elif make == "scales":
            write_table(path, [row(reference_chosen_by_scale=[-10.0])])
        assert main(["describe", str(path)]) == 2
        shown = capsys.readouterr()
        assert not shown.out and len(shown.err.splitlines()) == 1
        assert shown.err.startswith("error: ") and said in shown.err
        if make == "folder":
            path.rmdir()
    with pytest.raises(SystemExit) as exited:
        main(["explain", str(path)])
    assert exited.value.code == 2


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_no_crash(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        write_table(path, [row("a"), row("b", rejected_reward=0.5)])
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
        assert main(["describe", str(path)]) in (0, 2)


def test_a_full_disk_leaves_the_old_table_and_no_half_of_a_new_one(small_disk):
    path = small_disk / "table.parquet"
    write_table(path, [row("a")])
    noise = np.random.default_rng(0).bytes(40_000_000)
    with pytest.raises(OSError, match="No space left"):
        write_table(path, [row("b", chosen_bits=noise)])
    assert list(read_table(path).pair_id) == ["a"] and list(small_disk.iterdir()) == [path]


def test_a_changed_byte_in_a_column_is_noticed(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, [row("a", prompt="a red circle and two blue squares", chosen_bits=bytes(range(200)))])
    data = bytearray(path.read_bytes())
    at = data.index(bytes(range(190, 200)))
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="table.parquet: not a Parquet file, or damaged: .*CRC"):
        read_table(path)


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_table(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, [row("a")])
    ask(tmp_path / "faults", "table.parquet/written")
    code = "from tests.data.test_preferences import *; write_table(sys.argv[1], [row('b'), row('c')])"
    for ended, ids in ((-signal.SIGKILL, ["a"]), (0, ["b", "c"])):
        environment = os.environ | {VARIABLE: str(tmp_path / "faults")}
        assert subprocess.run([sys.executable, "-c", code, path], env=environment, cwd=ROOT).returncode == ended
        assert list(read_table(path).pair_id) == ids
    assert [each.name for each in tmp_path.glob("*.parquet")] == ["table.parquet"]

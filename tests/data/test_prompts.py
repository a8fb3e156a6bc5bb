"""Midjourney's prompts as a file that the iterations read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vargpt_rl.data.prompts import main
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.sources import prompts_from_file

PROMPTS = [
    "a red fox, oil on canvas --ar 16:9 --v 5",
    "a tower at dusk --no people",
    "a red fox",
    "--v 5",
    None,
    "a sea",
]


@pytest.fixture
def table(tmp_path):
    pq.write_table(pa.table({"prompt": [*PROMPTS, PROMPTS[0]]}), tmp_path / "prompts.parquet", row_group_size=2)
    return tmp_path / "prompts.parquet"


def test_prompts_are_written_without_their_commands_and_read_by_a_run(table, tmp_path, capsys):
    out = tmp_path / "prompts.jsonl"
    assert main([f"files={table}", f"out={out}", "max_bad_fraction=0.5"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red fox, oil on canvas", "a tower at dusk", "a red fox", "a sea"]
    assert rows[0]["commands"] == {"ar": "16:9", "v": "5"} and rows[1]["commands"] == {"no": "people"}
    assert capsys.readouterr().out.startswith("4 prompts")
    quarantine = Quarantine(tmp_path / "q")
    assert [(p.id, p.text) for p in prompts_from_file(out, quarantine)] == [(r["id"], r["prompt"]) for r in rows]
    assert not quarantine.counts
    bad = [json.loads(line) for path in (tmp_path / "prompts.jsonl.quarantine").iterdir() for line in path.open()]
    assert sorted(line["reason"] for line in bad) == [
        '"prompt" is of type NoneType, expected str',
        "prompt of nothing but commands",
    ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["max_bad_fraction=0.1"], "2 of 7 records are bad"),
        (["files=nothing.parquet"], "nothing fits nothing.parquet"),
        (["limit=0"], "limit=0: expected 1 or more"),
    ],
)
def test_faults_are_one_line_and_nothing_is_written(table, tmp_path, capsys, changes, named):
    out = tmp_path / "prompts.jsonl"
    given = {
        key: value for key, _, value in (text.partition("=") for text in [f"files={table}", f"out={out}", *changes])
    }
    assert main([f"{key}={value}" for key, value in given.items()]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not out.exists()


def test_a_limit_counts_different_prompts(table, tmp_path):
    out = tmp_path / "prompts.jsonl"
    assert main([f"files={table}", f"out={out}", "limit=2"]) == 0
    assert len(out.read_text().splitlines()) == 2

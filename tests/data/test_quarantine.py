import json

import pytest

from vargpt_rl.data.quarantine import LONGEST_RECORD, Quarantine


def test_records_are_written_and_counted(tmp_path):
    quarantine = Quarantine(tmp_path / "run" / "quarantine.jsonl")
    assert not quarantine.path.exists()
    quarantine.add("a.jsonl:1", "{", "not JSON")
    quarantine.add("a.jsonl:7", "é\n\udc80" + "x" * 10_000, "not JSON")
    quarantine.add("x.png", "x.png", "image without a caption", lost=False)
    lines = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert [line["source"] for line in lines] == ["a.jsonl:1", "a.jsonl:7", "x.png"]
    assert lines[0] == {"source": "a.jsonl:1", "reason": "not JSON", "lost": True, "record": "{"}
    assert len(lines[1]["record"]) == LONGEST_RECORD
    assert quarantine.counts == {"not JSON": 2, "image without a caption": 1}
    assert quarantine.lost == 2


def test_check_permits_up_to_the_fraction(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    quarantine.check(0, 0.0)
    for number in range(2):
        quarantine.add(f"a:{number}", "", "not JSON")
    for number in range(10):
        quarantine.add(f"b:{number}", "", "image without a caption", lost=False)
    quarantine.check(20, 0.1)
    with pytest.raises(ValueError, match=r"2 of 19 records are bad(.|\n)*0.1(.|\n)*2  not JSON"):
        quarantine.check(19, 0.1)
    with pytest.raises(ValueError, match="2 of 2"):
        quarantine.check(2, 0.99)
    quarantine.check(2, 1.0)


def test_check_takes_the_number_lost_of_one_reading(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    for number in range(5):
        quarantine.add(f"a:{number}", "", "not JSON")
    quarantine.check(10, 0.1, lost=1)
    quarantine.check(10, 0.0, lost=0)
    with pytest.raises(ValueError, match=r"2 of 10 records are bad(.|\n)*5  not JSON"):
        quarantine.check(10, 0.1, lost=2)


def test_what_other_processes_wrote_down_is_taken_over_once(tmp_path):
    for name in ("a/one", "b/two"):
        other = Quarantine(tmp_path / "others" / f"{name}.jsonl")
        other.add("file:1", "record", "too long")  # both met it
        other.add(f"{name}:2", "record", "odd", lost=False)
    own = Quarantine(tmp_path / "own.jsonl")
    own.add("file:9", "record", "too long")
    assert own.gather(tmp_path / "others") == 3
    assert own.gather(tmp_path / "others") == own.gather(tmp_path / "nowhere") == 0
    assert own.counts == {"too long": 2, "odd": 2} and own.lost == 2
    assert len((tmp_path / "own.jsonl").read_text().splitlines()) == 4

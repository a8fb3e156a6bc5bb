"""GenEval 2: the scorer's input files, and metrics from its lists."""

import json
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import gmean

from vargpt_rl.evaluate.geneval2 import SKILLS, soft_tifa

PROMPTS = [
    {"prompt": "two metal toys", "atom_count": 3, "skills": ["count", "attribute", "object"],
     "vqa_list": [["How many toys?", "two"], ["Are the toys metal?", "Yes"], ["Are there toys?", "Yes"]]},
    {"prompt": "a pig", "atom_count": 1, "skills": ["count", "object"],
     "vqa_list": [["How many pigs?", "one"], ["Are there any pigs?", "Yes"]]},
]  # fmt: skip
SCORES = [[0.5, 0.25, 1.0], [0.0, 0.9]]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "geneval2_data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return f"prompts={file}"


def test_writes_the_scorers_inputs_and_reads_its_lists(command, prompts, painted, folder, result, capsys):
    assert command("benchmark=geneval2", prompts) == 2
    where = folder("geneval2")
    said = capsys.readouterr().err
    for part in (where / "prompts.jsonl", where / "images.json", where / "score_lists.json"):
        assert str(part) in said
    images = json.loads((where / "images.json").read_text())
    rows = [json.loads(line) for line in (where / "prompts.jsonl").read_text().splitlines()]
    assert rows == PROMPTS and list(images) == [row["prompt"] for row in PROMPTS]
    for path in images.values():
        Image.open(path).load()
    assert len(set(images.values())) == 2

    (where / "score_lists.json").write_text(json.dumps(SCORES))
    assert command("benchmark=geneval2", prompts) == 0
    assert result("geneval2")["metrics"] == pytest.approx(
        {
            "soft_tifa_am": 100 * (1.75 / 3 + 0.45) / 2,
            "soft_tifa_gm": 50 * 0.125 ** (1 / 3),
            "count": 25,
            "attribute": 25,
            "object": 95,
        }
    )
    assert result("geneval2")["details"]["soft_tifa_gm_by_atoms"] == pytest.approx({"1": 0, "3": 50})


rows = st.lists(
    st.tuples(
        st.integers(3, 10), st.lists(st.tuples(st.sampled_from(SKILLS), st.floats(0, 1)), min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=8,
)


@given(rows)
def test_metrics_agree_with_the_scorers(found):
    lists = [[score for _, score in atoms] for _, atoms in found]
    scores = soft_tifa(lists, [{"atom_count": n, "skills": [skill for skill, _ in atoms]} for n, atoms in found])
    assert scores.metrics["soft_tifa_am"] == pytest.approx(100 * mean(mean(own) for own in lists))
    assert scores.metrics["soft_tifa_gm"] == pytest.approx(100 * mean(float(gmean(own)) for own in lists))
    for skill in SKILLS:
        own = [score for _, atoms in found for name, score in atoms if name == skill]
        assert (skill in scores.metrics) == bool(own)
        assert not own or scores.metrics[skill] == pytest.approx(100 * mean(own))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[0.5, 0.5, 0.5]]", "expected 2 lists of scores, one per prompt, got 1"),
        ("[[0.5, 0.5], [0.5, 0.5]]", "expected 3 scores for 'two metal toys'"),
        ("[[0.5, 0.5, 2], [0.5, 0.5]]", "expected scores from 0 to 1 for 'two metal toys', got ["),
        ("[[0.5, 0.5, null], [0.5, 0.5]]", "expected scores from 0 to 1 for 'two metal toys', got ["),
        ("[[0.5, 0.5, NaN], [0.5, 0.5]]", "expected scores from 0 to 1 for 'two metal toys', got ["),
        ("[[0.5", "Expecting"),
        ("3", "expected a list of lists"),
    ],
)
def test_rejects_bad_lists(command, prompts, painted, folder, capsys, content, said):
    command("benchmark=geneval2", prompts)
    where = folder("geneval2")
    (where / "score_lists.json").write_text(content)
    capsys.readouterr()
    assert command("benchmark=geneval2", prompts) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {where / 'score_lists.json'}: {said}") and "run GenEval 2's scorer" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "a pig"}, '"prompt" repeats an earlier line'),
        ({"prompt": ""}, '"prompt" is not text or is empty'),
        ({"vqa_list": []}, '"vqa_list" is not a list of questions'),
        ({"skills": ["count"]}, '"skills" does not name a known skill for each question'),
        ({"skills": ["count", "taste"]}, '"skills" does not name a known skill for each question'),
        ({"atom_count": None}, '"atom_count" is not an integer'),
    ],
)
def test_quarantines_bad_lines(command, painted, tmp_path, capsys, change, reason):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (*PROMPTS, PROMPTS[1] | {"prompt": "a cow"} | change)))
    assert command("benchmark=geneval2", f"prompts={file}", "max_bad_fraction=0.5") == 2
    assert {line["prompt"] for line in painted} == {"two metal toys", "a pig"}
    (bad_line,) = map(json.loads, (tmp_path / "out/geneval2/quarantine.jsonl").read_text().splitlines())
    assert (bad_line["source"], bad_line["reason"]) == (f"{file}:3", reason)

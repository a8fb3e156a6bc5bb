"""Understanding by lmms-eval: with a script in place of its interpreter, and with the real environment.

LMMS_EVAL_PYTHON names the interpreter of an environment with lmms-eval 0.7.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from vargpt_rl.evaluate.report import reported
from vargpt_rl.evaluate.understanding import TASKS, numbers
from vargpt_rl.text.engine import TextRequest, answers
from vargpt_rl.text.transformers_engine import TransformersEngine

ROOT = Path(__file__).parents[2]
REAL = os.environ.get("LMMS_EVAL_PYTHON")
slow = pytest.mark.timeout(900)  # importing lmms-eval takes long on a busy machine
needs_lmms_eval = pytest.mark.skipif(not REAL, reason="LMMS_EVAL_PYTHON names no environment that has lmms-eval")

STAND_IN = """#!{python}
import json, pathlib, sys
if sys.argv[1] == "-c":
    sys.exit(0)
assert sys.argv[1:3] == ["-m", "vargpt_rl.evaluate.lmms"]
job = json.loads(sys.argv[3])
with open("{log}", "a") as log:
    log.write(sys.argv[3] + "\\n")
for task in job["tasks"]:
    if task == "broken":
        sys.exit("no such task")
    results = json.loads(pathlib.Path("{results}").read_text())[task]
    kept = {{"about": job["about"][task], "results": {{task: results}}, "n-samples": {{task: {{"effective": 7}}}}}}
    pathlib.Path(job["out"], task + ".json").write_text(json.dumps(kept))
"""
RESULTS = {
    "pope_adv": {"alias": "pope_adv", "pope_accuracy,none": 0.5, "pope_accuracy_stderr,none": 0.125, "pope_f1,none": 1},
    "mme": {"mme_cognition_score,none": 100.0, "mme_perception_score,none": 1234.5,
            "mme_perception_score_stderr,none": "N/A"},
    "gqa": {"exact_match,flexible": 0.25, "exact_match_stderr,flexible": 0.01},
    "mmbench_en_dev_static": {"gpt_eval_score,none": 66.0},
    "docvqa_val": {"anls,none": 0.75, "anls_stderr,none": 0.1},
    "textvqa_val": {"submission,none": "file"},
}  # fmt: skip


@pytest.fixture
def stand_in(tmp_path):
    """An interpreter that writes `RESULTS` for the tasks it is given, and the jobs it was given."""
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    script = tmp_path / "python"
    script.write_text(STAND_IN.format(python=sys.executable, log=tmp_path / "jobs", results=tmp_path / "results.json"))
    script.chmod(0o755)

    def jobs() -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "jobs").read_text().splitlines()]

    return f"python={script}", jobs


def test_reports_as_the_papers_do_and_runs_tasks_once(command, stand_in, result, tmp_path, capsys):
    python, jobs = stand_in
    tasks = "tasks=[pope_adv,mme,gqa,mmbench_en_dev_static,docvqa_val]"
    assert command("benchmark=lmms", python, tasks, "limit=7") == 0
    row = result("lmms")
    ours = {"pope_adv": 50.0, "mme": 1234.5, "gqa": 25.0, "mmbench": 66.0, "docvqa_val anls": 0.75}
    assert row["metrics"] == ours
    assert row["intervals"] == {
        "pope_adv": pytest.approx([25.5, 74.5], abs=0.01),
        "gqa": pytest.approx([23.04, 26.96], abs=0.01),
    }
    assert row["counts"]["pope_adv"] == 7
    (job,) = jobs()
    assert (job["limit"], job["weights"], job["checkpoint"]) == (7, row["weights"], row["checkpoint"])
    table = (tmp_path / "out/lmms.md").read_text()
    assert "| MMBench | POPE adv | MME | GQA | docvqa_val anls |" in table
    assert "| 66.00 | 50.00 (25.50 to 74.50) | 1234.5 | 25.00 (23.04 to 26.96) | 0.75 |" in table
    assert "| VARGPT-v1.1 (7B+2B) (reported) | 81.01 | 84.40 | 1684.1 | 66.20 | - |" in table
    assert "VILA-U (7B) (reported) | - | - | 1401.8 | - | - |" in table
    assert "Liquid" in table and "LWM" not in table

    assert command("benchmark=lmms", python, tasks, "limit=7") == 0
    assert command("benchmark=lmms", python, "tasks=[mme]", "limit=7") == 0
    assert len(jobs()) == 1, "results that are there are not measured again"
    assert command("benchmark=lmms", python, "tasks=[mme]", "limit=8") == 2
    assert "mme.json was made with limit=7, now it is 8" in capsys.readouterr().err


def test_runs_the_papers_tasks_by_default(command, stand_in, capsys):
    assert command("benchmark=lmms", stand_in[0]) == 1
    assert stand_in[1]()[0]["tasks"] == list(TASKS)


def test_fails_if_lmms_eval_fails(command, stand_in, capfd):
    assert command("benchmark=lmms", stand_in[0], "tasks=[mme,broken]") == 1
    said = capfd.readouterr().err.splitlines()
    assert said[-1] == "error: lmms-eval failed with exit code 1, see its output above"
    assert "no such task" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["python=/nowhere/python"], "python=/nowhere/python: No such file or directory"),
        ([f"python={sys.executable}"], f"python={sys.executable}: cannot import lmms-eval there (ModuleNotFound"),
        (["num_shards=2", "shard=1"], "num_shards=2: benchmark=lmms runs in one process"),
        (["prompts=a.txt"], "prompts=a.txt: benchmark=lmms does not use it"),
    ],
)
def test_bad_settings_fail(command, capsys, arguments, said):
    assert command("benchmark=lmms", "tasks=[mme]", *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {said}") and message.count("\n") == 1


def test_results_without_the_metric_fail(command, stand_in, capsys):
    assert command("benchmark=lmms", stand_in[0], "tasks=[textvqa_val]") == 2
    assert "textvqa_val.json: expected the metric exact_match, got {}" in capsys.readouterr().err


def test_every_reported_metric_has_a_column():
    columns = {own.column for own in TASKS.values()}
    rows = reported("lmms")["rows"]
    assert set().union(*rows.values()) == columns
    assert set(rows["VARGPT-v1.1 (7B+2B)"]) == columns
    assert numbers({"a,none": 1, "alias": "x", "b_stderr,none": "N/A"}) == {"a": 1.0}


TASK = """
task: mini_mme
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.mme_doc_to_visual
doc_to_text: !function utils.mme_doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}}
process_results: !function utils.mme_process_results
metric_list:
  - metric: mme_perception_score
    aggregation: !function utils.mme_aggregate_results
    higher_is_better: true
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: ""}}}}
metadata: {{version: 0.0}}
"""

IN_LMMS_EVAL = """
import json, sys
from lmms_eval import models, utils
from lmms_eval.tasks import TaskManager
from vargpt_rl.evaluate.lmms import manifest
models.MODEL_REGISTRY_V2.register_manifest(manifest())
model = models.get_model("vargpt")
tasks = TaskManager("ERROR")
metrics = {}
for name in sys.argv[1:]:
    config = utils.load_yaml_config(tasks.task_index[name]["yaml_path"], mode="simple")
    metrics[name] = [metric["metric"] for metric in config["metric_list"]]
print(json.dumps([model.__name__, metrics]))
"""


@pytest.fixture
def lmms_eval(monkeypatch, tmp_path):
    """Lets the real environment import this tree, with a cache of data sets of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@slow
@needs_lmms_eval
def test_lmms_eval_knows_the_model_and_the_tasks(lmms_eval):
    done = subprocess.run([REAL, "-c", IN_LMMS_EVAL, *TASKS], capture_output=True, text=True, check=True)
    model, metrics = json.loads(done.stdout.splitlines()[-1])
    assert model == "VargptLmms"
    assert all(own.metric in metrics[task] for task, own in TASKS.items())


@slow
@needs_lmms_eval
def test_lmms_eval_gets_the_models_own_answers(command, lmms_eval, model, chat, result, folder, tmp_path):
    rows = [
        {"question_id": str(i), "question": f"is it {colour}?", "answer": right, "category": "color",
         "image": Image.new("RGB", (56, 56), colour)}
        for i, colour in enumerate(("red", "blue")) for right in ("Yes", "No")
    ]  # fmt: skip
    (tmp_path / "tasks").mkdir()
    features = {key: datasets.Value("string") for key in rows[0]} | {"image": datasets.Image()}
    data = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(data)
    (tmp_path / "tasks/mini_mme.yaml").write_text(TASK.format(data=data))
    (tmp_path / "tasks/utils.py").write_text("from lmms_eval.tasks.mme.utils import *\n")
    arguments = ["benchmark=lmms", "tasks=[mini_mme]", f"include={tmp_path / 'tasks'}", f"python={REAL}"]
    arguments.append("batch_size=3")
    assert command(*arguments) == 0
    score = result("lmms")["metrics"]["mini_mme mme_perception_score"]
    records = folder("lmms") / "answers.jsonl"
    kept = [json.loads(line)["answer"] for line in records.read_text().splitlines()]
    requests = [TextRequest(row["question"], [row["image"]]) for row in rows]
    said = answers(TransformersEngine(model, chat), requests, 8)
    assert kept == said
    right = [words.lower().startswith(row["answer"].lower()) for words, row in zip(said, rows, strict=True)]
    assert score == 100 * sum(right) / 4 + 50 * sum(all(right[i : i + 2]) for i in (0, 2))

    records.write_text(records.read_text().splitlines()[0] + "\n")
    (folder("lmms") / "mini_mme.json").unlink()
    assert command(*arguments) == 0
    assert [json.loads(line)["answer"] for line in records.read_text().splitlines()] == kept

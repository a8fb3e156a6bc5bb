"""The study's runs share their SFT, and its table says what they measured."""

import json
import sys

import pytest

from configs.load import load_config
from vargpt_rl.bench import preferences
from vargpt_rl.bench.preferences import Study, fork, loop, main, overrides, table
from vargpt_rl.driver.run import Run


def begun(directory):
    """A run that has been through its pairs, without the training."""
    run = Run(directory, {"name": "external"})
    for name in ("understands/before", "iter-00/before", "iter-00/sft", "iter-00/after_sft", "iter-00/sample"):
        run.step(name, lambda name=name: {"did": name})
    weights = directory / "checkpoints/iter-00-sft/final"
    weights.mkdir(parents=True)
    (weights / "weights.safetensors").write_bytes(b"weights")
    (directory / "preferences").mkdir()
    for split in ("", "-held-out"):
        (directory / f"preferences/iter-00{split}.parquet").write_bytes(b"pairs")
    return directory


def test_a_fork_has_what_was_done_before_the_pairs(tmp_path):
    source = begun(tmp_path / "external")
    fork(source, tmp_path / "best")
    run = Run(tmp_path / "best", {"name": "best"})  # other settings are not refused
    done = ["understands/before", "iter-00/before", "iter-00/sft", "iter-00/after_sft"]
    assert list(run.state["steps"]) == done
    assert (run.directory / "checkpoints/iter-00-sft/final/weights.safetensors").read_bytes() == b"weights"
    assert [path.name for path in (run.directory / "preferences").iterdir()] == ["iter-00-held-out.parquet"]
    run.step("iter-00/sample", dict)
    fork(source, tmp_path / "best")  # begun: left as it is
    assert list(Run(tmp_path / "best", {"name": "best"}).state["steps"]) == [*done, "iter-00/sample"]
    assert not list(tmp_path.glob(".*"))


def test_the_runs_differ_in_their_pairs_alone():
    configs = {run: load_config(settings) for run, settings in overrides(Study(), 2).items()}
    external, best = configs["external"], configs["best"]
    assert (external.seed, best.seed, best.preference.samples) == (2, 2, 4)
    assert external.sft == best.sft and external.dpo.recipe == best.dpo.recipe
    assert external.evaluation == best.evaluation and external.preference.count == best.preference.count
    assert external.dpo.control and not best.dpo.control
    assert external.directory.name == "seed-2-external" and best.directory.name == "seed-2-best"


def result(sft: float, control: float, dpo: float) -> dict:
    moments = {"after_sft": sft, "sft_on_winners": control, "after_dpo": dpo}
    scores = {moment: {"overall": score, "chosen_logp_change": 2.0} for moment, score in moments.items()}
    del scores["after_sft"]["chosen_logp_change"]
    return {"eval": scores, "pairs": {"built": 7}}


def test_the_table_has_means_and_spreads():
    results = [
        {"external": result(0.5, 0.6, 0.7), "best": result(0.5, 0.0, 0.8)},
        {"external": result(0.7, 0.6, 0.7), "best": result(0.7, 0.0, 0.9)},
    ]
    assert table(results).splitlines()[2:] == [
        "| SFT | 0.600 ± 0.141 | - | 0.500, 0.700 | - | - |",
        "| control: SFT on winners | 0.600 ± 0.000 | +0.000 ± 0.141 | 0.600, 0.600 | - | +2.0 |",
        "| DPO, external_winner | 0.700 ± 0.000 | +0.100 ± 0.141 | 0.700, 0.700 | 7, 7 | +2.0 |",
        "| DPO, best_of_n | 0.850 ± 0.071 | +0.250 ± 0.071 | 0.800, 0.900 | 7, 7 | +2.0 |",
    ]


def test_every_run_is_made_in_order_and_summed_up(tmp_path, monkeypatch, capsys):
    made = []

    def fake_loop(arguments, log):
        directory = load_config(arguments).directory
        made.append(directory.name)
        if not directory.exists():
            begun(directory)
        scores = json.dumps({"iterations": [result(0.5, 0.5, 0.25 * len(made))]})
        (directory / "summary.json").write_text(scores)

    monkeypatch.setattr(preferences, "loop", fake_loop)
    assert main([f"runs={tmp_path}", "seeds=2"]) == 0
    assert made == ["seed-0-external", "seed-0-best", "seed-1-external", "seed-1-best"]
    assert "| DPO, best_of_n | 0.750 ± 0.354 |" in capsys.readouterr().out


def test_a_run_that_fails_says_why(tmp_path, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="exit code 2.*(?s:.*)no_such_key"):
        loop(["no_such_key=1"], tmp_path / "log")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main([f"runs={tmp_path}", "seeds=1"]) == 1
    assert "exit code 1" in capsys.readouterr().err
    assert main(["seeds=0"]) == 2

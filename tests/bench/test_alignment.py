"""The study's runs share their SFT, and its table says what they measured."""

import json
import sys
from collections import defaultdict
from dataclasses import replace

import pytest

from configs.load import load_config
from tests.helpers.study import begun, scored
from vargpt_rl.bench import alignment
from vargpt_rl.bench.alignment import BASE, VARIANTS, AlignmentStudy, Outcome, main, overrides, table
from vargpt_rl.bench.study import run_loop
from vargpt_rl.evaluate.paired import write_scores


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_share_all_but_their_method(variant):
    base = load_config(overrides(AlignmentStudy(), 2, BASE))
    config = load_config(overrides(AlignmentStudy(), 2, variant))
    assert config.directory.name == f"seed-2-{variant}"
    assert (config.seed, config.sft, config.evaluation) == (base.seed, base.sft, base.evaluation)
    longer = {"grpo_twice", "grpo_reuse", "grpo_to_4x4_reuse"}
    own = {"online_dpo": {"lr": base.rl.recipe.lr}} | {name: {"steps": base.rl.recipe.steps} for name in longer}
    recipe = replace(config.rl.recipe, **own.get(variant, {}))
    assert (recipe, config.dpo.recipe) == (base.rl.recipe, base.dpo.recipe)
    assert config.at_resolution(256).sft.recipe.steps == 70 and not config.at
    assert config.dpo.control == (variant == BASE)


def policy(scores, **known):
    return Outcome(images=scored(scores), **{"questions": None, "seconds": None, "diversity": None} | known)


def test_the_table_has_means_spreads_and_paired_gains():
    results = [
        {"SFT": policy([0, 1, 0, 0]), "control": policy([0, 1, 1, 0]), "grpo": policy([1, 1, 1, 0], seconds=8.0)},
        {"SFT": policy([0, 1, 1, 0]), "control": policy([0, 1, 1, 0]), "grpo": policy([1, 1, 1, 1], seconds=9.0)},
    ]
    assert table(results).splitlines()[2:] == [
        "| SFT | 0.375 ± 0.177 | - | - | 0.250, 0.500 | - | - | - |",
        "| control | 0.500 ± 0.000 | +0.125 ± 0.125 (0.125) | - | 0.500, 0.500 | - | - | - |",
        "| grpo | 0.875 ± 0.177 | +0.500 ± 0.204 (0.000) | +0.375 ± 0.239 (0.125) | 0.750, 1.000 | - | - | 8 ± 1 |",
    ]


def test_every_run_is_made_once_and_summed_up(tmp_path, monkeypatch, capsys):
    made = defaultdict(int)

    def fake_loop(arguments, log):
        config = load_config(arguments)
        made[config.directory.name] += 1
        if not config.directory.exists():
            begun(config.directory)
            write_scores(config.directory / "evaluations/iter-00-control.jsonl", scored([0.0, 1.0]))
        method = config.align.methods[-1]
        write_scores(config.directory / f"evaluations/iter-00-after_{method}.jsonl", scored([1.0, 1.0]))
        summary = {
            "iterations": [{method: {"seconds": 3.0}, "eval": {f"after_{method}": {"diversity": 0.5}}}],
            "understanding": {"before": {"accuracy": 0.7}, "after": {"accuracy": 0.6}},
        }
        (config.directory / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(alignment, "run_loop", fake_loop)
    for _ in range(2):
        assert main([f"runs={tmp_path}", "seeds=2", "variants=[dpo,grpo]"]) == 0
    assert made == {f"seed-{seed}-{name}": 1 for seed in range(2) for name in ("dpo", "grpo")}
    shown = capsys.readouterr().out
    assert "| SFT | 0.500 ± 0.000 | - | - | 0.500, 0.500 | - | 0.700 ± 0.000 | - |" in shown
    row = "| grpo | 1.000 ± 0.000 | +0.500 ± 0.500 (0.000) | +0.500 ± 0.500 (0.000) | 1.000, 1.000 |"
    assert row + " 0.500 ± 0.000 | 0.600 ± 0.000 | 3 ± 0 |" in shown


def test_a_run_that_fails_says_why(tmp_path, monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="exit code 2.*(?s:.*)no_such_key"):
        run_loop(["no_such_key=1"], tmp_path / "log")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main([f"runs={tmp_path}", "seeds=1"]) == 1
    assert "exit code 1" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["seeds=0", "variants=[ppo]"])
def test_impossible_arguments_are_refused(arguments):
    assert main([arguments]) == 2

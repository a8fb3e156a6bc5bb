"""The study of adapters: its settings, runs that share their SFT, and its table."""

import json

import pytest

from configs.load import load_config
from tests.helpers.study import begun, scored
from vargpt_rl.bench import adapters
from vargpt_rl.bench.adapters import AdapterStudy, main, overrides
from vargpt_rl.evaluate.paired import write_scores


def test_variants_share_all_but_what_trains():
    whole, adapted = (load_config(overrides(AdapterStudy(), 1, variant, "grpo")) for variant in ("full", "16"))
    assert not whole.adapter.is_on and (adapted.adapter.rank, adapted.adapter.alpha) == (16, 32.0)
    assert adapted.sft.recipe.lr == pytest.approx(10 * whole.sft.recipe.lr)
    assert adapted.rl.recipe.lr == pytest.approx(2.5 * whole.rl.recipe.lr)
    assert (adapted.evaluation, adapted.rl.group, adapted.seed) == (whole.evaluation, whole.rl.group, 1)
    assert load_config(overrides(AdapterStudy(), 1, "16", "dpo")).align.methods == ["dpo"]


def test_every_run_is_made_once_and_compared(tmp_path, monkeypatch, capsys):
    made = []

    def fake_loop(arguments, log):
        config = load_config(arguments)
        made.append(config.directory.name)
        if not config.directory.exists():
            begun(config.directory)
        method = config.align.methods[0]
        score = 0.0 if config.adapter.is_on else 1.0
        write_scores(config.directory / f"evaluations/iter-00-after_{method}.jsonl", scored([score, 1.0]))
        swap = {"bytes": 2 * 10**6, "seconds": 0.25}
        result = {"seconds": 6.0, "steps": 3, "trained_tensors": 7, "peak_memory": 2**30, "swap": swap}
        (config.directory / "summary.json").write_text(json.dumps({"iterations": [{"sft": result, method: result}]}))

    monkeypatch.setattr(adapters, "run_loop", fake_loop)
    for _ in range(2):
        assert main([f"runs={tmp_path}", "variants=[full,4]"]) == 0
    assert made == [f"seed-0-{name}-{method}" for name in ("full", "rank-4") for method in ("dpo", "grpo")]
    shown = capsys.readouterr().out
    assert "| sft | rank 4 | 0.500 ± 0.500 | +0.000 ± 0.000 | 2.00 | 1.00 | 2.00 | 0.250 | 7 |" in shown
    assert "| grpo | rank 4 | 0.500 ± 0.500 | -0.500 ± 0.500 | 2.00 | 1.00 | 2.00 | 0.250 | 7 |" in shown
    assert "| dpo | full | 1.000 ± 0.000 | - |" in shown


@pytest.mark.parametrize("argument", ["variants=[0]", "variants=[half]", "methods=[sft]", "seeds=0"])
def test_impossible_arguments_of_the_study_are_refused(argument):
    assert main([argument]) == 2

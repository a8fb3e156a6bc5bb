"""Scores per image, and paired comparisons of moments."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from vargpt_rl.evaluate.paired import Comparison, ScoredImage, compare, paired_gain, read_scores, write_scores


def images(scores, prompts=None):
    """Images with these scores, of prompts of their own unless they are given."""
    return [
        ScoredImage(prompt_id=f"p{i}", prompt=f"<b> {prompts[i] if prompts else i}", seed=i, score=score)
        for i, score in enumerate(scores)
    ]


def test_scores_survive_a_file(tmp_path):
    written = images([1.0, None, 0.5])
    write_scores(tmp_path / "evaluations" / "iter-00-after_sft.jsonl", written)
    assert read_scores(tmp_path / "evaluations" / "iter-00-after_sft.jsonl") == written
    assert read_scores(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("line", ['{"prompt_id": 1}', "[]", '{"prompt_id"\n'])
def test_a_damaged_file_is_named(tmp_path, line):
    path = tmp_path / "scores.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="scores.jsonl"):
        read_scores(path)


def test_the_error_of_a_gain_lacks_the_spread_between_prompts():
    rng = np.random.default_rng(0)
    before = (rng.random(400) < 0.5).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:40]] = 1.0
    gain, error = paired_gain(images(after.tolist()), images(before.tolist()))
    assert gain == pytest.approx(0.1)
    assert error == pytest.approx(np.std(after - before, ddof=1) / 20)
    assert error < 0.6 * np.sqrt(2 * 0.25 / 400), "smaller than that of two means of different prompts"


def test_images_are_paired_by_prompt_and_seed():
    gain = paired_gain(list(reversed(images([1.0, 1.0, None, 0.0]))), images([0.0, 1.0, 1.0]))
    assert gain == (0.5, pytest.approx(0.5))
    assert paired_gain(images([1.0]), []) is None


def test_a_comparison_counts_outcomes_and_tests_their_signs():
    found = compare(images([1.0, 1.0, 1.0, 0.0, 0.5, None]), images([0.0, 0.0, 0.0, 1.0, 0.5, 1.0]))
    assert (found.better, found.worse, found.alike) == (3, 1, 1)
    assert found.p == pytest.approx(binomtest(3, 4).pvalue) == 0.625
    assert found.as_metrics("gain")["gain_better"] == 3 and found.gain == pytest.approx(0.4)
    assert compare(images([1.0]), []) is None


def test_images_that_are_all_alike_show_nothing():
    alike = compare(images([1.0, 0.0, 0.5]), images([1.0, 0.0, 0.5]))
    assert (alike.p, alike.error) == (1.0, 0.0)
    ten = {"prompts_better": 10, "prompts_worse": 0, "prompts": 10, "half_width": 0.2}
    assert Comparison(gain=0.2, error=0.1, better=10, worse=0, alike=0, **ten).p == pytest.approx(2 / 2**10)


def test_images_of_one_prompt_are_not_independent_of_one_another():
    rng = np.random.default_rng(0)
    effect = rng.normal(size=50)
    alone = effect.tolist()
    repeated = np.repeat(effect, 4).tolist()
    prompts = np.repeat(np.arange(50), 4).tolist()
    gain, error = paired_gain(images(repeated, prompts), images([0.0] * 200, prompts))
    once = paired_gain(images(alone), images([0.0] * 50))
    assert (gain, error) == (pytest.approx(once[0]), pytest.approx(once[1])), "four equal images tell no more than one"
    assert error > 1.9 * paired_gain(images(repeated), images([0.0] * 200))[1]
    found = compare(images(repeated, prompts), images([0.0] * 200, prompts))
    assert found.better + found.worse == 200 and found.prompts_better + found.prompts_worse == found.prompts == 50
    assert found.p == pytest.approx(binomtest(int((effect > 0).sum()), 50).pvalue)


def test_images_of_a_single_prompt_have_their_own_error():
    found = compare(images([1.0, 1.0, 0.0, 1.0], "aaaa"), images([0.0] * 4, "aaaa"))
    assert found.error == pytest.approx(0.25) and found.half_width == pytest.approx(3.182 * 0.25, rel=1e-3)
    assert (found.p, found.prompts) == (1.0, 1)


def test_a_single_image_has_finite_figures():
    found = compare(images([1.0]), images([0.0]))
    assert (found.gain, found.error, found.half_width, found.p) == (1.0, 0.0, 0.0, 1.0)


def test_few_prompts_widen_the_interval():
    found = compare(images([1.0, 0.5, 0.0] * 4, "abc" * 4), images([0.0] * 12, "abc" * 4))
    assert found.half_width == pytest.approx(4.303 * found.error, rel=1e-3), "Student's t of two degrees of freedom"


def test_a_prompt_whose_images_cancel_out_decides_nothing():
    found = compare(images([0.1 + 0.2, 0.0, 1.0], "aab"), images([0.0, 0.3, 0.0], "aab"))
    assert (found.better, found.worse, found.alike) == (2, 1, 0)
    assert (found.prompts_better, found.prompts_worse, found.prompts) == (1, 0, 2)


def test_scores_written_before_images_were_kept_are_read(tmp_path):
    record = {"prompt_id": "a", "prompt": "a star", "seed": 1, "score": 1.0, "judge": None, "reward": None}
    (tmp_path / "old.jsonl").write_text(json.dumps(record) + "\n")
    assert read_scores(tmp_path / "old.jsonl")[0].image is None

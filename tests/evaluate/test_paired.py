"""Scores per image, and paired comparisons of moments."""

import numpy as np
import pytest

from vargpt_rl.evaluate.paired import ScoredImage, paired_gain, read_scores, write_scores


def images(scores):
    return [ScoredImage(prompt_id=f"p{i}", prompt="<b>", seed=i, score=score) for i, score in enumerate(scores)]


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

"""What a paired comparison is said to show, also where its mean and its sign test disagree."""

import pytest

from learners.methods import ONLINE
from vargpt_rl.evaluate.wording import MOMENTS, agreement, outcome, verdict


def test_every_online_method_has_its_title_and_its_place():
    online = {f"after_{name}": method.title for name, method in ONLINE.items()}
    assert list(MOMENTS.items())[-len(online) :] == list(online.items())


def gain(mean, stderr, better, worse, p, alike=0):
    return {"gain": mean, "stderr": stderr, "better": better, "worse": worse, "alike": alike, "p": p}


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (gain(0.5, 0.1, 60, 10, 1e-6, 30), "better"),
        (gain(-0.5, 0.1, 10, 60, 1e-6, 30), "worse"),
        (gain(0.01, 0.1, 5, 4, 1.0, 91), "no difference shown"),
        (gain(0.07, 0.03, 10, 3, 0.09, 87), "no difference shown"),  # of right and wrong: the exact test decides
        (gain(0.3, 0.1, 30, 28, 0.9), "the mean is higher, but not for most images: a few differ by much"),
        (gain(-0.3, 0.1, 30, 28, 0.9), "the mean is lower, but not for most images: a few differ by much"),
        (gain(0.01, 0.1, 80, 20, 1e-9), "more images are better than worse, but no change of the mean is shown"),
        (
            gain(-0.3, 0.1, 80, 20, 1e-9),
            "more images are better than worse, but the mean is lower: a few differ by much. Look at them",
        ),
        (
            gain(0.3, 0.1, 20, 80, 1e-9),
            "more images are worse than better, but the mean is higher: a few differ by much. Look at them",
        ),
    ],
)
def test_the_outcome_says_what_mean_and_sign_test_show(found, told):
    assert outcome(found) == told
    assert verdict("DPO", "SFT", found).endswith(told)


def of_prompts(found, prompts, better, worse, half_width):
    own = {"prompts": prompts, "prompts_better": better, "prompts_worse": worse, "half_width": half_width}
    return found | own


@pytest.mark.parametrize(
    ("found", "told"),
    [
        # More images are better, but they are those of one prompt, and its test has the other direction.
        (of_prompts(gain(1 / 3, 0.3, 20, 10, 0.012), 11, 1, 10, 0.7), "more prompts are worse than better, but no ch"),
        (of_prompts(gain(0.2, 0.05, 60, 10, 0.2, 170), 87, 12, 5, 0.1), "the mean is higher, but not for most prompts"),
        (of_prompts(gain(0.2, 0.05, 60, 10, 1e-4, 170), 87, 30, 5, 0.1), "better"),
        (of_prompts(gain(0.2, 0.05, 60, 10, 0.3, 170), 87, 12, 5, 0.3), "no difference shown"),
    ],
)
def test_the_test_counts_prompts_where_they_repeat(found, told):
    assert outcome(found).startswith(told)
    assert verdict("DPO", "SFT", found).startswith(
        f"DPO against SFT on the same {found['better'] + found['worse'] + found['alike']} images of {found['prompts']} "
        f"prompts: {found['better']} better, {found['worse']} worse"
    )
    told_test = f"sign test of prompts ({found['prompts_better']} better, {found['prompts_worse']} worse) p "
    assert told_test in verdict("DPO", "SFT", found)


def test_agreement_names_right_pairs_share_and_interval():
    assert agreement({"right": 8.5, "n": 10, "low": 0.5, "high": 0.9}) == "8.5 of 10 pairs: 0.85 (0.50 to 0.90)"

"""Measures in words: intervals, and what a paired comparison shows."""

from collections.abc import Mapping

Z = 1.959964
"""Half the width of a 95 % interval in standard errors."""
SHOWN_BELOW = 0.05
"""p-value of the sign test below which a difference counts as shown."""
OUTCOMES = {1: "better", 0: "no difference shown", -1: "worse"}
MOMENTS = {
    "after_sft": "SFT",
    "control": "control",
    "after_dpo": "DPO",
    "after_rft": "RFT",
    "after_online_dpo": "online DPO",
    "after_grpo": "GRPO",
}
"""Titles of the moments at which policies are measured, the control being SFT on the winners."""
WITHOUT_SFT = MOMENTS | {"after_sft": "start"}
"""The same of iterations that do not begin with SFT: what would be measured after it is where they start."""


def with_bounds(result: Mapping[str, float], key: str) -> str:
    """Format a mean with its 95 % interval: ``0.708 (0.62 to 0.78)``. Older results have a standard error instead."""
    if f"{key}_low" in result:
        return f"{result[key]:.3f} ({result[f'{key}_low']:.2f} to {result[f'{key}_high']:.2f})"
    if f"{key}_stderr" in result:
        return f"{result[key]:.3f} ± {result[f'{key}_stderr']:.3f}"
    return f"{result[key]:.3f}"


def verdict(policy: str, baseline: str, gain: Mapping[str, float]) -> str:
    """Say what a comparison shows; ``gain`` is that of `gain_of`."""
    better, worse, alike = (round(gain[key]) for key in ("better", "worse", "alike"))
    low, high = gain["gain"] - _half_width(gain), gain["gain"] + _half_width(gain)
    of_prompts = test_of = ""
    if "prompts" in gain and gain["prompts"] < better + worse + alike:
        of_prompts = f" of {gain['prompts']:.0f} prompt{'s' if gain['prompts'] > 1 else ''}"
        test_of = f" of prompts ({gain['prompts_better']:.0f} better, {gain['prompts_worse']:.0f} worse)"
    against = f"the {baseline}" if baseline in ("start", "control") else baseline
    return (
        f"{policy} against {against} on the same {better + worse + alike} images{of_prompts}: {better} better, "
        f"{worse} worse, {alike} alike; {gain['gain']:+.3f} (95 %: {low:+.2f} to {high:+.2f}), "
        f"sign test{test_of} {p_value(gain['p'])}: {outcome(gain)}"
    )


def _half_width(gain: Mapping[str, float]) -> float:
    """Return half the width of a gain's 95 % interval; older results have none, and a normal one is taken."""
    return gain.get("half_width", Z * gain["stderr"])


def outcome(gain: Mapping[str, float]) -> str:
    """Say in words what mean and sign test show together.

    The sign test counts prompts (images, in older results), the mean weighs them by how far they differ: a few large
    losses can outweigh many small gains. Where every prompt has one image, right or wrong, both say the same and the
    exact test decides.
    """
    count = gain["better"] + gain["worse"] + gain["alike"]
    units = "prompts" if "prompts" in gain else "images"
    ahead = gain.get("prompts_better", gain["better"]) - gain.get("prompts_worse", gain["worse"])
    of_units = 0 if gain["p"] >= SHOWN_BELOW else 1 if ahead > 0 else -1
    width = _half_width(gain)
    of_mean = 1 if gain["gain"] > width else -1 if gain["gain"] < -width else 0
    is_exact = gain.get("prompts", count) == count and abs(gain["gain"] * count - ahead) < 1e-6
    if of_units == of_mean or is_exact:
        return OUTCOMES[of_units]
    if not of_units:
        return f"the mean is {'higher' if of_mean > 0 else 'lower'}, but not for most {units}: a few differ by much"
    told = f"more {units} are {'better than worse' if of_units > 0 else 'worse than better'}"
    if not of_mean:
        return f"{told}, but no change of the mean is shown"
    return f"{told}, but the mean is {'higher' if of_mean > 0 else 'lower'}: a few differ by much. Look at them"


def agreement(found: Mapping[str, float]) -> str:
    """Format how often a reward agrees with people; ``found`` has the keys right, n, low and high."""
    right, count = found["right"], found["n"]
    return f"{right:g} of {count:g} pairs: {right / count:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def p_value(p: float) -> str:
    """Format a p-value with two digits, a very small one as a bound."""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def gain_of(result: Mapping[str, float], name: str) -> dict[str, float] | None:
    """Return the comparison called ``name`` in a result (`vargpt_rl.evaluate.paired.Comparison.as_metrics`), if any.

    It has the keys gain, stderr, better, worse, alike and p. Those about prompts and the half width are missing from
    older results.
    """
    if f"{name}_p" not in result:
        return None
    own = ("stderr", "half_width", "better", "worse", "alike", "prompts", "prompts_better", "prompts_worse", "p")
    return {"gain": result[name]} | {key: result[f"{name}_{key}"] for key in own if f"{name}_{key}" in result}

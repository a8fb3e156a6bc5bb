"""The steps of a run, in order, by its settings: what ``vargpt_rl.loop`` does, as names in ``state.json``.

Free of torch, so that a page is made in moments. The progress of a run (`vargpt_rl.driver.plan`) has them from here.
"""

from typing import Any

from rewards.preferences import HUMAN
from vargpt_rl.common.settings import at_iteration

PAIRED = ("sample", "judge", "pair")


def expected_steps(config: dict[str, Any]) -> list[str]:
    """Return the names of all steps of a run with these settings; empty without settings."""
    steps = [name for name, is_recorded in _at_start(config).items() if is_recorded]
    stages = config.get("stages", [])
    for stage in stages:
        if stage == "align":
            steps += _align(config, asked_before="understanding" in stages[: stages.index("align")])
        elif stage == "edit":
            steps += ["edit/before", "edit", "edit/swap", "edit/eval", "edit/grid"]
        else:
            steps += [stage, f"{stage}/swap", f"{stage}/eval"]
    return steps


def _at_start(config: dict[str, Any]) -> dict[str, bool]:
    """Return the steps before the first stage, and whether a run with these settings has them."""
    parts = [config, *config.get("at", {}).values()]
    return {
        "dtype": config.get("dtype") == "auto",
        "batch_size": any(part.get("rollout", {}).get("batch_size") == "auto" for part in parts),
        "adapter": config.get("adapter", {}).get("kind", "none") != "none",
    }


def _align(config: dict[str, Any], asked_before: bool) -> list[str]:
    steps = [] if asked_before else ["understands/before"]
    for k in range(config["iterations"]):
        settings = _at_resolution(config, at_iteration(config["resolutions"], k))
        steps += [f"iter-{k:02d}/{step}" for step in _iteration(settings)]
    return [*steps, "understands/after"]


def _at_resolution(config: dict[str, Any], resolution: int) -> dict[str, Any]:
    """Return the settings that steps depend on, with those that ``at`` has for a resolution."""
    given = config.get("at", {}).get(str(resolution), {})
    parts = ("align", "dpo", "learned_reward", "preference")
    return {part: config.get(part, {}) | given.get(part, {}) for part in parts}


def _iteration(config: dict[str, Any]) -> list[str]:
    steps = ["before"]
    if config["align"]["sft"]:
        steps += ["sft", "sft_swap"]
    if config["preference"].get("pairs"):
        steps.append("encode")
    steps.append("after_sft")
    for method in config["align"]["methods"]:
        steps += [step for step in _method(config, method) if step not in steps]
    return [*steps, "grid"]


def _method(config: dict[str, Any], method: str) -> list[str]:
    """Return the steps of a method; pairs are made once an iteration."""
    if method == "dpo":
        made = ["pair"] if config["dpo"]["min_pairs"] else _paired(config)
        control = ["control", "control_swap", "after_control"] if config["dpo"]["control"] else []
        return [*made, "dpo", *control, "dpo_swap", "after_dpo"]
    if method == "reward":
        overlapped = config["dpo"]["min_pairs"] and "dpo" in config["align"]["methods"]
        given = config["learned_reward"]["table"] or overlapped
        return [*([] if given else _paired(config)), "reward"]
    return [method, f"{method}_swap", f"after_{method}"]


def _paired(config: dict[str, Any]) -> list[str]:
    """Return the steps that make an iteration's pairs."""
    preference = config["preference"]
    if preference.get("pairs"):
        return ["pair"]
    asked = ["propose"] if preference.get("builder") == HUMAN else []
    return [*PAIRED[:-1], *asked, PAIRED[-1]]

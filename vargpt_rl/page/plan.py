"""The steps of a run, in order, by its settings: what ``vargpt_rl.loop`` does, as names in ``state.json``.

Free of torch, so that a page is made in moments. The progress of a run (`vargpt_rl.driver.plan`) has them from here.
"""

import reprlib
from typing import Any, get_args, get_origin

from rewards.preferences import HUMAN
from vargpt_rl.common.settings import at_iteration

PAIRED = ("sample", "judge", "pair")


def setting(config: dict[str, Any], key: str, kind: Any, missing: Any) -> Any:
    """Return the setting of a dotted key, or ``missing`` if it is null or not there.

    ``kind`` is a type, or a list of one. ValueError, naming the key, for a value of another type.
    """
    found: Any = config
    names = key.split(".")
    for depth, name in enumerate(names):
        if not isinstance(found, dict):
            raise ValueError(f"{'.'.join(names[:depth])} is {reprlib.repr(found)}, expected settings by name")
        found = found.get(name)
        if found is None:
            return missing
    if get_origin(kind) is list:
        (of,) = get_args(kind)
        if isinstance(found, list) and all(isinstance(each, of) for each in found):
            return found
        raise ValueError(f"{key} is {reprlib.repr(found)}, expected a list of {of.__name__}")
    if not isinstance(found, kind):
        raise ValueError(f"{key} is {reprlib.repr(found)}, expected {kind.__name__}")
    return found


def expected_steps(config: dict[str, Any]) -> list[str]:
    """Return the names of all steps of a run with these settings; empty without settings.

    A setting that is not there, as in older runs, is what versions without it did. ValueError, naming the key, if none
    did without it, or if it is of another type.
    """
    if not config:
        return []
    steps = [name for name, is_recorded in _at_start(config).items() if is_recorded]
    stages = _needed(config, "stages", list[str])
    for stage in stages:
        if stage == "align":
            steps += _align(config, asked_before="understanding" in stages[: stages.index("align")])
        elif stage == "edit":
            steps += ["edit/before", "edit", "edit/swap", "edit/eval", "edit/grid"]
        else:
            steps += [stage, f"{stage}/swap", f"{stage}/eval"]
    return steps


def _needed(config: dict[str, Any], key: str, kind: Any) -> Any:
    if not (found := setting(config, key, kind, None)):
        raise ValueError(f"{key} is missing")
    return found


def _at_start(config: dict[str, Any]) -> dict[str, bool]:
    """Return the steps before the first stage, and whether a run with these settings has them."""
    sizes = ["rollout.batch_size", *(f"at.{size}.rollout.batch_size" for size in setting(config, "at", dict, {}))]
    return {
        "dtype": setting(config, "dtype", str, "") == "auto",
        "batch_size": any(setting(config, size, object, None) == "auto" for size in sizes),
        "adapter": setting(config, "adapter.kind", str, "none") != "none",
    }


def _align(config: dict[str, Any], asked_before: bool) -> list[str]:
    steps = [] if asked_before else ["understands/before"]
    resolutions = _needed(config, "resolutions", list[int])
    for k in range(_needed(config, "iterations", int)):
        settings = _at_resolution(config, at_iteration(resolutions, k))
        steps += [f"iter-{k:02d}/{step}" for step in _iteration(settings)]
    return [*steps, "understands/after"]


def _at_resolution(config: dict[str, Any], resolution: int) -> dict[str, Any]:
    """Return the settings that steps depend on, with those that ``at`` has for a resolution."""
    parts = ("align", "dpo", "learned_reward", "preference")
    return {
        part: setting(config, part, dict, {}) | setting(config, f"at.{resolution}.{part}", dict, {}) for part in parts
    }


def _iteration(config: dict[str, Any]) -> list[str]:
    steps = ["before"]
    if setting(config, "align.sft", bool, True):
        steps += ["sft", "sft_swap"]
    if config["preference"].get("pairs"):
        steps.append("encode")
    steps.append("after_sft")
    for method in setting(config, "align.methods", list[str], ["dpo"]):
        steps += [step for step in _method(config, method) if step not in steps]
    return [*steps, "grid"]


def _method(config: dict[str, Any], method: str) -> list[str]:
    """Return the steps of a method; pairs are made once an iteration."""
    dpo = config["dpo"]
    if method == "dpo":
        made = ["pair"] if dpo.get("min_pairs") else _paired(config)
        control = ["control", "control_swap", "after_control"] if dpo.get("control") else []
        return [*made, "dpo", *control, "dpo_swap", "after_dpo"]
    if method == "reward":
        overlapped = dpo.get("min_pairs") and "dpo" in setting(config, "align.methods", list[str], ["dpo"])
        given = config["learned_reward"].get("table") or overlapped
        return [*([] if given else _paired(config)), "reward"]
    return [method, f"{method}_swap", f"after_{method}"]


def _paired(config: dict[str, Any]) -> list[str]:
    """Return the steps that make an iteration's pairs."""
    preference = config["preference"]
    if preference.get("pairs"):
        return ["pair"]
    asked = ["propose"] if preference.get("builder") == HUMAN else []
    return [*PAIRED[:-1], *asked, PAIRED[-1]]

"""Compare alignment methods: ``python -m vargpt_rl.bench.alignment [seeds=3 updates=10 variants=[dpo,grpo] ...]``.

For each seed, SFT trains once at one resolution; every variant then aligns a copy of that run, from the same weights,
on the same prompts and with the same seeds for held-out images. The first variant, DPO on external winners, also trains
the control: SFT on those winners.

Prints a Markdown table: the held-out score of each policy, and its paired gains over SFT and over the control.
Repeating the command resumes it. Exit codes: 0 done, 1 a run failed, 2 an argument is wrong.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vargpt_rl.bench.study import ITERATION, StudySizes, fork, pooled_gain, run_loop, shared_overrides, spread
from vargpt_rl.common.command import run_command
from vargpt_rl.common.settings import Count, Positive
from vargpt_rl.driver.run import SUMMARY
from vargpt_rl.driver.session import Step
from vargpt_rl.evaluate.paired import ScoredImage, read_scores

BASE = "dpo"
"""The variant that trains SFT and the control, which the others share."""

ONLINE = ["reward.path=rewards.shapes:shapes_reward", "dpo.control=false"]
COARSE = "rl.credit_scales=5"
TWO_EACH = ["rl.recipe.steps=20", "rl.updates=2"]
VARIANTS: dict[str, list[str]] = {
    BASE: ["align.methods=[dpo]"],
    "dpo_alpha": ["align.methods=[dpo]", "dpo.credit_alpha=0.6", "dpo.control=false"],
    "dpo_best_of_n": [
        *ONLINE,
        "align.methods=[dpo]",
        "preference.builder=rewards.preferences:best_of_n",
        "preference.samples=4",
    ],
    "online_dpo": [*ONLINE, "align.methods=[online_dpo]", COARSE, "rl.recipe.lr=2e-5"],
    "rft": [*ONLINE, "align.methods=[rft]", COARSE],
    "grpo": [*ONLINE, "align.methods=[grpo]", COARSE],
    "grpo_alpha_0": [*ONLINE, "align.methods=[grpo]", COARSE, "rl.credit_alpha=0"],
    "grpo_alpha_1": [*ONLINE, "align.methods=[grpo]", COARSE, "rl.credit_alpha=1"],
    "grpo_to_4x4": [*ONLINE, "align.methods=[grpo]", "rl.credit_scales=3"],
    "grpo_all_scales": [*ONLINE, "align.methods=[grpo]"],
    "grpo_twice": [*ONLINE, "align.methods=[grpo]", COARSE, "rl.recipe.steps=20"],
    "grpo_reuse": [*ONLINE, "align.methods=[grpo]", COARSE, *TWO_EACH],
    "grpo_to_4x4_reuse": [*ONLINE, "align.methods=[grpo]", "rl.credit_scales=3", *TWO_EACH],
    "grpo_vmr": [*ONLINE, "align.methods=[grpo]", COARSE, "rl.completions=2", "rl.prefix_scales=3"],
    "grpo_learned": [
        *ONLINE,
        "align.methods=[reward,grpo]",
        COARSE,
        "preference.builder=rewards.preferences:best_of_n",
        "preference.samples=4",
        "preference.count=600",
    ],
}
"""Settings of each variant. Online methods use alpha 0.6 and the scales up to 8 x 8 unless they say otherwise;
``grpo_twice`` makes 20 updates, and variants with ``reuse`` two on each of ten batches; the others make ``updates``."""


@dataclass
class AlignmentStudy(StudySizes):
    """Settings of the study."""

    seeds: Count = 3
    """Number of seeds; each trains SFT once and every variant from it."""
    runs: str = "runs/alignment-study"
    """Folder of the runs."""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """Variants to run, by name."""
    prompts: Count = 8
    """Prompts of an update."""
    group: Count = 8
    """Images drawn of each prompt."""
    lr: Positive = 2e-4
    """Learning rate of online methods."""

    def __post_init__(self):
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"variants={self.variants}: unknown {unknown}, expected some of {list(VARIANTS)}")


def overrides(study: AlignmentStudy, seed: int, variant: str) -> list[str]:
    """The loop's settings for a variant."""
    return [
        *shared_overrides(study, study.runs, f"seed-{seed}-{variant}", seed),
        "dpo.recipe.lr=1e-5",
        f"rl.recipe.batch={study.prompts * study.group}",
        f"rl.recipe.lr={study.lr}",
        f"rl.prompts={study.prompts}",
        f"rl.group={study.group}",
        *VARIANTS[variant],
    ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One policy of one seed."""

    images: list[ScoredImage]
    questions: float | None
    """Share of held-out questions answered right."""
    seconds: float | None
    """Time of the method's training, drawing included; None for SFT."""
    diversity: float | None


def outcomes(directory: Path) -> dict[str, Outcome]:
    """Return the policies of a finished run by moment."""
    summary = json.loads((directory / SUMMARY).read_text())
    iteration = summary["iterations"][0]
    understanding = {moment: result.get("accuracy") for moment, result in summary["understanding"].items()}
    found = {}
    for path in sorted((directory / "evaluations").glob(f"{ITERATION}-*.jsonl")):
        moment = path.stem.removeprefix(f"{ITERATION}-")
        method = moment.removeprefix("after_")
        after = understanding["before" if method == "sft" else "after"]
        found[moment] = Outcome(
            images=read_scores(path),
            questions=None if moment == Step.CONTROL else after,
            seconds=iteration.get(method, {}).get("seconds"),
            diversity=iteration["eval"].get(moment, {}).get("diversity"),
        )
    return found


def run(study: AlignmentStudy) -> list[dict[str, Outcome]]:
    """Run the study; return the policies of each seed by name: SFT, the control, and each variant."""
    folder, results = Path(study.runs), []
    for seed in range(study.seeds):
        policies: dict[str, Outcome] = {}
        for variant in dict.fromkeys([BASE, *study.variants]):
            directory = folder / f"seed-{seed}-{variant}"
            if variant != BASE:
                fork(folder / f"seed-{seed}-{BASE}", directory)
            if not (directory / SUMMARY).exists():
                print(f"seed {seed}: {variant}", file=sys.stderr, flush=True)
                run_loop(overrides(study, seed, variant), folder / f"seed-{seed}-{variant}.log")
            found = outcomes(directory)
            if variant == BASE:
                policies |= {"SFT": found[Step.AFTER_SFT], "control": found[Step.CONTROL]}
            last = [moment for moment in found if moment not in (Step.AFTER_SFT, Step.CONTROL)]
            policies[variant] = found[last[-1]]
        results.append(policies)
    return results


def table(results: Sequence[Mapping[str, Outcome]]) -> str:
    """Format a Markdown row per policy.

    ``±`` of the score is the standard deviation over seeds. Gains are paired image by image; their first error is the
    standard error over the images of all seeds, the second (in brackets) over the seeds' mean gains.
    """
    lines = [
        "| policy | held-out score | over SFT | over control | by seed | diversity | questions | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in results[0]:
        policies = [result[name] for result in results]
        scores = [_mean([image.score for image in policy.images]) for policy in policies]
        cells = [
            name,
            spread(scores),
            "-" if name == "SFT" else _gain(results, name, "SFT"),
            "-" if name in ("SFT", "control") else _gain(results, name, "control"),
            ", ".join("-" if score is None else f"{score:.3f}" for score in scores),
            spread([policy.diversity for policy in policies]),
            spread([policy.questions for policy in policies]),
            spread([policy.seconds for policy in policies], digits=0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _gain(results: Sequence[Mapping[str, Outcome]], name: str, baseline: str) -> str:
    """Format the paired gain of a policy over another."""
    return pooled_gain([(result[name].images, result[baseline].images) for result in results])


def main(arguments: list[str] | None = None) -> int:
    """Run the study and print its table; return its exit code."""
    return run_command(AlignmentStudy, lambda study: print(table(run(study))), arguments)


if __name__ == "__main__":
    sys.exit(main())

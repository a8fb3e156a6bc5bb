"""Compare alignment methods: ``python -m vargpt_rl.bench.alignment [seeds=3 updates=10 variants=[dpo,grpo] ...]``.

For each seed, SFT trains once at one resolution; every variant then aligns a copy of that run, from the same weights,
on the same prompts and with the same seeds for held-out images. The first variant, DPO on external winners, also trains
the control: SFT on those winners.

Prints a Markdown table: the held-out score of each policy, and its paired gains over SFT and over the control.
Repeating the command resumes it. Exit codes: 0 done, 1 a run failed, 2 an argument is wrong.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vargpt_rl.common.command import CommandFailed, run_command
from vargpt_rl.common.settings import Count, Positive
from vargpt_rl.driver.run import STATE, SUMMARY
from vargpt_rl.driver.session import Step
from vargpt_rl.driver.state import read_state, write_state
from vargpt_rl.evaluate.paired import ScoredImage, paired_gain, read_scores
from vargpt_rl.storage.files import atomic_dir

ITERATION = "iter-00"
SHARED = (
    f"checkpoints/{ITERATION}-sft",
    f"preferences/{ITERATION}-held-out.parquet",
    f"evaluations/{ITERATION}-{Step.AFTER_SFT}.jsonl",
)
"""Files that the steps after SFT's evaluation need from earlier steps."""
ADAPTER = "checkpoints/adapter"
"""The first weights of an adapter, needed too by a run that trains one."""

BASE = "dpo"
"""The variant that trains SFT and the control, which the others share."""

ONLINE = ["reward.path=rewards.shapes:shapes_reward", "dpo.control=false"]
COARSE = "rl.credit_scales=5"
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
``grpo_twice`` makes 20 updates, the others ``updates``."""


@dataclass
class AlignmentStudy:
    """Settings of the study."""

    seeds: Count = 3
    """Number of seeds; each trains SFT once and every variant from it."""
    runs: str = "runs/alignment-study"
    """Folder of the runs."""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """Variants to run, by name."""
    checkpoint: str = "tiny"
    """Model that SFT starts from."""
    resolution: Count = 256
    """Pixels a side."""
    sft_steps: Count = 70
    """Optimizer steps of SFT, of 16 images each."""
    dpo_steps: Count = 24
    """Optimizer steps of DPO and of the control, of 8 pairs each."""
    pairs: Count = 160
    """Pairs of DPO, one sample of each prompt; their winners are the control's images."""
    updates: Count = 10
    """Updates of online methods."""
    prompts: Count = 8
    """Prompts of an update."""
    group: Count = 8
    """Images drawn of each prompt."""
    lr: Positive = 2e-4
    """Learning rate of online methods."""
    held_out: Count = 240
    """Held-out images at each moment."""
    ranks: Count = 1
    """Learner ranks; there are as many rollout workers."""

    def __post_init__(self):
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"variants={self.variants}: unknown {unknown}, expected some of {list(VARIANTS)}")


def overrides(study: AlignmentStudy, seed: int, variant: str) -> list[str]:
    """The loop's settings for a variant."""
    return [
        f"runs={study.runs}",
        f"name=seed-{seed}-{variant}",
        f"seed={seed}",
        f"checkpoint={study.checkpoint}",
        "stages=[align]",
        f"resolutions=[{study.resolution}]",
        "iterations=1",
        f"sft.records={16 * study.sft_steps}",
        f"sft.recipe.steps={study.sft_steps}",
        "sft.recipe.batch=16",
        "sft.recipe.micro_batch=4",
        f"preference.count={study.pairs}",
        f"dpo.recipe.steps={study.dpo_steps}",
        "dpo.recipe.batch=8",
        "dpo.recipe.micro_batch=2",
        "dpo.recipe.lr=1e-5",
        f"rl.recipe.steps={study.updates}",
        f"rl.recipe.batch={study.prompts * study.group}",
        f"rl.recipe.lr={study.lr}",
        f"rl.prompts={study.prompts}",
        f"rl.group={study.group}",
        f"learner.ranks={study.ranks}",
        f"rollout.workers={study.ranks}",
        f"evaluation.prompts={study.held_out}",
        "tracking.wandb=disabled",
        "tracking.best=null",
        "~at",
        *VARIANTS[variant],
    ]


def fork(source: Path, target: Path) -> None:
    """Copy ``source`` as it was after SFT to a new run directory, whose settings may differ."""
    if target.exists():
        return
    state, _, _ = read_state(source / STATE)
    steps = list(state["steps"])
    last = steps.index(f"{ITERATION}/{Step.AFTER_SFT}")
    state["steps"] = {step: state["steps"][step] for step in steps[: last + 1]}
    state |= {"config": None, "summary": None, "logs": {}}
    with atomic_dir(target) as unfinished:
        for name in [*SHARED, *([ADAPTER] if (source / ADAPTER).exists() else [])]:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
            copy(source / name, unfinished / name)
        write_state(unfinished / STATE, state)


def loop(arguments: list[str], log: Path) -> None:
    """Run the loop, its output in ``log``. Raises CommandFailed with its last lines if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        code = subprocess.run([sys.executable, "-m", "vargpt_rl.loop", *arguments], stdout=output, stderr=output)
    if code.returncode:
        last = "\n".join(log.read_text().splitlines()[-5:])
        raise CommandFailed(f"exit code {code.returncode} of the loop with {' '.join(arguments)}; {log} ends:\n{last}")


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
                loop(overrides(study, seed, variant), folder / f"seed-{seed}-{variant}.log")
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


def pooled_gain(pairs: Sequence[tuple[list[ScoredImage], list[ScoredImage]]]) -> str:
    """Format the gain of images over their baseline, paired image by image, given both of each seed.

    The first error is over the images of all seeds, the second, in brackets, over the seeds' mean gains.
    """
    pooled: list[ScoredImage] = []
    base: list[ScoredImage] = []
    by_seed = []
    for seed, (images, baseline) in enumerate(pairs):
        gain = paired_gain(images, baseline)
        by_seed += [gain[0]] if gain else []
        pooled += [_of_seed(image, seed) for image in images]
        base += [_of_seed(image, seed) for image in baseline]
    total = paired_gain(pooled, base)
    if total is None:
        return "-"
    over_seeds = f" ({np.std(by_seed, ddof=1) / np.sqrt(len(by_seed)):.3f})" if len(by_seed) > 1 else ""
    return f"{total[0]:+.3f} ± {total[1]:.3f}{over_seeds}"


def _of_seed(image: ScoredImage, seed: int) -> ScoredImage:
    """Return the image under an id that no other seed has."""
    return ScoredImage(prompt_id=f"{seed}/{image.prompt_id}", prompt=image.prompt, seed=image.seed, score=image.score)


def spread(values: list[float | None], digits: int = 3) -> str:
    """Format a mean, with the standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{deviation}"


def main(arguments: list[str] | None = None) -> int:
    """Run the study and print its table; return its exit code."""
    return run_command(AlignmentStudy, lambda study: print(table(run(study))), arguments)


if __name__ == "__main__":
    sys.exit(main())

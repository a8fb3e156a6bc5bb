"""Compare adapters of several ranks with whole weights: ``python -m vargpt_rl.bench.adapters [seeds=1 ...]``.

For each seed and each of ``variants``, SFT trains at one resolution; DPO on external winners and GRPO then align from
it, in two runs. All draw the same held-out prompts with the same seeds, so that scores are compared image by image.

Prints a Markdown table: the held-out score of each policy, its paired difference to whole weights after the same
method, seconds a step, the learner's peak memory, bytes and seconds of a swap, and the number of trained tensors.
Repeating the command resumes it. Exit codes: 0 done, 1 a run failed, 2 an argument is wrong.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vargpt_rl.bench.alignment import ONLINE
from vargpt_rl.bench.study import ITERATION, StudySizes, fork, pooled_gain, run_loop, shared_overrides, spread
from vargpt_rl.common.averages import mean_and_error
from vargpt_rl.common.command import run_command
from vargpt_rl.common.settings import Count, NotNegative, Positive
from vargpt_rl.driver.run import SUMMARY
from vargpt_rl.evaluate.paired import ScoredImage, read_scores
from vargpt_rl.memory.units import GIB

WHOLE = "full"
"""The variant that trains whole weights."""
MOMENTS = {"sft": "after_sft", "dpo": "after_dpo", "grpo": "after_grpo"}
"""Methods, with the moments of their evaluations."""
MB = 10**6


@dataclass
class AdapterStudy(StudySizes):
    """Settings of the study."""

    seeds: Count = 1
    """Number of seeds; each trains every variant."""
    first_seed: NotNegative = 0
    """Number of the first seed, to add seeds in another call."""
    runs: str = "runs/adapter-study"
    """Folder of the runs."""
    variants: list[str] = field(default_factory=lambda: [WHOLE, "4", "16", "64"])
    """Ranks of adapters, and ``full`` for whole weights, with which the others are compared if it is among them."""
    methods: list[str] = field(default_factory=lambda: ["dpo", "grpo"])
    """Methods after SFT, of dpo and grpo."""
    targets: list[str] = field(default_factory=lambda: ["image_decoder", "projectors"])
    """Parts with an adapter."""
    faster: Positive = 10.0
    """Factor of an adapter's learning rates over those of whole weights; its alpha is twice its rank."""
    faster_online: Positive = 2.5
    """The same for GRPO, whose first steps AdamW makes as large as the rate: they then change the weights alike."""

    def __post_init__(self):
        for variant in self.variants:
            if variant != WHOLE and (not variant.isdecimal() or int(variant) == 0):
                raise ValueError(f"variants={self.variants}: {variant}, expected {WHOLE} or ranks of 1 or more")
        if unknown := [name for name in self.methods if name not in MOMENTS or name == "sft"]:
            raise ValueError(f"methods={self.methods}: unknown {unknown}, expected some of ['dpo', 'grpo']")


RATES = {"sft": 1e-4, "dpo": 1e-5, "rl": 2e-4}
"""Learning rates of whole weights."""


def overrides(study: AdapterStudy, seed: int, variant: str, method: str) -> list[str]:
    """The loop's settings for a variant and a method."""
    adapter = []
    rates = RATES
    if variant != WHOLE:
        faster = {"rl": study.faster_online}
        rates = {block: faster.get(block, study.faster) * rate for block, rate in RATES.items()}
        adapter = [
            "adapter=lora",
            f"adapter.rank={variant}",
            f"adapter.alpha={2 * int(variant)}",
            f"adapter.targets=[{','.join(study.targets)}]",
        ]
    return [
        *shared_overrides(study, study.runs, run_name(seed, variant, method), seed),
        "rl.recipe.batch=64",
        "rl.recipe.micro_batch=8",
        "rl.prompts=8",
        "rl.group=8",
        "rl.credit_scales=3",
        f"rl.recipe.steps={2 * study.updates}",
        "rl.updates=2",
        *(f"{block}.recipe.lr={rate:g}" for block, rate in rates.items()),
        *ONLINE,
        f"align.methods=[{method}]",
        *adapter,
    ]


def run_name(seed: int, variant: str, method: str) -> str:
    """Return the name of a run's folder."""
    return f"seed-{seed}-{variant if variant == WHOLE else f'rank-{variant}'}-{method}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One policy of one seed, and what its training took."""

    images: list[ScoredImage]
    step_s: float
    """Seconds of a step of the learner, without waiting."""
    peak: int
    """Bytes of the learner's process, or of its GPU's tensors."""
    swap: int
    """Bytes that a swap sends to a worker."""
    swap_s: float
    """Seconds of that swap."""
    tensors: int


def measured(directory: Path, method: str) -> Measured:
    """Read what a finished run measured of a method."""
    result = json.loads((directory / SUMMARY).read_text())["iterations"][0][method]
    return Measured(
        images=read_scores(directory / "evaluations" / f"{ITERATION}-{MOMENTS[method]}.jsonl"),
        step_s=(result["seconds"] - result.get("waited", 0.0)) / result["steps"],
        peak=result["peak_memory"],
        swap=result["swap"]["bytes"],
        swap_s=result["swap"]["seconds"],
        tensors=result["trained_tensors"],
    )


Results = list[dict[tuple[str, str], Measured]]
"""Of each seed, the policies by variant and method."""


def run(study: AdapterStudy) -> Results:
    """Run the study; the first of ``methods`` trains SFT, from which the others fork."""
    folder = Path(study.runs)
    results: Results = []
    for seed in range(int(study.first_seed), int(study.first_seed) + study.seeds):
        found: dict[tuple[str, str], Measured] = {}
        for variant in study.variants:
            first = folder / run_name(seed, variant, study.methods[0])
            for method in study.methods:
                directory = folder / run_name(seed, variant, method)
                if directory != first:
                    fork(first, directory)
                if not (directory / SUMMARY).exists():
                    print(f"{directory.name}", file=sys.stderr, flush=True)
                    run_loop(overrides(study, seed, variant, method), folder / f"{directory.name}.log")
                found[variant, method] = measured(directory, method)
            found[variant, "sft"] = measured(first, "sft")
        results.append(found)
    return results


def table(results: Sequence[Mapping[tuple[str, str], Measured]]) -> str:
    """Format a Markdown row per policy.

    ``±`` of a score is the standard error over the images of all seeds, clustered by prompt; a difference is paired
    image by image, and its second error (in brackets) is over the seeds. Other cells are means, and their spread over
    seeds.
    """
    lines = [
        "| method | trained | held-out score | over full | seconds a step | peak GiB | swap MB | swap s | tensors |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in MOMENTS:
        for variant, known in results[0]:
            if known != method:
                continue
            policies = [result[variant, method] for result in results]
            images = [image for policy in policies for image in policy.images]
            scores = [image.score for image in images if image.score is not None]
            mean, error = mean_and_error(scores, [image.prompt for image in images if image.score is not None])
            cells = [
                method,
                variant if variant == WHOLE else f"rank {variant}",
                f"{mean:.3f} ± {error:.3f}",
                _over_whole(results, variant, method),
                spread([policy.step_s for policy in policies], digits=2),
                spread([policy.peak / GIB for policy in policies], digits=2),
                spread([policy.swap / MB for policy in policies], digits=2),
                spread([policy.swap_s for policy in policies], digits=3),
                str(policies[0].tensors),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_whole(results: Sequence[Mapping[tuple[str, str], Measured]], variant: str, method: str) -> str:
    """Format the paired gain over whole weights after the same method."""
    if variant == WHOLE or (WHOLE, method) not in results[0]:
        return "-"
    pairs = [(result[variant, method].images, result[WHOLE, method].images) for result in results]
    return pooled_gain(pairs)


def main(arguments: list[str] | None = None) -> int:
    """Run the study and print its table; return its exit code."""
    return run_command(AdapterStudy, lambda study: print(table(run(study))), arguments)


if __name__ == "__main__":
    sys.exit(main())

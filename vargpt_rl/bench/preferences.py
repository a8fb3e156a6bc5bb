"""Compare ways to build pairs: ``python -m vargpt_rl.bench.preferences [seeds=3 prompts=... held_out=...]``.

For each seed, the loop aligns the embedded model on the shapes world twice: with external chosen images (and the
control, SFT on the same images), and with the best and the worst of the model's own samples, ranked by the exact
checker. The second run continues from the first run's record up to the pairs, so that SFT is trained once and both
start from the same weights; prompts, held-out prompts, their seeds and the steps are the same too.

Prints a Markdown table with the held-out score of each policy, mean and standard deviation over seeds. Repeating the
command resumes it. Exit codes: 0 done, 1 a run failed, 2 an argument is wrong.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vargpt_rl.common.command import CommandFailed, run_command
from vargpt_rl.driver.run import STATE, SUMMARY
from vargpt_rl.driver.session import Step
from vargpt_rl.storage.files import atomic_dir

SHARED = ("checkpoints/iter-00-sft", "preferences/iter-00-held-out.parquet")
"""Files that the steps from the pairs on need from earlier steps."""

POLICIES = {
    "SFT": ("external", "after_sft"),
    "control: SFT on winners": ("external", "sft_on_winners"),
    "DPO, external_winner": ("external", "after_dpo"),
    "DPO, best_of_n": ("best", "after_dpo"),
}
"""Rows of the table: the run and the step of its evaluation."""


@dataclass
class Study:
    """Settings of the study."""

    seeds: int = 3
    """Number of seeds; each has two runs."""
    runs: str = "runs/preference-study"
    """Folder of the runs."""
    prompts: int = 256
    """Prompts, sampled once each for external chosen images."""
    samples: int = 4
    """Samples per prompt for `best_of_n`."""
    held_out: int = 240
    sft_steps: int = 100
    dpo_steps: int = 60

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: expected 1 or more")


def overrides(study: Study, seed: int) -> dict[str, list[str]]:
    """The loop's settings by run."""
    common = [
        f"runs={study.runs}",
        f"seed={seed}",
        "stages=[align]",
        "resolutions=[128]",
        "iterations=1",
        f"sft.recipe.steps={study.sft_steps}",
        f"dpo.recipe.steps={study.dpo_steps}",
        f"preference.count={study.prompts}",
        f"evaluation.prompts={study.held_out}",
        "evaluation.questions=0",
        "tracking.wandb=disabled",
        "tracking.best=null",
    ]
    ranked = [
        "preference.builder=rewards.preferences:best_of_n",
        f"preference.samples={study.samples}",
        "reward.path=rewards.shapes:shapes_reward",
        "dpo.control=false",
    ]
    names = {run: f"name=seed-{seed}-{run}" for run in ("external", "best")}
    return {"external": [*common, names["external"]], "best": [*common, *ranked, names["best"]]}


def fork(source: Path, target: Path) -> None:
    """Copy ``source`` as it was before its pairs to a new run directory, whose settings may differ."""
    if target.exists():
        return
    state = json.loads((source / STATE).read_text())
    steps = list(state["steps"])
    state["steps"] = {step: state["steps"][step] for step in steps[: steps.index(f"iter-00/{Step.SAMPLE}")]}
    with atomic_dir(target) as unfinished:
        for name in SHARED:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
            copy(source / name, unfinished / name)
        (unfinished / STATE).write_text(json.dumps(state, indent=1))


def loop(arguments: list[str], log: Path) -> None:
    """Run the loop, its output in ``log``. Raises CommandFailed with its last lines if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        code = subprocess.run([sys.executable, "-m", "vargpt_rl.loop", *arguments], stdout=output, stderr=output)
    if code.returncode:
        last = "\n".join(log.read_text().splitlines()[-5:])
        raise CommandFailed(f"exit code {code.returncode} of the loop with {' '.join(arguments)}; {log} ends:\n{last}")


def run(study: Study) -> list[dict[str, dict]]:
    """Run the study; return, for each seed, the summary of each run's only iteration."""
    folder, results = Path(study.runs), []
    for seed in range(study.seeds):
        results.append({})
        for name, arguments in overrides(study, seed).items():
            directory = folder / f"seed-{seed}-{name}"
            if name == "best":
                fork(folder / f"seed-{seed}-external", directory)
            print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
            loop(arguments, folder / f"seed-{seed}-{name}.log")
            results[-1][name] = json.loads((directory / SUMMARY).read_text())["iterations"][0]
    return results


def table(results: list[dict[str, dict]]) -> str:
    """Format a Markdown row per policy; ``±`` is the standard deviation over seeds, gains are over the seed's SFT."""
    lines = [
        "| policy | held-out score | gain over SFT | by seed | pairs | winners' log-prob |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    scores = {
        policy: np.array([result[run]["eval"][moment]["overall"] for result in results])
        for policy, (run, moment) in POLICIES.items()
    }
    for policy, (run, moment) in POLICIES.items():
        changes = [result[run]["eval"][moment].get("chosen_logp_change") for result in results]
        cells = [
            policy,
            _spread(scores[policy]),
            "-" if policy == "SFT" else _spread(scores[policy] - scores["SFT"], "+"),
            ", ".join(f"{score:.3f}" for score in scores[policy]),
            "-" if moment != "after_dpo" else ", ".join(str(result[run]["pairs"]["built"]) for result in results),
            "-" if None in changes else f"{np.mean(changes):+.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: np.ndarray, sign: str = "") -> str:
    deviation = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.3f}{deviation}"


def main(arguments: list[str] | None = None) -> int:
    """Run the study and print its table; return its exit code."""
    return run_command(Study, lambda study: print(table(run(study))), arguments)


if __name__ == "__main__":
    sys.exit(main())

"""What each part of the recipe is worth: ``python -m vargpt_rl.bench.ablations [key=value ...]``.

VARGPT's ablations (Tables 4 and 5) in miniature: the recipe of pretraining, understanding SFT and SFT against itself
without a stage, or with a part frozen. Each variant is measured on held-out captions (drawings that are exactly
right; how well the true images' bits are predicted, of which chance is ln 2) and held-out questions. The keys are
the loop's, over ``SETTINGS``.

The embedded model is trained already, so what joins its parts is made anew: the generation projectors and the vision
projector start from random weights, as the generation projectors do in the paper. All variants have the same seed and
data, and each stage as many steps as in the full recipe; what is left out is not made up for elsewhere, as in the
paper. A stage that comes out the same in two variants is trained once. The table is printed and kept in
``runs/NAME/ablations.md``; the same command goes on where it was interrupted. Exit codes: 0 done, 1 failed, 2 a setting
is wrong.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from omegaconf import OmegaConf

from actors.cluster import connect, nodes
from actors.pool import RolloutPool
from actors.resources import plan
from configs.load import load_config
from configs.schema import LoopConfig
from learners.group import LearnerGroup
from vargpt_rl.common.command import run_program
from vargpt_rl.driver.inputs import Inputs, gather
from vargpt_rl.driver.rollout import Rollouts
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.steps import Steps
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.stages import PROJECTORS, VISION_PROJECTOR
from vargpt_rl.storage.checkpoint import save_checkpoint
from vargpt_rl.storage.files import write_atomically

SETTINGS = [
    "name=ablations",
    "resolutions=[128]",
    "iterations=1",
    "pretrain.recipe.steps=60",
    "pretrain.recipe.lr=1e-3",
    "understanding.recipe.steps=60",
    "understanding.recipe.lr=5e-4",
    "sft.recipe.steps=120",
    "sft.recipe.batch=16",
    "sft.recipe.micro_batch=8",
    "sft.recipe.lr=5e-4",
    "sft.checkpoints=[]",
]
ANEW = (*PROJECTORS, *VISION_PROJECTOR)
"""Prefixes of the parameters that start from random weights."""


@dataclass(frozen=True)
class Variant:
    """Which stages are trained, with which settings besides."""

    name: str
    stages: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def prefix(self, count: int) -> tuple:
        """What the first ``count`` stages are: equal where they are the same work."""
        return tuple((s, *(key for key in self.settings if key.startswith(f"{s}."))) for s in self.stages[:count])


FULL = ("pretrain", "understanding", "sft")
VARIANTS = (
    Variant("full recipe", FULL),
    Variant("without pretraining", ("understanding", "sft")),
    Variant("without understanding SFT", ("pretrain", "sft")),
    Variant("without SFT", ("pretrain", "understanding")),
    Variant("frozen projectors in SFT", FULL, ("sft.frozen=[projector_in,projector_out]",)),
    Variant("frozen decoder in SFT", FULL, ("sft.frozen=[image_decoder]",)),
)


def start_anew(model: str, directory: Path, seed: int) -> Path:
    """A weight set of all that any stage trains: the model's own weights, and fresh ones where ``ANEW`` says so."""
    trained = Vargpt.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(seed)
    fresh = dict(Vargpt(trained.config).named_parameters())
    tensors = {
        name: (fresh[name] if name.startswith(ANEW) else parameter).detach()
        for name, parameter in trained.named_parameters()
        if not name.startswith("image_tokenizer.")
    }
    return save_checkpoint(directory, tensors)


def run_variant(variant: Variant, steps: Steps, run: Run, trained: dict[tuple, Path]) -> dict:
    """Train the stages that no earlier variant has trained, and measure what came of all of them."""
    steps.begin(0, steps.settings.resolutions[0])
    count = 0
    for i, stage in enumerate(variant.stages):
        work = variant.prefix(i + 1)
        if work not in trained:
            run.step(stage, getattr(steps, stage))
            trained[work] = steps.checkpoint(f"{steps.name}-sft" if stage == "sft" else stage) / "final"
        steps.weights = (*steps.weights, trained[work])
        count += getattr(steps.config, stage).recipe.steps
    measured = {"drawings": steps.draws, "images": steps.predicts, "questions": steps.understands}
    return {"variant": variant.name, "steps": count, **{name: run.step(name, work) for name, work in measured.items()}}


def markdown(results: list[dict]) -> str:
    """The table: a row a variant."""
    titles = "variant", "steps", "drawings right", "nats a bit of images", "questions right"
    rows = [titles, ("---", *["---:"] * (len(titles) - 1))]
    for result in results:
        drawings, images, questions = result["drawings"], result["images"], result["questions"]
        drawn = f"{drawings['overall']:.3f} ± {drawings['overall_stderr']:.3f}"
        answered = f"{questions['accuracy']:.3f} ± {questions['accuracy_stderr']:.3f}"
        predicted = f"{images['nats']:.4f} ± {images['nats_stderr']:.4f}"
        rows.append((result["variant"], str(result["steps"]), drawn, predicted, answered))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def settings_of(variant: Variant, runs: Path, arguments: list[str]) -> LoopConfig:
    """The loop's settings for one variant, whose run is in a folder of its own."""
    name = variant.name.replace(" ", "-")
    return load_config([*SETTINGS, *arguments, *variant.settings, f"runs={runs}", f"name={name}"])


def run_all(configs: dict[Variant, LoopConfig], inputs: Inputs, directory: Path) -> str:
    """Every variant, with the same workers and ranks; the table, which is written anew after each."""
    config = next(iter(configs.values()))
    learner, rollout = config.learner, config.rollout
    placement = plan(nodes(), rollout, learner.ranks, learner.gpus_per_rank, learner.bf16)
    pool = RolloutPool(rollout, placement, inputs.model, inputs.source)
    learners = LearnerGroup(learner, placement.rank_bundle, placement.threads_per_worker, placement.use_gpu)
    start = start_anew(inputs.model, directory / "start", config.seed)
    trained: dict[tuple, Path] = {}
    results = []
    for variant, own in configs.items():
        run = Run(own.directory, OmegaConf.to_container(OmegaConf.structured(own), enum_to_str=True))
        rollouts = Rollouts(pool, inputs.source, run, inputs.quarantine, own.sampling)
        results.append(run_variant(variant, Steps(own, run, inputs, rollouts, learners, (start,)), run, trained))
        write_atomically(directory / "ablations.md", markdown(results).encode())
    return markdown(results)


def execute(arguments: list[str]) -> None:
    """Check the settings, run all variants and print their table."""
    config = load_config([*SETTINGS, *arguments])
    configs = {variant: settings_of(variant, config.directory, arguments) for variant in VARIANTS}
    inputs = gather(config)
    if not inputs.source.image_check():
        raise ValueError(f"data.kind={config.data.kind}: expected shapes, which has questions and an exact check")
    connect()
    try:
        print(run_all(configs, inputs, config.directory), end="")
    finally:
        ray.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return run_program(execute, arguments)


if __name__ == "__main__":
    sys.exit(main())

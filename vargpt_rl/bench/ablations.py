"""Ablate the training recipe: ``python -m vargpt_rl.bench.ablations [key=value ...]``.

A small version of VARGPT's ablations (Tables 4 and 5): the recipe of pretraining, understanding SFT and SFT, compared
with itself without a stage or with frozen parts. Each variant is measured on held-out captions (exactly right images,
and the prediction of the true images' bits, where chance is ln 2 nats) and on held-out questions. The keys are the
loop's and override ``SETTINGS``.

The embedded model is already trained, so the generation projectors and the vision projector restart from random
weights; in the paper the generation projectors do. All variants share seed and data. Each stage has as many steps as in
the full recipe: as in the paper, omitted steps are not added elsewhere. A stage that is equal in two variants is
trained once. The table is printed and written to ``runs/NAME/ablations.md``; repeating the command resumes it. Exit
codes: 0 done, 1 failed, 2 a setting is wrong.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch

from actors.cluster import connect
from configs.load import load_config
from configs.schema import LoopConfig
from vargpt_rl.common.command import run_program
from vargpt_rl.driver.evaluation import answer_questions, bit_nll, draw
from vargpt_rl.driver.inputs import Inputs, gather
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.session import Session, Step
from vargpt_rl.driver.start import open_session, place, plain
from vargpt_rl.driver.training import train_sft, train_stage
from vargpt_rl.driver.weights import WeightSync
from vargpt_rl.evaluate.wording import with_bounds
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.parts import PROJECTORS, VISION_PROJECTOR
from vargpt_rl.stages import STAGES
from vargpt_rl.storage.checkpoint import Policy, save_checkpoint
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
RANDOM = (*PROJECTORS, *VISION_PROJECTOR)
"""Prefixes of the parameters that start from random weights."""


@dataclass(frozen=True)
class Variant:
    """A variant of the recipe: its stages and extra settings."""

    name: str
    stages: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def prefix(self, count: int) -> tuple:
        """Identify the work of the first ``count`` stages: equal for two variants if the work is the same."""
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


def random_start(model: str, directory: Path, seed: int) -> Path:
    """A weight set of all that any stage trains: the model's own weights, and fresh ones where ``RANDOM`` says so."""
    trained = Vargpt.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(seed)
    fresh = dict(Vargpt(trained.config).named_parameters())
    tensors = {
        name: (fresh[name] if name.startswith(RANDOM) else parameter).detach()
        for name, parameter in trained.named_parameters()
        if not name.startswith("image_tokenizer.")
    }
    return save_checkpoint(directory, tensors)


def run_variant(variant: Variant, session: Session, start: Path, trained: dict[tuple, Path]) -> dict:
    """Train the stages that no earlier variant has trained; measure the result of all of them."""
    policy = Policy(session.inputs.model, (start,))
    resolution = session.config.resolutions[0]
    count = 0
    for i, name in enumerate(variant.stages):
        work = variant.prefix(i + 1)
        context = session.iteration(0) if name == Step.SFT else session.stage(name, resolution)
        step = Step.SFT if name == Step.SFT else ""
        if work not in trained:
            context.step(step, train_sft if name == Step.SFT else train_stage, policy)
            trained[work] = context.checkpoint(step) / "final"
        policy = policy.plus(trained[work])
        count += getattr(context.config, STAGES[name].block).recipe.steps
    measured = session.stage("measured", resolution)
    measures = {"drawings": draw, "images": bit_nll, "questions": answer_questions}
    results = {name: measured.step(name, measure, policy) for name, measure in measures.items()}
    return {"variant": variant.name, "steps": count, **results}


def markdown(results: list[dict]) -> str:
    """The table: a row a variant."""
    titles = "variant", "steps", "drawings right", "nats a bit of images", "questions right"
    rows = [titles, ("---", *["---:"] * (len(titles) - 1))]
    for result in results:
        drawings, images, questions = result["drawings"], result["images"], result["questions"]
        drawn = with_bounds(drawings, "overall")
        answered = with_bounds(questions, "accuracy")
        predicted = f"{images['nats']:.4f} ± {images['nats_stderr']:.4f}"
        rows.append((result["variant"], str(result["steps"]), drawn, predicted, answered))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def settings_of(variant: Variant, runs: Path, arguments: list[str]) -> LoopConfig:
    """The loop's settings for one variant, whose run is in a folder of its own."""
    name = variant.name.replace(" ", "-")
    return load_config([*SETTINGS, *arguments, *variant.settings, f"runs={runs}", f"name={name}"])


def run_all(configs: dict[Variant, LoopConfig], inputs: Inputs, directory: Path) -> str:
    """Run every variant with the same workers and ranks; return the table, which is rewritten after each."""
    config = next(iter(configs.values()))
    session: Session | None = None
    start = random_start(inputs.model, directory / "start", config.seed)
    trained: dict[tuple, Path] = {}
    results = []
    for variant, own in configs.items():
        run = Run(own.directory, plain(own))
        if session is None:
            session = open_session(own, inputs, run, place(own, inputs, run))
        session = replace(session, config=own, run=run, weights=WeightSync(session.pool, session.text, run))
        results.append(run_variant(variant, session, start, trained))
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

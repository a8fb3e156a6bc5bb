"""Training: the learner jobs of each stage, from the policy so far, and the swap of their weights into the workers."""

import shutil
from collections.abc import Callable, Sequence

import numpy as np

from learners.config import Recipe
from learners.group import RunningJob
from learners.jobs import DpoJob, SftJob, TokenizerJob
from vargpt_rl.common.logs import RECORD
from vargpt_rl.data.preferences import part_path, prompts_of, read_table
from vargpt_rl.data.records.stream import EDITS, RecordStream
from vargpt_rl.data.samples import ImageQuestion, Probe, Prompt, Record
from vargpt_rl.driver.corpus import open_corpus
from vargpt_rl.driver.prompts import edit_records
from vargpt_rl.driver.seeds import Purpose, seeds_for
from vargpt_rl.driver.session import StageContext, Step
from vargpt_rl.driver.stored_states import complete_states
from vargpt_rl.driver.weights import verify_swap
from vargpt_rl.model.bits import pack
from vargpt_rl.model.families import load_config
from vargpt_rl.model.prompt import REPLY
from vargpt_rl.model.scales import token_count
from vargpt_rl.stages import STAGES, Learns, Stage
from vargpt_rl.storage.checkpoint import Policy

Dataset = list[Record] | RecordStream


def train_stage(context: StageContext, policy: Policy) -> dict:
    """Train a stage outside the iterations, from ``policy``."""
    stage = STAGES[context.name]
    if stage.learns is Learns.IMAGES:
        return train_image_tokenizer(context, policy)
    settings = getattr(context.config, stage.block)
    seed = context.config.seed + stage.seed_offset
    questions: list[ImageQuestion] = []
    if stage.learns is Learns.QUESTIONS and context.inputs.stream is None:
        questions = context.source.questions(settings.questions, seed, "train")
    share = settings.drawing_share
    dataset = stage_dataset(context, stage, settings.records, share, seed)
    return train_supervised(context, policy, stage, dataset, settings.recipe, questions=questions, drawing_share=share)


def stage_dataset(context: StageContext, stage: Stage, count: int, drawing_share: float, seed: int) -> Dataset:
    """Return what a stage learns from: an endless stream of records, or ``count`` records of the source."""
    if context.inputs.stream is not None:
        wanted = EDITS if stage.learns is Learns.EDITS else None
        return context.inputs.stream.at(context.resolution, drawing_share, wanted)
    if stage.learns is Learns.EDITS:
        return edit_records(context, "train", count, seed)
    return context.source.records(count, seed)


def train_sft(context: StageContext, policy: Policy) -> dict:
    """Train the iteration's SFT, from ``policy``; checkpoints that will sample are saved on the way."""
    settings = context.config.sft
    seed = seeds_for(1, context.config.seed, context.index, Purpose.CORPUS)[0]
    stage = STAGES[Step.SFT].without(settings.frozen)
    dataset = stage_dataset(context, stage, settings.records, 1.0, seed)
    return train_supervised(
        context,
        policy,
        stage,
        dataset,
        settings.recipe,
        step=Step.SFT,
        save_steps=settings.saved_steps(),
        frozen=tuple(settings.frozen),
    )


def train_control(context: StageContext, policy: Policy) -> dict:
    """Train SFT on the winners of this iteration's pairs: same start, images, steps and learning rate as DPO."""
    rows = read_table(context.table())
    if context.inputs.pairs is None:
        rows = rows.drop_duplicates("prompt_id")
        keys = [(prompt, context.source.winner_key(prompt)) for prompt in prompts_of(rows)]
    else:
        rows = rows.drop_duplicates(["prompt_id", "chosen_source"])
        keys = list(zip(prompts_of(rows), rows.chosen_source, strict=True))
    records = [Record(prompt.id, prompt, key) for prompt, key in keys if key is not None]
    stage = STAGES["sft_on_winners"]
    settings = context.config.dpo
    return train_supervised(
        context, policy, stage, records, settings.recipe, step=Step.CONTROL, frozen=tuple(settings.frozen)
    )


def train_supervised(
    context: StageContext,
    policy: Policy,
    stage: Stage,
    dataset: Dataset,
    recipe: Recipe,
    *,
    step: str = "",
    questions: Sequence[ImageQuestion] = (),
    drawing_share: float = 1.0,
    save_steps: tuple[int, ...] = (),
    frozen: tuple[str, ...] = (),
) -> dict:
    """Train a supervised stage from ``policy``."""
    context.swap_to(policy)
    output = context.checkpoint(step)
    folder = context.run.directory.resolve() / "data" / output.name
    if isinstance(dataset, RecordStream):
        stream = dataset
        counts: dict[str, int] = {}
    else:
        stream, counts = open_corpus(context, dataset, questions, drawing_share, folder)
    job = SftJob(
        stage=stage.name,
        start=policy,
        stream=stream,
        recipe=recipe,
        output=output,
        seed=context.config.seed + context.index,
        probe=random_probe(context),
        save_steps=save_steps,
        frozen=frozen,
    )
    try:
        result = context.session.learners.run(job, follow(context, stage.name, recipe, context.config.learner.ranks))
    finally:  # if too many bad records abort the stage, still report them
        counts["bad_records"] = context.inputs.quarantine.gather(stream.quarantine)
        _log_quarantine(context)
    shutil.rmtree(folder, ignore_errors=True)
    return result | {"corpus": counts}


def train_image_tokenizer(context: StageContext, policy: Policy) -> dict:
    """Adapt the image tokenizer to the data source's images, winners included."""
    settings = context.config.tokenizer
    records = context.source.records(settings.images, context.config.seed)
    winners = [key for record in records if (key := context.source.winner_key(record.prompt))]
    keys = list(dict.fromkeys([*(record.image for record in records), *winners]))
    job = TokenizerJob(
        start=policy,
        keys=keys,
        source=context.source,
        side=context.resolution,
        steps=settings.steps,
        batch=settings.batch,
        lr=settings.lr,
        output=context.checkpoint(),
        seed=context.config.seed,
    )
    recipe = Recipe(steps=settings.steps, batch=settings.batch, micro_batch=settings.batch)
    result = context.session.learners.run(job, follow(context, context.name, recipe, ranks=1))
    for key, reason in result.pop("failures"):
        context.inputs.quarantine.add(key, key, reason)
    return result


# DPO


def train_dpo(context: StageContext, policy: Policy) -> dict:
    """Train DPO on this iteration's pairs, from ``policy``, which is the reference."""
    return finish_dpo(context, policy, None)


def start_dpo(context: StageContext, policy: Policy, parts: int = 1) -> RunningJob:
    """Start DPO on the preference table, or on the ``parts`` that it will have. The workers hold ``policy``."""
    probe = random_probe(context)
    if context.states is not None:
        complete_states(context, context.states, probe)
    job = DpoJob(
        start=policy,
        table=context.table(),
        recipe=context.config.dpo.recipe,
        dpo=context.config.dpo,
        output=context.checkpoint(Step.DPO),
        seed=context.config.seed + context.index,
        probe=probe,
        parts=parts,
        states=context.states,
    )
    return context.session.learners.start(
        job, follow(context, Step.DPO, context.config.dpo.recipe, context.config.learner.ranks)
    )


def finish_dpo(context: StageContext, policy: Policy, job: RunningJob | None) -> dict:
    """Wait for DPO, which starts now unless ``job`` is running."""
    context.swap_to(policy)
    shutil.rmtree(context.rollouts, ignore_errors=True)  # the pairs are recorded
    result = (job or start_dpo(context, policy)).result()
    shutil.rmtree(part_path(context.table(), 0).parent, ignore_errors=True)
    if context.states is not None:
        shutil.rmtree(context.states, ignore_errors=True)
    return result


# Shared


def swap(context: StageContext, policy: Policy, trained: dict) -> dict:
    """Swap to ``policy``; verify that workers score the probe as the learner did whose result is ``trained``."""
    swapped = context.swap_to(policy)
    if "probe" in trained:
        probe, dtype = random_probe(context), context.session.learners.dtype
        swapped["probe_difference"] = verify_swap(context.pool, probe, trained["probe"], dtype)
    return swapped


def random_probe(context: StageContext) -> Probe:
    """Return the probe of a stage: the same at every swap."""
    return probe_of(context.inputs.model, context.resolution, context.config.seed)


def probe_of(model: str, resolution: int, seed: int) -> Probe:
    """Return an image of random tokens: as good as any to compare weights by."""
    tokenizer = load_config(model).image_tokenizer_config
    tokens = token_count(tokenizer.schedule_for(resolution))
    depth, values = tokenizer.symbols
    labels = np.random.default_rng(seed).integers(0, values, (tokens, depth))
    return Probe(Prompt("probe", "a picture", REPLY), pack(labels, values), resolution)


def follow(context: StageContext, stage: str, recipe: Recipe, ranks: int) -> Callable[[dict], None]:
    """Return a callback that shows the learner's log lines as progress and logs them as metrics."""
    RECORD.info("%s %d px: %s", stage, context.resolution, recipe.arithmetic(ranks))
    context.run.progress.part(stage, 0, recipe.steps)
    loss = ""

    def on_log(line: dict) -> None:
        nonlocal loss
        step = line.pop("step")
        if "loss" in line:
            loss = f"loss {line['loss']:.3f}"
            context.log(stage, step, {key: value for key, value in line.items() if key != "epoch"})
        context.run.progress.part(stage, step, recipe.steps, loss)

    return on_log


def _log_quarantine(context: StageContext) -> None:
    """Log all records quarantined so far, by reason; ``lost`` counts those that could not be used."""
    quarantine = context.inputs.quarantine
    if quarantine.counts:
        context.log("quarantine", context.index, {"lost": quarantine.lost, **quarantine.counts})

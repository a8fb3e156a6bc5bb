"""Training: the learner jobs of each stage, from the policy so far, and the swap of their weights into the workers."""

import shutil
from collections.abc import Callable, Sequence

import numpy as np

from learners.config import Recipe
from learners.group import RunningJob
from learners.image_policy import LOG_PROB_TOLERANCE, RESHAPED_TOLERANCE
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
from vargpt_rl.driver.weights import PROBE_TOLERANCE, verify_swap
from vargpt_rl.model.bits import pack
from vargpt_rl.model.families import load_config
from vargpt_rl.model.prompt import REPLY
from vargpt_rl.model.scales import token_count
from vargpt_rl.stages import STAGES, Learns, Stage
from vargpt_rl.storage.checkpoint import Policy

Dataset = list[Record] | RecordStream


def train_stage(it: StageContext, policy: Policy) -> dict:
    """Train a stage outside the iterations, from ``policy``."""
    stage = STAGES[it.name]
    if stage.learns is Learns.IMAGES:
        return train_image_tokenizer(it, policy)
    settings = getattr(it.config, stage.block)
    seed = it.config.seed + stage.seed_offset
    questions: list[ImageQuestion] = []
    if stage.learns is Learns.QUESTIONS and it.inputs.stream is None:
        questions = it.source.questions(settings.questions, seed, "train")
    share = settings.drawing_share
    dataset = stage_dataset(it, stage, settings.records, share, seed)
    return train_supervised(it, policy, stage, dataset, settings.recipe, questions=questions, drawing_share=share)


def stage_dataset(it: StageContext, stage: Stage, count: int, drawing_share: float, seed: int) -> Dataset:
    """Return what a stage learns from: an endless stream of records, or ``count`` records of the source."""
    if it.inputs.stream is not None:
        wanted = EDITS if stage.learns is Learns.EDITS else None
        return it.inputs.stream.at(it.resolution, drawing_share, wanted)
    if stage.learns is Learns.EDITS:
        return edit_records(it, "train", count, seed)
    return it.source.records(count, seed)


def train_sft(it: StageContext, policy: Policy) -> dict:
    """Train the iteration's SFT, from ``policy``; checkpoints that will sample are saved on the way."""
    settings = it.config.sft
    seed = seeds_for(1, it.config.seed, it.index, Purpose.CORPUS)[0]
    stage = STAGES[Step.SFT].without(settings.frozen)
    dataset = stage_dataset(it, stage, settings.records, 1.0, seed)
    return train_supervised(
        it,
        policy,
        stage,
        dataset,
        settings.recipe,
        step=Step.SFT,
        save_steps=settings.saved_steps(),
        frozen=tuple(settings.frozen),
    )


def train_control(it: StageContext, policy: Policy) -> dict:
    """Train SFT on the winners of this iteration's pairs: same start, images, steps and learning rate as DPO."""
    rows = read_table(it.table())
    if it.inputs.pairs is None:
        rows = rows.drop_duplicates("prompt_id")
        keys = [(prompt, it.source.winner_key(prompt)) for prompt in prompts_of(rows)]
    else:
        rows = rows.drop_duplicates(["prompt_id", "chosen_source"])
        keys = list(zip(prompts_of(rows), rows.chosen_source, strict=True))
    records = [Record(prompt.id, prompt, key) for prompt, key in keys if key is not None]
    stage = STAGES["sft_on_winners"]
    settings = it.config.dpo
    return train_supervised(
        it, policy, stage, records, settings.recipe, step=Step.CONTROL, frozen=tuple(settings.frozen)
    )


def train_supervised(
    it: StageContext,
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
    it.swap_to(policy)
    output = it.checkpoint(step)
    folder = it.run.directory.resolve() / "data" / output.name
    if isinstance(dataset, RecordStream):
        stream = dataset
        counts: dict[str, int] = {}
    else:
        stream, counts = open_corpus(it, dataset, questions, drawing_share, folder)
    job = SftJob(
        stage=stage.name,
        start=policy,
        stream=stream,
        recipe=recipe,
        output=output,
        seed=it.config.seed + it.index,
        probe=random_probe(it),
        save_steps=save_steps,
        frozen=frozen,
    )
    try:
        result = it.session.learners.run(job, follow(it, stage.name, recipe, it.config.learner.ranks))
    finally:  # if too many bad records abort the stage, still report them
        counts["bad_records"] = it.inputs.quarantine.gather(stream.quarantine)
        _log_quarantine(it)
    shutil.rmtree(folder, ignore_errors=True)
    return result | {"corpus": counts}


def train_image_tokenizer(it: StageContext, policy: Policy) -> dict:
    """Adapt the image tokenizer to the data source's images, winners included."""
    settings = it.config.tokenizer
    records = it.source.records(settings.images, it.config.seed)
    winners = [key for record in records if (key := it.source.winner_key(record.prompt))]
    keys = [*dict.fromkeys(record.image for record in records), *dict.fromkeys(winners)]
    job = TokenizerJob(
        start=policy,
        keys=keys,
        source=it.source,
        side=it.resolution,
        steps=settings.steps,
        batch=settings.batch,
        lr=settings.lr,
        output=it.checkpoint(),
        seed=it.config.seed,
    )
    recipe = Recipe(steps=settings.steps, batch=settings.batch, micro_batch=settings.batch)
    result = it.session.learners.run(job, follow(it, it.name, recipe, ranks=1))
    for key, reason in result.pop("failures"):
        it.inputs.quarantine.add(key, key, reason)
    return result


# DPO


def train_dpo(it: StageContext, policy: Policy) -> dict:
    """Train DPO on this iteration's pairs, from ``policy``, which is the reference."""
    return finish_dpo(it, policy, None)


def start_dpo(it: StageContext, policy: Policy, parts: int = 1) -> RunningJob:
    """Start DPO on the preference table, or on the ``parts`` that it will have. The workers hold ``policy``."""
    probe = random_probe(it)
    if it.states is not None:
        complete_states(it, it.states, probe)
    job = DpoJob(
        start=policy,
        table=it.table(),
        recipe=it.config.dpo.recipe,
        dpo=it.config.dpo,
        output=it.checkpoint(Step.DPO),
        seed=it.config.seed + it.index,
        probe=probe,
        parts=parts,
        states=it.states,
    )
    return it.session.learners.start(job, follow(it, Step.DPO, it.config.dpo.recipe, it.config.learner.ranks))


def finish_dpo(it: StageContext, policy: Policy, job: RunningJob | None) -> dict:
    """Wait for DPO, which starts now unless ``job`` is running."""
    it.swap_to(policy)
    shutil.rmtree(it.rollouts, ignore_errors=True)  # the pairs are recorded
    result = (job or start_dpo(it, policy)).result()
    shutil.rmtree(part_path(it.table(), 0).parent, ignore_errors=True)
    if it.states is not None:
        shutil.rmtree(it.states, ignore_errors=True)
    return result


# Shared


def swap(it: StageContext, policy: Policy, trained: dict) -> dict:
    """Swap to ``policy``; verify that workers score the probe as the learner did whose result is ``trained``."""
    swapped = it.swap_to(policy)
    if "probe" in trained:
        dtype = it.session.learners.dtype
        exact = max(PROBE_TOLERANCE, LOG_PROB_TOLERANCE[dtype])
        tolerance = RESHAPED_TOLERANCE[dtype] if it.config.adapter.is_merged else exact
        swapped["probe_difference"] = verify_swap(it.pool, random_probe(it), trained["probe"], tolerance)
    return swapped


def random_probe(it: StageContext) -> Probe:
    """Return the probe of a stage: the same at every swap."""
    return probe_of(it.inputs.model, it.resolution, it.config.seed)


def probe_of(model: str, resolution: int, seed: int) -> Probe:
    """Return an image of random tokens: as good as any to compare weights by."""
    tokenizer = load_config(model).image_tokenizer_config
    tokens = token_count(tokenizer.schedule_for(resolution))
    depth, values = tokenizer.symbols
    labels = np.random.default_rng(seed).integers(0, values, (tokens, depth))
    return Probe(Prompt("probe", "a picture", REPLY), pack(labels, values), resolution)


def follow(it: StageContext, stage: str, recipe: Recipe, ranks: int) -> Callable[[dict], None]:
    """Return a callback that shows the learner's log lines as progress and logs them as metrics."""
    RECORD.info("%s %d px: %s", stage, it.resolution, recipe.arithmetic(ranks))
    it.run.progress.part(stage, 0, recipe.steps)
    loss = ""

    def on_log(line: dict) -> None:
        nonlocal loss
        step = line.pop("step")
        if "loss" in line:
            loss = f"loss {line['loss']:.3f}"
            it.log(stage, step, {key: value for key, value in line.items() if key != "epoch"})
        it.run.progress.part(stage, step, recipe.steps, loss)

    return on_log


def _log_quarantine(it: StageContext) -> None:
    """Log all records quarantined so far, by reason; ``lost`` counts those that could not be used."""
    quarantine = it.inputs.quarantine
    if quarantine.counts:
        it.log("quarantine", it.index, {"lost": quarantine.lost, **quarantine.counts})

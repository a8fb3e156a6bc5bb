"""Evaluation on held-out data: images scored, preferences, reconstructions, questions, edits.

Each measure loads its policy into the workers first and always uses the same prompts and seeds, so that moments of a
run can be compared.
"""

from itertools import takewhile

from actors.worker import BaseWorker, PromptedBits, Worker
from rewards.preferences import external_winner
from vargpt_rl.common.averages import mean_and_error, with_interval
from vargpt_rl.data.preferences import prompts_of, read_table
from vargpt_rl.data.rollouts import Rollouts
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.data.sources import ImageCheck
from vargpt_rl.driver.exported import generation_files, write_card
from vargpt_rl.driver.grids import write_images, write_row
from vargpt_rl.driver.groups import draw_groups, measure_diversity
from vargpt_rl.driver.judging import NO_REWARDS, score
from vargpt_rl.driver.learned import current_reward, trains_on_check
from vargpt_rl.driver.own_pairs import write_held_out
from vargpt_rl.driver.pairs import score_kept, write_pairs
from vargpt_rl.driver.prompts import held_out_edits, held_out_prompts, held_out_seeds
from vargpt_rl.driver.sampling import encode_winners, generate, generate_kept
from vargpt_rl.driver.seeds import Purpose, seeds_for
from vargpt_rl.driver.session import StageContext, Step
from vargpt_rl.evaluate.held_out import Fidelity, preference_scores
from vargpt_rl.evaluate.paired import ScoredImage, compare, read_scores, write_scores
from vargpt_rl.evaluate.thumbnails import Illustrated
from vargpt_rl.stages import STAGES, Measure
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.export import best_folder, keep_best, read_best

SEEDS = 4
"""Images of each prompt whose diversity is measured."""

BOUNDS = ("", "_low", "_high")
"""Endings of a mean and of its interval in results (`with_interval`)."""

BASELINES = {Step.AFTER_SFT: "sft", Step.CONTROL: "control"}
"""Moments that later ones are compared with, image by image, in order, and their names in results."""


def draw_before(context: StageContext, policy: Policy) -> dict:
    """Draw the first row of the sample grid with the policy that the iteration starts from."""
    context.swap_to(policy)
    prompts = held_out_prompts(context, context.config.evaluation.grid)
    write_row(context, Step.BEFORE, generate(context, prompts, held_out_seeds(context, len(prompts)), Step.BEFORE))
    return {}


def evaluate(context: StageContext, policy: Policy, moment: str) -> dict:
    """Generate held-out prompts and score the images; after training on pairs also margins on pairs fixed after SFT."""
    context.swap_to(policy)
    prompts = held_out_prompts(context, context.config.evaluation.prompts)
    samples = generate_kept(context, prompts, held_out_seeds(context, len(prompts)), f"{context.name}-{moment}")
    result, images = score_images(context, samples, keep=moment)
    write_scores(context.scores(moment), images)
    # A step that is redone may find scores of later moments.
    for baseline in takewhile(lambda each: each != moment, BASELINES):
        name = BASELINES[baseline]
        if comparison := compare(images, read_scores(context.scores(baseline))):
            result |= comparison.as_metrics(f"gain_over_{name}")
    result |= diversity_over_seeds(context)
    if context.config.align.learns_pairs and moment == Step.AFTER_SFT:
        result |= fix_held_out_pairs(context, samples)
    elif moment in (Step.CONTROL, Step.AFTER_DPO):
        result |= preference_metrics(context)
    write_row(context, moment, samples[: context.config.evaluation.grid])
    if "overall" in result:
        context.run.progress.score = f"score {result['overall']:.3f}"
    _keep_best(context, policy, moment, result)
    context.log(f"evaluate/{moment}", context.index, {k: v for k, v in result.items() if v is not None})
    return result


def diversity_over_seeds(context: StageContext) -> dict[str, float]:
    """Measure how far images of one held-out prompt differ (`vargpt_rl.driver.groups.measure_diversity`)."""
    prompts = held_out_prompts(context, context.config.evaluation.diversity)
    if not prompts:
        return {}
    seed = seeds_for(1, context.config.seed, Purpose.DIVERSITY)[0]
    samples = draw_groups(context, prompts, SEEDS, seed)
    bits = [sample.bits for sample in samples]
    return measure_diversity(context, [bits[at : at + SEEDS] for at in range(0, len(bits), SEEDS)])


def validate(context: StageContext, stage: str, step: int) -> float:
    """Score the weights in the workers on held-out prompts other than the evaluation's, as far as there are any."""
    used = {prompt.text for prompt in held_out_prompts(context, context.config.evaluation.prompts)}
    count = context.config.rl.guard.prompts
    seed = seeds_for(1, context.config.seed, Purpose.VALIDATION)[0]
    prompts = context.source.prompts("held_out", len(used) + count, seed)
    prompts = ([prompt for prompt in prompts if prompt.text not in used] or prompts)[:count]
    samples = generate(context, prompts, seeds_for(len(prompts), seed), f"{context.name}-validate")
    result = score_images(context, samples)[0]
    context.log(stage, step, result)
    return result["overall"]


def fix_held_out_pairs(context: StageContext, samples: list[Sample]) -> dict[str, int]:
    """Fix the held-out pairs with the log-probabilities of the weights in the workers.

    They pair the held-out images with their winners, unless pairs came from files: then a part of those is held out.
    """
    if context.inputs.pairs is not None:
        return write_held_out(context)
    rollouts = Rollouts(samples, encode_winners(context, Rollouts(samples, {}).prompts))
    size = context.config.rollout.images_at_once
    report = write_pairs(context, context.table("held-out"), rollouts, external_winner, NO_REWARDS, size)
    return {"pairs": report["built"]}


def evaluate_stage(context: StageContext, policy: Policy) -> dict:
    """Measure what a stage outside the iterations is for."""
    measure = STAGES[context.name].measure
    result = MEASURES[measure](context, policy) if measure else {}
    context.log(f"evaluate/{context.name}", context.index, result)
    return result


def _keep_best(context: StageContext, policy: Policy, moment: str, result: dict) -> None:
    """Export the policy to ``best/RESOLUTION`` if it has the highest value of ``tracking.best`` there so far."""
    wanted, metric = context.config.best
    if moment != wanted:
        return
    if metric not in result:
        context.run.note(
            f"{context.name}: no best/{context.resolution}, {moment} has no {metric}; it has {list(result)}"
        )
        return
    note = {
        "metric": f"{moment}.{metric}",
        "value": result[metric],
        "iteration": context.index,
        "resolution": context.resolution,
    }
    files = generation_files(context.session.config, policy.model, context.resolution)
    folder = best_folder(context.run.directory, context.resolution)
    keep_best(policy, folder, note, files)
    if read_best(folder) == note:
        earlier = [{"resolution": context.resolution, "eval": {}}] * context.index
        measured = {"resolution": context.resolution, "eval": {moment: result}}
        summary = {"stages": {}, "iterations": [*earlier, measured]}
        write_card(folder, context.run.directory, context.session.config, summary)


# Measures


def reconstruct(context: StageContext, policy: Policy) -> dict[str, float]:
    """Measure what the image tokenizer keeps of the stronger system's images of held-out prompts.

    By the source's exact check if it has one, else by the peak signal-to-noise ratio in dB.
    """
    context.swap_to(policy)
    prompts = held_out_prompts(context, context.config.evaluation.prompts)
    winners = encode_winners(context, prompts).values()
    if check := context.source.image_check():
        return _checked(context, [(winner.prompt, winner.bits) for winner in winners], check)
    items = [(Prompt(winner.source, winner.prompt.text), winner.bits) for winner in winners]
    ratio, error = mean_and_error(
        context.pool.run(Worker.check, items, context.resolution, Fidelity(context.source, context.resolution))
    )
    return {"psnr": ratio, "psnr_stderr": error, "n": len(items)}


def draw(context: StageContext, policy: Policy) -> dict:
    """Generate held-out prompts and score the images; empty if nothing can score them."""
    if not (context.source.image_check() or context.inputs.reward or context.inputs.judge):
        return {}
    context.swap_to(policy)
    prompts = held_out_prompts(context, context.config.evaluation.prompts)
    return score_images(context, generate_kept(context, prompts, held_out_seeds(context, len(prompts)), context.name))[
        0
    ]


def answer_questions(context: StageContext, policy: Policy) -> dict[str, float]:
    """Measure exact-match accuracy on held-out questions; empty if the source has none."""
    context.swap_to(policy)
    rows = context.source.questions(context.config.evaluation.questions, 0, "held_out")
    if not rows:
        return {}
    asked = [(row.image, row.question) for row in rows]
    answers = context.writer.run(BaseWorker.answer, asked, context.config.data.seen_side)
    right = [float(answer == row.answer) for answer, row in zip(answers, rows, strict=True)]
    return {**with_interval("accuracy", right), "n": len(right)}


def edit_images(context: StageContext, policy: Policy, moment: str = "after") -> dict:
    """Edit held-out images and score the edits; the first are a row of the grid. Empty if the source has no edits."""
    prompts = held_out_edits(context, context.config.evaluation.edits)
    if not prompts:
        return {}
    context.swap_to(policy)
    samples = generate_kept(context, prompts, held_out_seeds(context, len(prompts)), f"{context.name}-{moment}")
    write_row(context, moment, samples[: context.config.evaluation.grid])
    check = context.source.edit_check()
    return _checked(context, [(sample.prompt, sample.bits) for sample in samples], check) if check else {}


MEASURES = {
    Measure.RECONSTRUCTIONS: reconstruct,
    Measure.DRAWINGS: draw,
    Measure.QUESTIONS: answer_questions,
    Measure.EDITS: edit_images,
}


def bit_nll(context: StageContext, policy: Policy) -> dict[str, float]:
    """Measure how well the source's own images of held-out prompts are predicted, in nats per bit; chance is ln 2."""
    context.swap_to(policy)
    prompts = held_out_prompts(context, context.config.evaluation.prompts)
    winners = list(encode_winners(context, prompts).values())
    scores = context.pool.run(Worker.score, [(winner.prompt, winner.bits) for winner in winners], context.resolution)
    each = [-score.total / (8 * len(winner.bits)) for winner, score in zip(winners, scores, strict=True)]
    mean, error = mean_and_error(each, [winner.prompt.text for winner in winners])
    return {"nats": mean, "nats_stderr": error, "n": len(each)}


def preference_metrics(context: StageContext) -> dict[str, float]:
    """Compare the weights in the workers with the reference scores of the held-out pairs; empty if none are."""
    if context.inputs.pairs is not None and not context.table("held-out").exists():
        return {}
    rows = read_table(context.table("held-out"))
    resolution = int(rows.resolution[0])
    prompts = prompts_of(rows)
    scores = {}
    for side in ("chosen", "rejected"):
        items = list(zip(prompts, rows[f"{side}_bits"], strict=True))
        kept = score_kept(context, f"scores-{side}", items, resolution, context.config.rollout.images_at_once)
        scores[side] = [score.total for score in kept]
    return preference_scores(
        scores["chosen"],
        scores["rejected"],
        rows.reference_chosen_logp,
        rows.reference_rejected_logp,
        context.config.dpo.beta,
        list(rows.prompt),
    )


def score_images(context: StageContext, samples: list[Sample], keep: str = "") -> tuple[dict, list[ScoredImage]]:
    """Score held-out images by everything that can: the source's exact check, the judge and the training reward.

    "overall" is the exact check's mean if there is one, else the judge's, else the reward's. Returns the means, and the
    scores of each image. The first ``tracking.images`` images are kept for the run's page under the name ``keep``, if
    there is one.
    """
    items: list[PromptedBits] = [(sample.prompt, sample.bits) for sample in samples]
    check = context.source.image_check()
    means: dict = {"n": len(samples)}
    verdicts, files = _look(context, items, check, keep)
    found: dict[str, list[float | None]] = {}
    for name, plugin in (("judge", context.inputs.judge), ("reward", current_reward(context))):
        if plugin:
            if check and name == "reward" and trains_on_check(context):
                found[name] = list(check.values(verdicts))
            else:
                found[name] = score(context, items, plugin, keep and name)[0]
            means |= _means(name, found[name], [prompt.text for prompt, _ in items])
    if check:
        means |= check.scores([prompt for prompt, _ in items], verdicts)
        found["score"] = list(check.values(verdicts))
    elif found:
        first = next(iter(found))
        found["score"] = found[first]
        count = means[f"{first}_n"]
        means |= {f"overall{part}": means[f"{first}{part}"] for part in BOUNDS if f"{first}{part}" in means}
        means |= {"n": count, "unscored": len(samples) - count}
    nothing: list[float | None] = [None] * len(samples)
    columns: dict[str, list] = {name: found.get(name, nothing) for name in ("score", "judge", "reward")}
    if check:
        columns["skill"] = check.skills([prompt for prompt, _ in items])
        columns["reason"] = [verdict.reason for verdict in verdicts]
    columns["image"] = files
    return means, [
        ScoredImage(
            prompt_id=sample.prompt.id,
            prompt=sample.prompt.text,
            seed=sample.seed,
            **{name: values[i] for name, values in columns.items()},
        )
        for i, sample in enumerate(samples)
    ]


def _look(
    context: StageContext, items: list[PromptedBits], check: ImageCheck | None, keep: str
) -> tuple[list, list[str | None]]:
    """Return the verdicts of ``check``, if there is one, and the files of the images that are kept."""
    kept = context.config.tracking.images if keep else 0
    if not check:
        seen = context.pool.run(Worker.check, items[:kept], context.resolution, Illustrated(None)) if kept else []
    else:
        seen = context.pool.run(Worker.check, items, context.resolution, Illustrated(check))
    names = [f"{number:04d}.webp" for number in range(min(kept, len(items)))]
    files = write_images(context, keep, dict(zip(names, (image for _, image in seen), strict=False)))
    return [verdict for verdict, _ in seen], [*files, *[None] * (len(items) - len(files))]


def _means(name: str, values: list[float | None], prompts: list[str]) -> dict[str, float]:
    """Return mean, interval and number of the images that were scored."""
    scored = [(value, prompt) for value, prompt in zip(values, prompts, strict=True) if value is not None]
    means = with_interval(name, [value for value, _ in scored], [prompt for _, prompt in scored])
    return {**means, f"{name}_n": len(scored)}


def _checked(context: StageContext, items: list[PromptedBits], check: ImageCheck) -> dict[str, float]:
    """Return the scores of an exact check, which runs in the workers."""
    return check.scores(
        [prompt for prompt, _ in items], context.pool.run(Worker.check, items, context.resolution, check)
    )

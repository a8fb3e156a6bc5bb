"""The steps that a run will take, in order, each with a rough weight for the time left: tokens passed through."""

from dataclasses import asdict
from itertools import groupby

from configs.schema import LoopConfig
from learners.config import Recipe
from learners.methods import ONLINE
from vargpt_rl.driver.session import Step
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.page.plan import expected_steps
from vargpt_rl.stages import STAGES, Learns

TRAIN, DRAW, SCORE = 3.0, 2.0, 1.0
"""Cost of a token by what is done with it, in forward passes; drawing decodes images too."""
ANSWER = 100.0
"""Tokens of a question."""


def planned_steps(config: LoopConfig) -> dict[str, float]:
    """Return the steps of a run by name, as ``vargpt_rl.driver.run`` records them, with their weights."""
    steps: dict[str, float] = {}
    for stage, names in groupby(expected_steps(asdict(config)), lambda name: name.partition("/")[0]):
        weights = _weights(stage, config)
        steps |= {name: weights.get(name.partition("/")[2], 0.0) for name in names}
    return steps


def _weights(stage: str, config: LoopConfig) -> dict[str, float]:
    """Return the weights of a stage's steps; those that are not in it take no time."""
    if stage in ("dtype", "batch_size", "adapter"):
        return {}
    if stage == "understands":
        answering = config.evaluation.questions * ANSWER
        return {"before": answering, "after": answering}
    if stage.startswith("iter-"):
        k = int(stage.removeprefix("iter-"))
        resolution = config.resolution_of(k)
        return _iteration_weights(config.at_resolution(resolution), resolution)
    resolution = STAGES[stage].resolutions(config.resolutions)[0]
    return _stage_weights(stage, config.at_resolution(resolution), resolution)


def _tokens(resolution: int) -> int:
    return token_count(schedule_for(resolution))


def _training(recipe: Recipe, resolution: int) -> float:
    return TRAIN * recipe.steps * recipe.batch * _tokens(resolution)


def _stage_weights(name: str, config: LoopConfig, resolution: int) -> dict[str, float]:
    stage = STAGES[name]
    if stage.learns is Learns.IMAGES:
        images = config.tokenizer.steps * config.tokenizer.batch
        training = TRAIN * images * _tokens(resolution)
    else:
        training = _training(getattr(config, stage.block).recipe, resolution)
    edits = stage.learns is Learns.EDITS
    measured = DRAW * (config.evaluation.edits if edits else config.evaluation.prompts) * _tokens(resolution)
    if stage.learns is Learns.QUESTIONS:
        measured = config.evaluation.questions * ANSWER
    return {"": training, "before": measured, "eval": measured}


def _iteration_weights(config: LoopConfig, resolution: int) -> dict[str, float]:
    tokens = _tokens(resolution)
    evaluation = DRAW * (config.evaluation.prompts + 4 * config.evaluation.diversity) * tokens
    pairs = config.preference.count * config.preference.samples
    overlapped = config.runs_dpo and config.dpo.min_pairs is not None
    reward = config.learned_reward.recipe
    weights = {
        Step.BEFORE: DRAW * config.evaluation.grid * tokens,
        Step.SFT: _training(config.sft.recipe, resolution),
        Step.ENCODE: 2 * SCORE * pairs * tokens,
        Step.SAMPLE: DRAW * pairs * tokens,
        Step.PROPOSE: SCORE * pairs * tokens,
        Step.PAIR: (2 * SCORE + (DRAW if overlapped else 0)) * pairs * tokens,
        Step.DPO: 2 * _training(config.dpo.recipe, resolution),
        Step.CONTROL: _training(config.dpo.recipe, resolution),
        Step.REWARD: TRAIN * reward.steps * reward.batch * ANSWER,
    }
    images = config.rl.recipe.steps / config.rl.updates * config.rl.prompts * config.rl.group
    scales = schedule_for(resolution)[: config.rl.credit_scales]
    online = _training(config.rl.recipe, resolution) * token_count(scales) / tokens + DRAW * images * tokens
    evaluated = (Step.AFTER_SFT, Step.AFTER_CONTROL, Step.AFTER_DPO, *(f"after_{method}" for method in ONLINE))
    found = weights | dict.fromkeys(ONLINE, online) | dict.fromkeys(evaluated, evaluation)
    return {str(step): weight for step, weight in found.items()}

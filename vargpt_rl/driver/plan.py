"""The steps that a run will take, in order, each with a rough weight for the time left: tokens passed through."""

from configs.schema import LoopConfig
from learners.config import Recipe
from learners.methods import ONLINE
from vargpt_rl.driver.session import Step
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.stages import ALIGN, STAGES, Learns

TRAIN, DRAW, SCORE = 3.0, 2.0, 1.0
"""Cost of a token by what is done with it, in forward passes; drawing decodes images too."""
ANSWER = 100.0
"""Tokens of a question."""


def planned_steps(config: LoopConfig) -> dict[str, float]:
    """Return the steps of a run by name, as ``vargpt_rl.driver.run`` records them, with their weights."""
    steps: dict[str, float] = {"adapter": 0.0} if config.adapter.is_on else {}
    answering = config.evaluation.questions * ANSWER
    for name in config.stages:
        if name != ALIGN:
            resolution = STAGES[name].resolutions(config.resolutions)[0]
            steps |= _stage_steps(name, config.at_resolution(resolution), resolution)
            continue
        if "understanding" not in config.stages:
            steps["understands/before"] = answering
        for k in range(config.iterations):
            resolution = config.resolutions[min(k, len(config.resolutions) - 1)]
            found = _iteration_steps(config.at_resolution(resolution), resolution)
            steps |= {f"iter-{k:02d}/{step}": weight for step, weight in found.items()}
        steps["understands/after"] = answering
    return steps


def _tokens(resolution: int) -> int:
    return token_count(schedule_for(resolution))


def _training(recipe: Recipe, resolution: int) -> float:
    return TRAIN * recipe.steps * recipe.batch * _tokens(resolution)


def _stage_steps(name: str, config: LoopConfig, resolution: int) -> dict[str, float]:
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
    steps = {f"{name}/before": measured} if edits else {}
    steps |= {name: training, f"{name}/swap": 0.0, f"{name}/eval": measured}
    return steps | ({f"{name}/grid": 0.0} if edits else {})


def _iteration_steps(config: LoopConfig, resolution: int) -> dict[str, float]:
    tokens = _tokens(resolution)
    measured = DRAW * config.evaluation.prompts * tokens
    measured += 4 * DRAW * config.evaluation.diversity * tokens
    pairs = config.preference.count * config.preference.samples
    overlapped = config.runs_dpo and config.dpo.min_pairs is not None
    making: dict[str, float] = {} if overlapped else {Step.SAMPLE: DRAW * pairs * tokens, Step.JUDGE: 0.0}
    making[Step.PAIR] = (2 * SCORE + (DRAW if overlapped else 0)) * pairs * tokens
    steps: dict[str, float] = {Step.BEFORE: DRAW * config.evaluation.grid * tokens}
    if config.align.sft:
        steps |= {Step.SFT: _training(config.sft.recipe, resolution), Step.SFT_SWAP: 0.0}
    steps[Step.AFTER_SFT] = measured
    for method in config.align.methods:
        if method == "dpo":
            steps |= making | {Step.DPO: 2 * _training(config.dpo.recipe, resolution)}
            if config.dpo.control:
                control = _training(config.dpo.recipe, resolution)
                steps |= {Step.CONTROL: control, Step.CONTROL_SWAP: 0.0, Step.AFTER_CONTROL: measured}
            steps |= {Step.DPO_SWAP: 0.0, Step.AFTER_DPO: measured}
        elif method == "reward":
            needs_pairs = config.learned_reward.table is None and not overlapped
            steps |= {name: weight for name, weight in making.items() if needs_pairs and name not in steps}
            recipe = config.learned_reward.recipe
            steps[Step.REWARD] = TRAIN * recipe.steps * recipe.batch * ANSWER
        else:
            assert method in ONLINE
            images = config.rl.recipe.steps / config.rl.updates * config.rl.prompts * config.rl.group
            scales = schedule_for(resolution)[: config.rl.credit_scales]
            training = _training(config.rl.recipe, resolution) * token_count(scales) / tokens + DRAW * images * tokens
            steps |= {method: training, f"{method}_swap": 0.0, f"after_{method}": measured}
    return {str(name): weight for name, weight in steps.items()} | {str(Step.GRID): 0.0}

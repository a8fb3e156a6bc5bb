"""Settings of a run that need each other: ValueError for those that do not go together.

Ranges of single settings stand in the types of their fields; here are conditions on several.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from configs.stages import SupervisedStage
from learners.config import Recipe
from learners.methods import ONLINE
from rewards.config import PreferenceConfig
from rewards.preferences import HUMAN
from vargpt_rl.common.dtypes import chosen_dtype
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.stages import ALIGN, RUN_STAGES, STAGES, Learns, stages_of

if TYPE_CHECKING:
    from configs.schema import LoopConfig


def check_together(config: "LoopConfig") -> None:
    """ValueError for settings that do not go together, whatever the resolution and the machine."""
    _check_stages(config)
    _check_iterations(config)
    _check_own_pairs(config)
    _check_asked(config)
    _check_data(config)
    _check_recipes(config)
    _check_overlap(config)
    _check_learned(config)
    _check_online(config)
    _check_adapter(config)
    if config.reward.path and config.evaluation.reward == config.reward:
        raise ValueError(f"evaluation.reward.path={config.reward.path}: that is the training reward, expected another")


def _check_stages(config: "LoopConfig") -> None:
    if not config.stages:
        raise ValueError(f"stages=[]: expected some of {list(RUN_STAGES)}")
    if config.stages != sorted(set(config.stages), key=RUN_STAGES.index):
        raise ValueError(f"stages={config.stages}: expected in the order {list(RUN_STAGES)}, each at most once")


def _check_iterations(config: "LoopConfig") -> None:
    if not config.resolutions or config.iterations < len(config.resolutions):
        raise ValueError(
            f"iterations={config.iterations} with resolutions={config.resolutions}: expected at least as many "
            f"iterations as resolutions (further ones repeat the last)"
        )


def _check_own_pairs(config: "LoopConfig") -> None:
    """ValueError for what does not go with pairs that came from files, or needs them."""
    if config.preference.pairs is None:
        if config.data.kind == "pairs":
            raise ValueError("preference.pairs is not set: data=pairs needs it")
        if config.runs_dpo and not config.align.sft:
            raise ValueError(
                "align.sft=false with align.methods containing dpo: its samples are from SFT's checkpoints; "
                "expected align.sft=true or preference.pairs=..."
            )
        return
    if ALIGN not in config.stages or not config.align.learns_pairs:
        raise ValueError(f"preference.pairs with align.methods={config.align.methods}: expected dpo or reward in it")
    if config.preference.builder != PreferenceConfig.builder:
        raise ValueError(f"preference.builder={config.preference.builder} with preference.pairs, which has no samples")
    if config.dpo.min_pairs is not None:
        raise ValueError(
            f"dpo.min_pairs={config.dpo.min_pairs} with preference.pairs, which are all there: leave it out"
        )


def _check_asked(config: "LoopConfig") -> None:
    """ValueError for what does not go with pairs that people label."""
    if not (config.preference.asks_people and ALIGN in config.stages and config.align.learns_pairs):
        return
    if config.dpo.min_pairs is not None:
        raise ValueError(f"dpo.min_pairs={config.dpo.min_pairs} with {HUMAN}, which waits for people: leave it out")
    if config.preference.samples < 2 and not config.preference.uses_winners:
        raise ValueError(
            f"preference.samples={config.preference.samples}: {HUMAN} compares samples of a prompt, expected at "
            "least 2, or +preference.options.against=winners"
        )


def _check_data(config: "LoopConfig") -> None:
    """ValueError for what the stages need and the kind of data lacks."""
    winners = {"preference.winners": config.preference.winners} if config.needs_winners else {}
    if config.data.kind in ("captioned", "pairs"):
        for stage in stages_of(config.stages):
            if stage.learns in (Learns.QUESTIONS, Learns.EDITS):
                lacking = "questions" if stage.learns is Learns.QUESTIONS else "edited images"
                raise ValueError(
                    f"stages: {stage.name} needs {lacking}, which data={config.data.kind} lacks; leave it out"
                )
    if config.data.kind == "captioned":
        needed = {"data.captions": config.data.captions, "data.images": config.data.images} | winners
        _check_set(needed, f"data=captioned needs {', '.join(needed)}")
    if config.data.kind == "records":
        config.data.records()
        for stage in stages_of(config.stages):
            if stage.learns is Learns.IMAGES:
                raise ValueError(
                    f"stages: {stage.name} needs images that can be chosen, which data=records, a stream, has not; "
                    f"leave it out and start from a checkpoint that needs none"
                )
        for resolution in config.resolutions:
            tokens = token_count(schedule_for(resolution))
            if config.data.max_tokens <= tokens:
                raise ValueError(f"data.max_tokens={config.data.max_tokens}: an image of {resolution} px has {tokens}")
        if ALIGN in config.stages:
            needed = {"preference.prompts": config.preference.prompts} | winners
            _check_set(needed, f"with data=records the iterations need {' and '.join(needed)}")


def _check_set(needed: dict[str, str | None], why: str) -> None:
    for key, value in needed.items():
        if value is None:
            raise ValueError(f"{key} is not set: {why}")


def _check_recipes(config: "LoopConfig") -> None:
    """ValueError for a batch that the ranks of a stage cannot share, and for parts that a stage cannot freeze."""
    for key, name, frozen in (
        ("sft", "sft", config.sft.frozen),
        ("dpo", "dpo", config.dpo.frozen),
        ("rl", "dpo", config.rl.frozen),
    ):
        try:
            STAGES[name].without(frozen)
        except ValueError as error:
            raise ValueError(f"{key}.frozen={frozen}: {error}") from error
    for stage in stages_of(config.stages):
        if stage.learns is Learns.IMAGES or stage.name in config.align.left_out:
            continue
        _check_recipe(config, stage.block)
        if stage.learns is Learns.QUESTIONS and config.data.kind != "records":
            _check_drawing_share(config, stage.block)


def _check_recipe(config: "LoopConfig", block: str) -> None:
    recipe: Recipe = getattr(config, block).recipe
    try:
        recipe.accumulation(config.learner.ranks)
        recipe.check_options()
    except ValueError as error:
        raise ValueError(f"{block}.recipe: {error}") from error


def _check_drawing_share(config: "LoopConfig", block: str) -> None:
    settings: SupervisedStage = getattr(config, block)
    size = settings.recipe.micro_batch
    drawings = round(settings.drawing_share * size)
    if settings.questions and 0 < settings.drawing_share < 1 and drawings in (0, size):
        raise ValueError(
            f"{block}.drawing_share={settings.drawing_share}: that is {drawings} of {block}.recipe.micro_batch="
            f"{size}, expected a share of both drawings and questions"
        )


def _check_overlap(config: "LoopConfig") -> None:
    if config.dpo.min_pairs is None or not config.runs_dpo:
        return
    if config.dpo.min_pairs < config.dpo.recipe.batch:
        raise ValueError(
            f"dpo.min_pairs={config.dpo.min_pairs}: expected at least dpo.recipe.batch={config.dpo.recipe.batch}, "
            "or null"
        )
    if config.placement.is_colocated:
        raise ValueError("dpo.min_pairs is for placement=split: in colocated, workers and ranks take turns")


def _check_learned(config: "LoopConfig") -> None:
    """ValueError for what a learned reward lacks."""
    methods = config.align.methods
    if "reward" not in methods or ALIGN not in config.stages:
        return
    _check_recipe(config, "learned_reward")
    if config.learned_reward.table is not None:
        return
    if config.preference.pairs is not None:
        return
    if not config.align.sft:
        raise ValueError(
            "align.sft=false with align.methods containing reward: the samples of its pairs are from SFT's "
            "checkpoints; expected learned_reward.table=... or align.sft=true"
        )
    before_dpo = methods.index("reward") < (methods.index("dpo") if "dpo" in methods else 0)
    if before_dpo and config.dpo.min_pairs is not None:
        raise ValueError(f"align.methods={methods} with dpo.min_pairs: expected dpo before reward, or no dpo.min_pairs")
    pairs = config.preference.count * config.preference.samples
    if pairs * (1 - config.learned_reward.held_out) < config.learned_reward.recipe.batch:
        raise ValueError(
            f"preference.count={config.preference.count}: at most {pairs} pairs, of which "
            f"learned_reward.held_out={config.learned_reward.held_out} are not trained on; expected at least "
            f"learned_reward.recipe.batch={config.learned_reward.recipe.batch} to train on"
        )


def _check_online(config: "LoopConfig") -> None:
    """ValueError for what online RL lacks."""
    if not config.runs_rl:
        return
    if config.reward.path is None and config.align.unlearned:
        raise ValueError(
            f"align.methods={config.align.methods}: {config.align.unlearned[0]} needs reward.path=... "
            f"or the method reward before it"
        )
    if config.rl.staleness and config.placement.is_colocated:
        raise ValueError("rl.staleness=1 is for placement=split: in colocated, workers and ranks take turns")
    _check_recipe(config, "rl")
    if config.rl.recipe.ema is not None and config.rl.guard.validate_every is not None:
        raise ValueError(
            f"rl.recipe.ema={config.rl.recipe.ema:g} with rl.guard.validate_every: the result is the average or the "
            f"weights of the best validation, expected one of them to be null"
        )
    images = config.rl.prompts * config.rl.group
    if config.rl.recipe.batch < images:
        raise ValueError(
            f"rl.recipe.batch={config.rl.recipe.batch}: expected at least rl.prompts x rl.group = {images}, the "
            "images of an update"
        )
    if config.rl.recipe.steps % config.rl.updates:
        raise ValueError(
            f"rl.recipe.steps={config.rl.recipe.steps}: expected a multiple of rl.updates={config.rl.updates}"
        )
    completions = config.rl.completions
    if completions > 1 and (config.rl.group % completions or config.rl.group == completions):
        raise ValueError(
            f"rl.group={config.rl.group}: expected a multiple of rl.completions={completions}, and more than one prefix"
        )
    for method in config.align.online:
        compared = ONLINE[method].compared(config.rl, config.rl.group)
        if compared and config.rl.recipe.micro_batch % compared:
            raise ValueError(
                f"rl.recipe.micro_batch={config.rl.recipe.micro_batch}: {method} compares {compared} images of a "
                f"group with each other (rl.pairs={config.rl.pairs}), expected a multiple of that"
            )


def _check_adapter(config: "LoopConfig") -> None:
    """ValueError for what cannot train as an adapter."""
    if not config.adapter.is_on:
        return
    for block, stored in (("dpo", config.dpo.stored_states), ("rl", config.rl.stored_states)):
        if stored:
            raise ValueError(
                f"{block}.stored_states=true with an adapter: expected adapter=none, or {block}.stored_states=false"
            )
    for stage in stages_of(config.stages):
        if stage.learns is Learns.IMAGES:
            raise ValueError(
                f"stages: {stage.name} trains the image tokenizer, which takes no adapter; leave it out or use "
                f"adapter=none"
            )
    for block, runs in (("dpo", config.runs_dpo), ("rl", config.runs_rl)):
        if runs and config.adapter.scores_in_learner and getattr(config, block).recipe.zero == 3:
            raise ValueError(
                f"adapter.reference=learner with {block}.recipe.zero=3, which splits the weights: expected zero 0, "
                f"1 or 2, or adapter.reference=workers"
            )
    for block in config.recipes:
        if config.adapter.four_bit and getattr(config, block).recipe.zero == 3:
            raise ValueError(
                f"adapter.four_bit={config.adapter.four_bit} with {block}.recipe.zero=3, which splits the weights: "
                f"expected zero 0, 1 or 2"
            )
    if "reward" in config.align.methods and ALIGN in config.stages:
        raise ValueError(
            "align.methods containing reward with an adapter: a learned reward trains whole weights, expected "
            "adapter=none"
        )


def check_schedule(config: "LoopConfig", resolution: int) -> None:
    """ValueError for a prefix of scales longer than the schedule of a resolution."""
    scales = len(schedule_for(resolution))
    trained = {"dpo": config.dpo.credit_scales} if config.runs_dpo else {}
    trained |= {"rl": config.rl.credit_scales} if config.runs_rl else {}
    for block, prefix in trained.items():
        if prefix is not None and prefix > scales:
            raise ValueError(
                f"{block}.credit_scales={prefix}: expected 1 to {scales}, the scales of an image of {resolution} px"
            )
    left = min(config.rl.credit_scales or scales, scales)
    if config.runs_rl and config.rl.completions > 1 and config.rl.prefix_scales >= left:
        raise ValueError(
            f"rl.prefix_scales={config.rl.prefix_scales}: expected fewer than the {left} trained scales of an image "
            f"of {resolution} px"
        )


def check_devices(config: "LoopConfig", on_gpu: bool) -> None:
    """ValueError for settings that need GPUs, or bitsandbytes, where there is none, at any resolution."""
    for pixels in dict.fromkeys(config.resolutions):
        _check_devices_at(config.at_resolution(pixels), on_gpu)


def _check_devices_at(config: "LoopConfig", on_gpu: bool) -> None:
    for block in config.recipes:
        optimizer = getattr(config, block).recipe.optimizer
        if optimizer != "adamw":
            _check_bitsandbytes(f"{block}.recipe.optimizer={optimizer}", on_gpu, "adamw")
    if config.adapter.is_on and config.adapter.four_bit:
        _check_bitsandbytes(f"adapter.four_bit={config.adapter.four_bit}", on_gpu, "[]")
        if chosen_dtype(config.dtype, on_gpu) != torch.bfloat16:
            raise ValueError(f"dtype={config.dtype} with adapter.four_bit={config.adapter.four_bit}: expected bf16")


def _check_bitsandbytes(setting: str, on_gpu: bool, expected: str) -> None:
    if not on_gpu:
        raise ValueError(f"{setting}: bitsandbytes is used on GPUs, of which there are none; expected {expected}")
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{setting}: bitsandbytes is not installed here; pip install 'vargpt-rl[qlora]' brings it")

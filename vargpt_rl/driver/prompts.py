"""Held-out prompts and edits of a run, always the same and with the same seeds."""

from vargpt_rl.data.samples import Prompt, Record
from vargpt_rl.driver.seeds import Purpose, seeds_for
from vargpt_rl.driver.session import StageContext


def held_out_prompts(context: StageContext, count: int) -> list[Prompt]:
    """Return ``count`` held-out prompts, or as many as there are."""
    return context.source.prompts("held_out", count, context.config.seed)


def held_out_edits(context: StageContext, count: int) -> list[Prompt]:
    """Return ``count`` held-out edits; none if the source has none."""
    return [record.prompt for record in edit_records(context, "held_out", count, context.config.seed)]


def held_out_seeds(context: StageContext, count: int) -> list[int]:
    """Return the seeds with which held-out prompts are drawn."""
    return seeds_for(count, context.config.seed, Purpose.HELD_OUT)


def edit_records(context: StageContext, split: str, count: int, seed: int) -> list[Record]:
    """Return edits as records: the prompt is the instruction and shows the image to edit, its id is the target."""
    side = context.config.data.seen_side
    return [
        Record(edit.after, Prompt(edit.after, edit.instruction, "", edit.before, side), edit.after)
        for edit in context.source.edits(count, seed, split)
    ]

"""Held-out prompts and edits of a run, always the same and with the same seeds."""

from vargpt_rl.data.samples import Prompt, Record
from vargpt_rl.driver.seeds import Purpose, seeds_for
from vargpt_rl.driver.session import StageContext


def held_out_prompts(it: StageContext, count: int) -> list[Prompt]:
    """Return ``count`` held-out prompts, or as many as there are."""
    return it.source.prompts("held_out", count, it.config.seed)


def held_out_edits(it: StageContext, count: int) -> list[Prompt]:
    """Return ``count`` held-out edits; none if the source has none."""
    return [record.prompt for record in edit_records(it, "held_out", count, it.config.seed)]


def held_out_seeds(it: StageContext, count: int) -> list[int]:
    """Return the seeds with which held-out prompts are drawn."""
    return seeds_for(count, it.config.seed, Purpose.HELD_OUT)


def edit_records(it: StageContext, split: str, count: int, seed: int) -> list[Record]:
    """Return edits as records: the prompt is the instruction and shows the image to edit, its id is the target."""
    side = it.config.data.seen_side
    return [
        Record(edit.after, Prompt(edit.after, edit.instruction, "", edit.before, side), edit.after)
        for edit in it.source.edits(count, seed, split)
    ]

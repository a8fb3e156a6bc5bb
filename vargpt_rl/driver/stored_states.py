"""The language model's states of an iteration's pairs, where ``dpo.stored_states`` has the workers store them.

They are written while pairs are scored (`vargpt_rl.driver.pairs`) and deleted when DPO is recorded.
"""

from pathlib import Path

from actors.worker import PromptedBits, Worker
from vargpt_rl.data.preferences import prompts_of, read_table
from vargpt_rl.data.samples import Probe
from vargpt_rl.data.states import states_path
from vargpt_rl.driver.session import StageContext


def complete_states(context: StageContext, folder: Path, probe: Probe) -> None:
    """Have the workers, which hold the reference, store the states of the probe, and of pairs that lack them.

    Those of a DPO that is redone are gone. Notes what all take on disk.
    """
    size = context.config.dpo.recipe.micro_batch
    context.pool.run(Worker.score, [(probe.prompt, probe.bits)], context.resolution, 1.0, folder)
    if context.table().exists():  # else pairs are still being made
        context.pool.run(
            Worker.score, _lacking(context, folder, size), context.resolution, 1.0, folder, batch_size=2 * size
        )
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    context.run.note(f"dpo.stored_states: {len(sizes)} images in {folder}, {sum(sizes) / 1e9:.3g} GB")


def _lacking(context: StageContext, folder: Path, size: int) -> list[PromptedBits]:
    """Return the images of micro-batches of pairs that lack a file, in the order in which pairs are scored."""
    table = read_table(context.table())
    pairs = list(zip(prompts_of(table), table.chosen_bits, table.rejected_bits, strict=True))
    items: list[PromptedBits] = []
    for at in range(0, len(pairs), size):
        group = pairs[at : at + size]
        images = [(prompt, bits) for prompt, bits, _ in group] + [(prompt, bits) for prompt, _, bits in group]
        if not all(states_path(folder, (prompt.text, prompt.reply, bits)).exists() for prompt, bits in images):
            items += images
    return items

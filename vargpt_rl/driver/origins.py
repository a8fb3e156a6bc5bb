"""Fingerprints of what a run reads from elsewhere, so that a change between two of its starts is noticed."""

from pathlib import Path

from configs.schema import LoopConfig
from vargpt_rl.driver.inputs import Inputs
from vargpt_rl.driver.run import Run
from vargpt_rl.storage.adapter import base_hash
from vargpt_rl.storage.export import files_beside_weights
from vargpt_rl.storage.files import content_hash, digest

MODEL = "checkpoint"


def fingerprints(config: LoopConfig, inputs: Inputs) -> dict[str, str]:
    """Return a hash of the starting model and of each file that a key of the settings names, by key."""
    model = Path(inputs.model)
    beside = [digest(file) for file in files_beside_weights(model)]
    named = {
        "data.captions": config.data.captions if config.data.kind == "captioned" else None,
        "preference.prompts": config.preference.prompts,
        "preference.pairs": config.preference.pairs,
        "learned_reward.table": config.learned_reward.table,
    }
    files = {key: digest(Path(name)) for key, name in named.items() if name and Path(name).is_file()}
    return {MODEL: content_hash(" ".join([base_hash(model), *beside]).encode()), **files}


def check_origins(run: Run, config: LoopConfig, inputs: Inputs) -> None:
    """Compare what the run reads with what it read when it was begun, and record it.

    ValueError for another starting model, whose weights would be mixed with those that the run has trained. Other files
    that changed are noted: later steps read them as they are now.
    """
    known, found = run.state.get("origins", {}), fingerprints(config, inputs)
    changed = [key for key in found if known.get(key, found[key]) != found[key]]
    if MODEL in changed and run.state["steps"]:
        raise ValueError(
            f"checkpoint={config.checkpoint}: files of {inputs.model} have changed since {run.directory} was begun: "
            "put back those, or give this run another name=..."
        )
    run.state["origins"] = found
    run.save()
    for key in changed:
        if run.state["steps"]:
            run.note(f"{key} has changed since the last start: later steps read it as it is now")

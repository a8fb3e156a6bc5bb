"""Files of exported models that say how they were made and how to draw with them."""

from dataclasses import replace

from configs.schema import LoopConfig
from vargpt_rl.model.drawing_defaults import FILE, read_defaults, with_defaults
from vargpt_rl.stages import STAGES, Learns


def generation_files(config: LoopConfig, start: str, resolution: int) -> dict[str, dict]:
    """Return the JSON files of a model of this run, which begins with ``start``: what images are sampled with."""
    known = read_defaults(start)
    sampling = config.at_resolution(resolution).sampling
    edits = any(name in STAGES and STAGES[name].learns is Learns.EDITS for name in config.stages)
    defaults = replace(
        known,
        resolution=resolution,
        cfg=sampling.cfg,
        tau=sampling.tau,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        edits=edits or known.edits,
    )
    return {FILE: with_defaults(start, defaults)}

"""Files of exported models that say how they were made and how to draw with them."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from rich.table import Table

from configs.schema import LoopConfig
from vargpt_rl.driver.report import closing_table, stage_table, without_empty_columns
from vargpt_rl.model.adapter import AdapterConfig
from vargpt_rl.model.drawing_defaults import FILE, read_defaults, with_defaults
from vargpt_rl.page.contents import CONFIG
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


CARD = """\
---
{data}
---

# {name}

A unified visual autoregressive model: it writes text token by token and draws images scale by scale. Aligned with
vargpt_rl from `{base}`.

    vargpt-rl draw PROMPT checkpoint=DIR
    vargpt-rl chat checkpoint=DIR

{grid}
## Training

- Data: {kind}
- Stages: {stages}; {iterations} at {resolutions} px, by {methods}
- Reward: {reward}
- Weights: {weights}
- All settings: `config.yaml`; `vargpt-rl run` with them repeats the run

{results}
## Limits

Scores are of the held-out prompts of one run and one seed; those at different resolutions are not comparable. The model
draws what its training images show; it has no filter for prompts or images.
"""


def markdown(table: Table) -> str:
    """Return a table for the terminal as one of Markdown."""
    rows = [[str(column.header) for column in table.columns], ["---"] * len(table.columns)]
    rows += [list(map(str, cells)) for cells in zip(*(column.cells for column in table.columns), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _heading(table: Table) -> str:
    title = str(table.title)
    return title[:1].upper() + title[1:]


def _trained(adapter: AdapterConfig) -> str:
    """Say in a card what trained."""
    if not adapter.is_on:
        return "the model's own, in the parts that each stage trains"
    parts = ", ".join(adapter.targets)
    return f"a low-rank adapter of rank {adapter.rank} of {parts}, merged here; alone in the run's `adapter/`"


def write_card(folder: Path, directory: Path, config: LoopConfig, summary: dict) -> None:
    """Write the model card of a ``folder`` in a run's directory, with the run's settings and its last sample grid."""
    shutil.copy(directory / CONFIG, folder / CONFIG)
    grids = sorted(path for path in directory.glob("samples/iter-*.png") if not path.stem.endswith("-pairs"))
    if grids:
        shutil.copy(grids[-1], folder / "samples.png")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", config.checkpoint) and not Path(config.checkpoint).exists()
    data = ModelCardData(
        base_model=config.checkpoint if on_hub else None,
        library_name="vargpt_rl",
        pipeline_tag="any-to-any",
        tags=["vargpt", "text-to-image", *config.align.methods],
    )
    tables = [
        *([stage_table(summary["stages"])] if summary["stages"] else []),
        *([closing_table(summary)] if summary["iterations"] else []),
    ]
    text = CARD.format(
        data=data.to_yaml(),
        name=directory.name,
        base=config.checkpoint,
        grid="![Held-out prompts, each row a moment of the run](samples.png)\n" if grids else "",
        kind=config.data.kind,
        stages=", ".join(config.stages),
        iterations="1 iteration" if config.iterations == 1 else f"{config.iterations} iterations",
        resolutions=", ".join(map(str, config.resolutions)),
        methods=", ".join(config.align.methods),
        reward=f"`{config.reward.path}`" if config.reward.path else "none",
        weights=_trained(config.adapter),
        results="\n".join(f"## {_heading(table)}\n\n{markdown(without_empty_columns(table))}" for table in tables),
    )
    ModelCard(text).save(folder / "README.md")

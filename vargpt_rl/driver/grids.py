"""Images for people: rows of the sample grid, collected during an iteration, and small images kept for the page."""

from pathlib import Path

import pandas as pd

from actors.worker import PromptedBits, Worker
from learners.methods import METHODS
from vargpt_rl.data.preferences import prompts_of
from vargpt_rl.data.samples import Sample
from vargpt_rl.driver.prompts import held_out_edits, held_out_prompts
from vargpt_rl.driver.session import StageContext, Step
from vargpt_rl.evaluate.grid import compose
from vargpt_rl.evaluate.thumbnails import Illustrated
from vargpt_rl.storage.files import atomic_dir, remove_dir
from vargpt_rl.storage.images import PAIRS, images_folder, pair_image


def write_row(context: StageContext, label: str, samples: list[Sample]) -> None:
    """Write samples as the row ``label`` of the current grid."""
    names = [_cell(label, i) for i in range(len(samples))]
    _write_images(context, [(sample.prompt, sample.bits) for sample in samples], _rows(context), names)


def sample_grid(context: StageContext) -> dict:
    """Compose the iteration's grid: the rows written so far, and the winners."""
    prompts = held_out_prompts(context, context.config.evaluation.grid)
    winners = [key for prompt in prompts if (key := context.source.winner_key(prompt))]
    aligned = [f"after_{method}" for method in METHODS]
    starts = [Step.BEFORE, Step.AFTER_SFT] if context.config.align.sft else [Step.BEFORE]  # else they are the same
    labels = [*starts, Step.CONTROL, *aligned, "winner"]
    sources = {"winner": winners} if len(winners) == len(prompts) else {}
    return compose_grid(context, labels, [prompt.text for prompt in prompts], sources)


def edit_grid(context: StageContext) -> dict:
    """Compose the grid of edits: the images shown, the edits before and after the stage, the targets."""
    prompts = held_out_edits(context, min(context.config.evaluation.grid, context.config.evaluation.edits))
    if not prompts:
        return {}
    sources = {"shown": [str(prompt.shown) for prompt in prompts], "target": [prompt.id for prompt in prompts]}
    return compose_grid(context, ["shown", "before", "after", "target"], [prompt.text for prompt in prompts], sources)


def compose_grid(context: StageContext, labels: list[str], captions: list[str], sources: dict[str, list[str]]) -> dict:
    """Compose the rows written under ``labels``, and ``sources``: rows of the data source's own images by key."""
    path = _rows(context).with_suffix(".png")
    result = {"path": str(path.relative_to(context.run.directory))}
    if not _rows(context).exists():
        return result  # the run was interrupted after composing it
    for label, keys in sources.items():
        for i, key in enumerate(keys):
            context.source.load(key, context.resolution).save(_rows(context) / _cell(label, i))
    rows = {label.replace("_", " "): sorted(_rows(context).glob(f"{label}-*.png")) for label in labels}
    compose({label: files[: len(captions)] for label, files in rows.items() if files}, captions, path)
    context.run.log_images(path)
    remove_dir(_rows(context))
    return result


def show_pairs(context: StageContext, pairs: pd.DataFrame, kind: str = PAIRS) -> None:
    """Keep the images of rows of a preference table for the run's page, and show the rows in wandb.

    ``kind`` names the images: `PAIRS`, or those that people are asked about.
    """
    if pairs.empty:
        return
    prompts = prompts_of(pairs)
    shown = pairs[["prompt"]].copy()
    images: dict[str, bytes] = {}
    for side in ("rejected", "chosen"):
        items = list(zip(prompts, pairs[f"{side}_bits"], strict=True))
        seen = context.pool.run(Worker.check, items, context.resolution, Illustrated(None))
        names = [pair_image(name, side) for name in pairs.pair_id]
        images |= dict(zip(names, (image for _, image in seen), strict=True))
        shown[side] = [images_folder(context.run.directory, context.name, kind) / name for name in names]
        for what in ("reward", "source", "version"):
            shown[f"{side} {what}"] = pairs[f"{side}_{what}"]
        shown[f"{side} reference log-prob"] = pairs[f"reference_{side}_logp"]
    shown["reference version"] = pairs.reference_version
    write_images(context, kind, images)
    context.run.log_table(f"{kind}/table", shown, context.labels)


def write_images(context: StageContext, moment: str, images: dict[str, bytes]) -> list[str]:
    """Write small images by file name, in a folder that is complete or not there; return the paths within the run."""
    if not images:
        return []
    target = images_folder(context.run.directory, context.name, moment)
    with atomic_dir(target) as folder:
        for name, content in images.items():
            (folder / name).write_bytes(content)
    return [str((target / name).relative_to(context.run.directory)) for name in images]


def _rows(context: StageContext) -> Path:
    """The folder in which the rows of the current grid are collected."""
    return context.run.directory / "samples" / context.name


def _cell(label: str, number: int) -> str:
    return f"{label}-{number:02d}.png"


def _write_images(context: StageContext, items: list[PromptedBits], folder: Path, names: list[str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return context.pool.run(Worker.write_images, list(zip(items, names, strict=True)), context.resolution, str(folder))

"""A run directory made by hand: settings, steps, metrics, verdicts with images, pairs. No model is involved."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from tests.helpers.preferences import row
from vargpt_rl.data.preferences import write_table
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.evaluate.paired import ScoredImage, read_scores, write_scores
from vargpt_rl.evaluate.thumbnails import thumbnail
from vargpt_rl.page.plan import expected_steps
from vargpt_rl.storage.images import PAIRS, images_folder, pair_image

CONFIG = {
    "name": "shown",
    "runs": "runs",
    "seed": 0,
    "checkpoint": "tiny",
    "stages": ["pretrain", "understanding", "align"],
    "iterations": 2,
    "resolutions": [64, 128],
    "data": {"kind": "shapes", "workers": 2},
    "align": {"sft": True, "methods": ["dpo", "grpo"]},
    "dpo": {"beta": 0.1, "control": True, "min_pairs": None},
    "learned_reward": {"table": None},
    "preference": {"pairs": None},
    "reward": {"path": "rewards.shapes:shapes_reward"},
}
MOMENTS = {"after_sft": 0.5, "control": 0.55, "after_dpo": 0.6, "after_grpo": 0.8}
"""Share of right images at each moment."""
BEGAN = 1_700_000_000.0
SOURCE = ShapesSource(ShapesConfig())


def make_run(
    folder: Path, prompts: int = 8, pairs: int = 4, done: int | None = None, texts: tuple[str, ...] = ()
) -> Path:
    """Write a run with ``done`` steps (None: all of them, and the summary); the first prompts are ``texts``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (folder / "defaults.yaml").write_text(yaml.safe_dump(CONFIG | {"seed": 1, "iterations": 1}, sort_keys=False))
    steps = expected_steps(CONFIG)
    state = {
        "steps": {step: {} for step in steps[:done]},
        "times": {step: [BEGAN + 5.0 * i, BEGAN + 5.0 * i + 4.0] for i, step in enumerate(steps[:done])},
        "events": ["worker 1 was restarted: it did not answer for 5 s"],
        "restarts": 1,
        "seconds": 5.0 * len(steps[:done]),
    }
    for k in range(2):
        if f"iter-0{k}/pair" in state["steps"]:
            state["steps"][f"iter-0{k}/pair"] = {
                "built": pairs,
                "dropped": 1,
                "dropped_by_reason": {"identical bits": 1},
            }
            write_pairs(folder, f"iter-0{k}", pairs)
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    for number, (moment, share) in enumerate(MOMENTS.items()):
        for k in range(2):
            if f"iter-0{k}/{'after_control' if moment == 'control' else moment}" in state["steps"]:
                write_verdicts(folder, f"iter-0{k}", moment, held_out(prompts, share, number, texts))
    if done is None:
        best = [{"path": "best/128", "metric": "after_grpo.overall", "value": 0.8, "iteration": 1, "resolution": 128}]
        (folder / "summary.json").write_text(json.dumps({"status": "complete", "best": best}))
    return folder


def held_out(count: int, share: float, seed: int, texts: tuple[str, ...] = ()) -> list[ScoredImage]:
    """Return scored images of held-out prompts, a ``share`` of them right."""
    found = []
    check = SOURCE.image_check()
    draws = np.random.default_rng(seed).random(count)
    for i, prompt in enumerate(SOURCE.prompts("held_out", count, 0)):
        image = ScoredImage(
            prompt_id=prompt.id,
            prompt=texts[i] if i < len(texts) else prompt.text,
            seed=i,
            score=float(draws[i] < share),
            reward=float(draws[i] < share),
            skill=check.skills([prompt])[0],
            reason="" if draws[i] < share else "expected 1 things, found 2",
        )
        found.append(image)
    return found


def write_verdicts(folder: Path, stage: str, moment: str, images: list[ScoredImage]) -> None:
    """Write the verdicts of a moment, with an image each: the caption's scene, or another one where it is wrong."""
    known = {prompt.id: prompt.text for prompt in SOURCE.prompts("held_out", len(images), 0)}
    place = images_folder(folder, stage, moment)
    place.mkdir(parents=True, exist_ok=True)
    kept = []
    for i, image in enumerate(images):
        caption = known[image.prompt_id] if image.score else "a small grey cross"
        drawn = SOURCE.load(f"commercial/{i}/{caption if image.score else known[images[i - 1].prompt_id]}", 64)
        (place / f"{i:04d}.webp").write_bytes(thumbnail(drawn))
        kept.append(replace(image, image=str((place / f"{i:04d}.webp").relative_to(folder))))
    write_scores(folder / "evaluations" / f"{stage}-{moment}.jsonl", kept)


def illustrate(folder: Path) -> None:
    """Add images and skills to a run whose verdicts have none."""
    for path in sorted((folder / "evaluations").glob("*.jsonl")):
        stage, moment = path.stem[:7], path.stem[8:]
        images = read_scores(path)
        skills = SOURCE.image_check().skills(SOURCE.prompts("held_out", len(images), 0))
        write_verdicts(folder, stage, moment, [replace(i, skill=s) for i, s in zip(images, skills, strict=True)])


def write_pairs(folder: Path, stage: str, count: int) -> None:
    """Write a preference table with the images of both sides."""
    rows = []
    place = images_folder(folder, stage, PAIRS)
    place.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(SOURCE.prompts("train", count, 0)):
        rows.append(row(f"pair{i}", prompt=prompt.text, chosen_reward=1.0, rejected_reward=float(i % 2)))
        for seed, side in enumerate(("chosen", "rejected")):
            drawn = SOURCE.load(f"{('commercial', 'corpus')[seed]}/{2 * i + seed}/{prompt.text}", 64)
            (place / pair_image(f"pair{i}", side)).write_bytes(thumbnail(drawn))
    (folder / "preferences").mkdir(exist_ok=True)
    write_table(folder / "preferences" / f"{stage}.parquet", rows)


def metrics() -> list[dict]:
    """Return lines of metrics as a run logs them."""
    lines = []
    for k, size in enumerate(CONFIG["resolutions"]):
        labels = {"iteration": k, "resolution": size}
        at = BEGAN + 100 * k
        for step in range(1, 21):
            base = {"time": at + step, **labels, "step": step}
            lines += [
                base | {"stage": "sft", "loss": 1.0 / step + 0.5, "bit_accuracy": 0.9, "data_wait": 0.2},
                base
                | {
                    "stage": "dpo",
                    "loss": 0.69 / step,
                    "rewards/margins": 0.2 * step,
                    "rewards/accuracies": min(1.0, 0.4 + 0.2 * step),
                    "logps/chosen": -100.0 - step,
                    "logps/rejected": -100.0 - 3 * step,
                    "rewards/margins/scale_0": 0.01 * step,
                    "rewards/margins/scale_1": 0.1 * step,
                },
            ]
        for step in range(4):
            lines.append(
                {"time": at + 30 + step, **labels, "stage": "grpo/rollout", "step": step}
                | {"reward": 0.5 + 0.1 * step, "diversity": 0.2, "groups/drawn": 10, "groups/equal": 2 * step}
            )
        counts = {"reward_margin/counts": [1, 3, 2], "reward_margin/edges": [-1.0, 0.0, 1.0, 2.0]}
        summary = {"reward_margin/mean": 0.5, "reward_margin/positive": 0.8}
        scales = {"reference_margin/scale_0": 0.5, "reference_margin/scale_1": -1.5}
        sources = {"source/chosen/commercial": 1.0, "source/rejected/iter-00-sft/final": 1.0}
        lines.append({"time": at + 40, **labels, "stage": "pairs", "step": k, **counts, **summary, **scales, **sources})
        lines.append({"time": at + 41, **labels, "stage": "swap", "step": k, "seconds": 0.2})
    return lines

"""Runs of a study, and the scores of their held-out images, without any training."""

from pathlib import Path

from vargpt_rl.driver.run import Run
from vargpt_rl.evaluate.paired import ScoredImage, write_scores


def scored(scores: list[float]) -> list[ScoredImage]:
    """Held-out images with these scores."""
    return [
        ScoredImage(prompt_id=f"p{i}", prompt=f"{i + 1} red circles", seed=i, score=score)
        for i, score in enumerate(scores)
    ]


def begun(directory: Path) -> Path:
    """A run that has been through its samples, without the training."""
    run = Run(directory, {"name": "dpo"})
    for name in ("understands/before", "iter-00/before", "iter-00/sft", "iter-00/after_sft", "iter-00/sample"):
        run.step(name, lambda name=name: {"did": name})
    weights = directory / "checkpoints/iter-00-sft/final"
    weights.mkdir(parents=True)
    (weights / "weights.safetensors").write_bytes(b"weights")
    (directory / "preferences").mkdir()
    for split in ("", "-held-out"):
        (directory / f"preferences/iter-00{split}.parquet").write_bytes(b"pairs")
    write_scores(directory / "evaluations/iter-00-after_sft.jsonl", scored([0.0, 1.0]))
    return directory

"""A run that is killed between the parts of its long work ends as if nothing had been, and repeats no finished part.

Really killed, but without a cluster (see ``tests.helpers.one_process``).
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.driver.test_faults import same
from tests.driver.test_interrupted import go
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl.storage.checkpoint import check_checkpoint

SETTINGS = (
    "rollout.keep_every=4",
    "preference.count=16",
    "evaluation.prompts=8",
    "evaluation.diversity=0",
    "reward.path=rewards.technical:sharpness",
    "dpo.control=false",
)
POINTS = {
    "evaluation": "images/0",
    "sampling": "sampler-1-all/0",
    "winners": "winners-all/8",
    "judging": "rewards-samples/12",
    "reference scoring": "scores-iter-00/4",
    "margins": "scores-chosen/0",
}
"""Parts, by what is done in them, in the order in which a run comes to them."""
KEPT = ("generate_images", "encode", "reward", "score")
"""Methods of workers whose results are kept in parts."""


def work_done(folder: Path, name: str) -> Counter[str]:
    """Count the items of the workers' finished calls over all starts of a run, by method."""
    lines = map(json.loads, (folder / f"{name}-calls.jsonl").read_text().splitlines())
    counts: Counter[str] = Counter()
    for method, count in lines:
        counts[method] += count
    return Counter({method: counts[method] for method in KEPT})


@pytest.mark.timeout(900)
def test_a_run_killed_between_parts_repeats_none_and_ends_the_same(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    go(tmp_path, "undisturbed", "end", settings=SETTINGS)
    points = [f"parts/iter-00/{part}" for part in POINTS.values()]
    go(tmp_path, "killed", *points, "end", settings=SETTINGS)
    events = same(tmp_path / "killed", tmp_path / "undisturbed")
    assert len(events) == len(points) and all(event.startswith("resuming after ") for event in events)
    assert work_done(tmp_path, "killed") == work_done(tmp_path, "undisturbed")
    for stage in ("iter-00-sft", "iter-00-dpo"):
        whole, killed = (
            load_file(check_checkpoint(tmp_path / name / "checkpoints" / stage / "final"))
            for name in ("undisturbed", "killed")
        )
        assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())
    assert not list((tmp_path / "killed/parts").glob("*")), "parts go with the record of their step"

"""Learning a reward from pairs: whole jobs of both families, and one that resumes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from learners.config import LearnedRewardConfig, LearnerConfig, Recipe
from learners.jobs import RewardJob, training_checkpoints
from learners.reward import train_parts
from rewards.learned import LearnedReward
from tests.helpers.forks import ForkedRanks
from vargpt_rl.data.reward_pairs import RewardPair, write_pairs_file
from vargpt_rl.model.reward_model import HEAD
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint
from vargpt_rl.storage.reward_base import describe_reward, load_reward_model

STEPS, CUT = 12, 8
COLOURS = ("red", "green", "blue", "yellow")
RECIPE = Recipe(steps=STEPS, batch=4, micro_batch=2, lr=3e-3, schedule="constant", warmup_ratio=0.0)


def pairs_in(folder: Path) -> Path:
    """Pairs in which the image of the prompt's colour is chosen over another."""
    folder.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    pairs = [RewardPair(f"a {a} square", f"{a}.png", f"{b}.png") for a in COLOURS for b in COLOURS if a != b]
    write_pairs_file(folder, pairs)
    return folder


def learned(checkpoint: Path, pairs: Path, output: Path) -> tuple[dict, list[dict], dict]:
    """The result, the log and the weights of a job, which resumes from what is in ``output``."""
    job = RewardJob(
        start=Policy(str(checkpoint)),
        pairs=pairs,
        recipe=RECIPE,
        reward=LearnedRewardConfig(),
        output=output,
        seed=0,
    )
    with ForkedRanks(LearnerConfig(ranks=1, save_every=CUT)) as ranks:
        result = ranks.run(job, lambda line: None)
    lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return result, [line for line in lines if "loss" in line], load_file(check_checkpoint(output / "final"))


@pytest.mark.timeout(900)
def test_a_reward_is_learned_and_exported(family, tmp_path):
    pairs = pairs_in(tmp_path / "pairs")
    result, lines, weights = learned(family.checkpoint, pairs, tmp_path / "whole")
    assert result["steps"] == STEPS and "probe" not in result
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3), "the head starts at 0"
    assert all(math.isfinite(line["loss"]) for line in lines) and 0 <= result["train_accuracy"] <= 1
    before = load_file(f"{family.checkpoint}/model.safetensors")
    assert weights[HEAD].any()
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in weights.items() if name != HEAD) > 5
    describe_reward(tmp_path / "whole/final", Policy(str(family.checkpoint)), {})
    scores = LearnedReward(str(tmp_path / "whole/final"))([Image.new("RGB", (64, 64), "red")], ["a red square"])
    assert len(scores) == 1 and math.isfinite(scores[0])


@pytest.mark.timeout(900)
def test_a_cut_job_resumes_bitwise(checkpoint, tmp_path):
    pairs = pairs_in(tmp_path / "pairs")
    _, lines, weights = learned(checkpoint, pairs, tmp_path / "whole")
    shutil.copytree(training_checkpoints(tmp_path / "whole"), training_checkpoints(tmp_path / "resumed"))
    _, rest, resumed = learned(checkpoint, pairs, tmp_path / "resumed")
    assert [line["step"] for line in rest] == list(range(CUT + 1, STEPS + 1))
    assert [line["loss"] for line in rest] == [line["loss"] for line in lines[CUT:]]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        ([], (HEAD,)),
        (["vision_projector"], (HEAD, "model.visual.merger.")),
        (["language_model"], (HEAD, "model.language_model.")),
    ],
)
def test_only_the_named_parts_and_the_head_train(checkpoint, parts, prefixes):
    model = load_reward_model(Policy(str(checkpoint)), torch.float32)
    trained = train_parts(model, LearnedRewardConfig(trains=parts))
    assert all(name.startswith(prefixes) for name in trained) and HEAD in trained
    assert len(trained) > len(parts)

"""Learned rewards on disk: the base that they stand on, and what differs from it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from rewards.learned import LearnedReward
from rewards.testing import PROMPTS, images
from vargpt_rl.model.families import load_model
from vargpt_rl.model.reward_model import HEAD, is_generation
from vargpt_rl.storage.checkpoint import Policy, save_checkpoint
from vargpt_rl.storage.reward_base import (
    base_hash,
    check_understanding,
    describe_reward,
    load_reward_model,
    read_base,
    understanding_tensors,
)

TRAINED = "model.language_model.norm.weight"


@pytest.fixture
def reward(family, tmp_path):
    """A learned reward: a head of ones, and one trained tensor of the language model."""
    start = shutil.copytree(family.checkpoint, tmp_path / "start")
    model = load_model(start, torch.float32)
    policy = Policy(str(start), (save_checkpoint(tmp_path / "sft", dict_of(model, "projector_in")),))
    own = {HEAD: torch.ones(1, model.config.text_config.hidden_size), TRAINED: model.state_dict()[TRAINED] * 2}
    folder = save_checkpoint(tmp_path / "reward", own)
    describe_reward(folder, policy, {"pairs": 3})
    return folder


def dict_of(model, prefix):
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}


def test_the_base_is_found_and_verified(reward):
    base = read_base(reward)
    assert [path.name for path in base.policy.weights] == ["sft"]
    assert base.hash == json.loads((reward / "reward.json").read_text())["base_blake2b"]


def test_a_moved_run_still_finds_its_base(reward, tmp_path):
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    shutil.copytree(tmp_path, moved)
    shutil.rmtree(tmp_path / "start")
    assert read_base(moved / "reward").policy.model.startswith(str(moved))
    with pytest.raises(ValueError, match="its base .* is missing"):
        read_base(reward)
    assert read_base(reward, str(moved / "start")).hash == read_base(moved / "reward").hash


def test_another_base_is_refused(reward, tmp_path):
    base = read_base(reward).policy
    name = next(name for name in understanding_tensors(base) if name.startswith("model.language_model.layers"))
    other = load_model(base.model, torch.float32).state_dict()[name] + 1
    save_checkpoint(tmp_path / "sft", {name: other})
    with pytest.raises(ValueError, match=r"reward\.json: the base .* was trained on other weights"):
        LearnedReward(str(reward))


def test_the_hash_leaves_out_what_was_trained_and_what_draws(reward):
    policy = read_base(reward).policy
    assert base_hash(policy, [TRAINED]) == base_hash(Policy(policy.model), [TRAINED]) != base_hash(policy, [])
    assert not any(map(is_generation, understanding_tensors(policy)))


def test_a_damaged_reward_is_refused(reward):
    (reward / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="corrupt"):
        LearnedReward(str(reward))
    with pytest.raises(ValueError, match="incomplete"):
        LearnedReward(str(reward.parent))


def test_an_untrained_reward_scores_all_alike(reward):
    model = load_reward_model(Policy(read_base(reward).policy.model), torch.float32)
    assert not dict(model.named_parameters())[HEAD].any()
    assert not any(is_generation(name) for name, _ in model.named_parameters())


def test_scores_do_not_depend_on_the_batch(reward):
    together = LearnedReward(str(reward))(images(), PROMPTS)
    alone = LearnedReward(str(reward), batch_size=1)(images(), PROMPTS)
    assert together == pytest.approx(alone, abs=1e-4) and len(set(together)) > 1
    assert LearnedReward(str(reward))([], []) == []


def test_a_model_that_only_draws_is_refused(checkpoint, tmp_path):
    check_understanding(str(checkpoint))
    save_file({"image_decoder.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it has no language model"):
        check_understanding(str(tmp_path))

"""Learned rewards on disk, and the hash of the weights that they stand on.

A learned reward is a checkpoint (`vargpt_rl.storage.checkpoint`) of the tensors that its training changed, the head
included, with ``reward.json`` beside it: the policy whose understanding half it continues, as paths relative to the
folder, and a hash of those of its tensors that training left as they were.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vargpt_rl.model.families import family_of, load_config
from vargpt_rl.model.reward_model import HEAD, REWARD_MODELS, is_generation
from vargpt_rl.model.unified import Unified
from vargpt_rl.storage.checkpoint import WEIGHTS, Policy, check_checkpoint, load_weights_into
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.sharded import Stored, read_json, stored_in, stored_in_folder

DESCRIPTION = "reward.json"


@dataclass(frozen=True)
class RewardBase:
    """The policy under a learned reward, and the blake2b ``hash`` of its tensors that are not in the reward's own."""

    policy: Policy
    hash: str


def understanding_tensors(policy: Policy) -> dict[str, Stored]:
    """List the tensors of a policy's understanding half; the last weight set that has a tensor gives it."""
    tensors = dict(stored_in_folder(Path(policy.model)))
    for weights in policy.weights:
        tensors |= stored_in(check_checkpoint(weights))
    return {name: stored for name, stored in tensors.items() if not is_generation(name)}


def check_understanding(model: str) -> None:
    """ValueError unless a model directory has the weights of a language model and of a vision tower."""
    names = stored_in_folder(Path(model)).keys()
    for part, prefixes in (("language model", ("model.language_model.",)), ("vision tower", VISION_TOWERS)):
        if not any(name.startswith(prefixes) for name in names):
            raise ValueError(f"{model}: it has no {part}, and a learned reward needs an understanding half")


VISION_TOWERS = ("model.visual.", "model.vision_tower.")


def base_hash(policy: Policy, trained: Iterable[str]) -> str:
    """Hash names, shapes, dtypes and bytes of the understanding half, without the tensors in ``trained``."""
    own = set(trained)
    hashed = hashlib.blake2b(digest_size=16)
    for name, stored in sorted(understanding_tensors(policy).items()):
        if name not in own:
            hashed.update(f"{name} {tuple(stored.shape)} {stored.dtype}\n".encode())
            hashed.update(stored.read().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def describe_reward(directory: Path, policy: Policy, notes: dict) -> None:
    """Make a checkpoint of trained tensors a learned reward of ``policy``; ``notes`` say what it was trained on."""
    tensors = stored_in(check_checkpoint(directory))
    here = directory.resolve()
    described = {
        "model": os.path.relpath(Path(policy.model).resolve(), here),
        "weights": [os.path.relpath(weights.resolve(), here) for weights in policy.weights],
        "base_blake2b": base_hash(policy, tensors),
        **notes,
    }
    write_atomically(directory / DESCRIPTION, json.dumps(described, indent=1).encode())


def read_base(directory: Path, model: str | None = None) -> RewardBase:
    """Read and verify the base of a learned reward; ``model`` is its start model's directory, if that has moved.

    ValueError, naming the file, if the reward is incomplete or damaged, or its base is missing or not the same.
    """
    check_checkpoint(directory)
    path = directory / DESCRIPTION
    described = read_json(path)
    if missing := {"model", "weights", "base_blake2b"} - described.keys():
        raise ValueError(f"{path}: {min(missing)} is missing")
    here = directory.resolve()
    start = Path(model) if model else here / described["model"]
    if not (start / "config.json").is_file():
        raise ValueError(f"{path}: its base {start} is missing; expected the directory of the model it was trained on")
    policy = Policy(str(start), tuple(Path(os.path.normpath(here / weights)) for weights in described["weights"]))
    found = base_hash(policy, stored_in(directory / WEIGHTS))
    if found != described["base_blake2b"]:
        raise ValueError(
            f"{path}: the base {start} has hash {found}, expected {described['base_blake2b']}: "
            f"this reward was trained on other weights"
        )
    return RewardBase(policy, found)


def load_reward_model(policy: Policy, dtype: torch.dtype) -> Unified:
    """Load a policy's understanding half as a reward model; without trained weights of its own, every score is 0."""
    kind = REWARD_MODELS[family_of(load_config(policy.model)).model]
    model = kind.from_pretrained(policy.model, dtype=dtype)
    with torch.no_grad():
        dict(model.named_parameters())[HEAD].zero_()
    load_weights_into(model, policy.weights, ignored=is_generation)
    return model

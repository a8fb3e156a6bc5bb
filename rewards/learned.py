"""A reward learned from preference pairs, on the understanding half of the model that it judges.

``align.methods=[reward,...]`` trains one (`vargpt_rl.driver.learned`); its folder is a plug-in for any other run:

    reward.path=rewards.learned:LearnedReward +reward.options.path=runs/NAME/checkpoints/iter-00-reward/final
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from vargpt_rl.data.reward_pairs import reward_inputs
from vargpt_rl.inference.conversation import device_and_dtype
from vargpt_rl.model.families import markup_for
from vargpt_rl.model.prompt import ChatTemplate
from vargpt_rl.model.unified import Unified
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.reward_base import load_reward_model, read_base


class LearnedReward:
    """Scores images by a learned reward: a number without bounds, about 0 on average; only differences mean something.

    ``path``: folder of the reward. ``base``: directory of the model that it was trained on, if that has moved.
    ValueError if the folder is incomplete or damaged, or the base is missing or has other weights.
    """

    def __init__(
        self, path: str, base: str | None = None, batch_size: int = 32, device: str = "auto", dtype: str = "auto"
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more")
        device_and_dtype(device, dtype)  # raises if there is no such device
        folder = Path(path).resolve()
        self.policy = read_base(folder, base).policy.plus(folder)
        self.batch_size = batch_size
        self.place = device, dtype

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        pairs = list(zip(images, prompts, strict=True))
        scores: list[float | None] = []
        for at in range(0, len(pairs), self.batch_size):
            shown, asked = zip(*pairs[at : at + self.batch_size], strict=True)
            scores += _scores(self.policy, self.place, list(shown), list(asked))
        return scores


@torch.inference_mode()
def _scores(
    policy: Policy, place: tuple[str, str], images: list[Image.Image], prompts: list[str]
) -> list[float | None]:
    model, chat = _load(policy, *place)
    inputs = {name: tensor.to(model.device) for name, tensor in reward_inputs(chat, images, prompts).items()}
    return model(**inputs).logits[:, 0].tolist()


@cache
def _load(policy: Policy, device: str, dtype: str) -> tuple[Unified, ChatTemplate]:
    place, kind = device_and_dtype(device, dtype)
    model = load_reward_model(policy, kind).to(place).eval()
    return model, markup_for(policy.model, model.config)

"""HPSv2 and ImageReward from checkpoints in their published layouts, with small random tensors.

The numbers are what the published code (hpsv2 1.2.0 with open_clip 3.3.0; image-reward 1.5) makes of the same tensors,
images and token ids. HPSv3 is its authors' package, for which something with the same interface stands in here.
"""

import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rewards.hps import HPSv2, HPSv3
from rewards.image_reward import ImageReward
from rewards.testing import PROMPTS, check_reward, images
from tests.helpers.tiny_reward_models import blip_settings, clip_settings, image_reward_state, open_clip_state

HPS = [-0.08580099, -0.21145894, -0.13665631, -0.15836266, -0.25259274]
IMAGE_REWARD = [-0.65956235, -0.66029680, -0.66518456, -0.66517210, -0.65289867]


def test_hps_scores_as_published(tmp_path):
    clip_settings(tmp_path)
    torch.save({"epoch": 1, "state_dict": open_clip_state()}, tmp_path / "hps.pt")
    assert HPSv2(str(tmp_path / "hps.pt"), str(tmp_path))(images(), PROMPTS) == pytest.approx(HPS, abs=1e-6)
    check_reward("rewards.hps:HPSv2", weights=str(tmp_path / "hps.pt"), base=str(tmp_path))


def test_hps_pads_what_is_not_square(tmp_path):
    clip_settings(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in open_clip_state().items()}, tmp_path / "hps.safetensors")
    reward = HPSv2(str(tmp_path / "hps.safetensors"), str(tmp_path))
    tall, padded = Image.new("RGB", (16, 32), "red"), Image.new("RGB", (32, 32))
    padded.paste(tall, (8, 0))
    assert reward([tall], ["a"]) == pytest.approx(reward([padded], ["a"]), abs=1e-6)


def test_image_reward_scores_as_published(tmp_path):
    blip_settings(tmp_path)
    save_file(image_reward_state(), tmp_path / "reward.safetensors")
    reward = ImageReward(str(tmp_path / "reward.safetensors"), str(tmp_path))
    assert reward(images(), PROMPTS) == pytest.approx(IMAGE_REWARD, abs=1e-6)
    check_reward("rewards.image_reward:ImageReward", weights=str(tmp_path / "reward.safetensors"), base=str(tmp_path))


def test_checkpoints_of_other_models_are_rejected(tmp_path):
    clip_settings(tmp_path)
    state = open_clip_state()
    del state["visual.proj"]
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(RuntimeError, match=r"visual_projection\.weight"):
        HPSv2(str(tmp_path / "half.pt"), str(tmp_path))(images()[:1], PROMPTS[:1])


PACKAGE = """
import torch

class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
        self.settings = checkpoint_path, device

    def reward(self, prompts, image_paths):
        assert all(image.mode == "RGB" for image in image_paths) and self.settings == (None, "cpu")
        rows = [[image.getpixel((0, 0))[0] / 10, 1.0] for image, prompt in zip(image_paths, prompts, strict=True)]
        return torch.tensor(rows)  # mean and spread
"""


def test_hpsv3_returns_its_packages_means(tmp_path, monkeypatch):
    (tmp_path / "hpsv3.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hpsv3", raising=False)
    images = [Image.new("RGBA", (8, 8), (shade, 0, 0, 255)) for shade in (20, 100)]
    assert HPSv3(device="cpu")(images, ["a", "b"]) == pytest.approx([2, 10])
    check_reward("rewards.hps:HPSv3", device="cpu")


def test_hpsv3_names_the_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hpsv3", None)
    with pytest.raises(ValueError, match="missing.safetensors: no such file"):
        HPSv3(str(tmp_path / "missing.safetensors"))
    with pytest.raises(ImportError, match="pip install hpsv3"):
        HPSv3(device="mps")([Image.new("RGB", (8, 8))], ["a"])

"""CLIP scorers on a tiny random model in the published layout, against the same model called directly."""

import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from rewards.clip import Aesthetic, ClipScore, PickScore, load_clip
from rewards.testing import PROMPTS, check_reward, images
from tests.helpers.tiny_reward_models import EMBED, clip_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def outputs(folder):
    """The whole model's outputs for the images and prompts, by the library's own forward."""
    clip = load_clip(folder, folder, "cpu")
    rows = clip.tokenizer(PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pixels = clip.pixels(images(), return_tensors="pt").pixel_values
    with torch.inference_mode():
        return clip.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, pixel_values=pixels)


def test_clip_score_is_the_cosine(folder, outputs):
    expected = torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
    assert ClipScore(folder)(images(), PROMPTS) == pytest.approx(expected.tolist(), abs=1e-5)
    assert len({round(value, 3) for value in expected.tolist()}) == len(PROMPTS)


def test_pick_score_is_the_models_own_logit(folder, outputs):
    scores = PickScore(folder, folder)(images(), PROMPTS)
    assert scores == pytest.approx(outputs.logits_per_image.diagonal().tolist(), abs=1e-4)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_aesthetic_heads_of_several_layers(folder, outputs, tmp_path, suffix):
    layers = {0: torch.nn.Linear(EMBED, 8), 2: torch.nn.Linear(8, 4), 10: torch.nn.Linear(4, 1)}
    state = {
        f"layers.{i}.{name}": value.data for i, layer in layers.items() for name, value in layer.named_parameters()
    }
    file = tmp_path / f"head.{suffix}"
    torch.save(state, file) if suffix == "pth" else save_file(state, file)
    with torch.inference_mode():
        expected = layers[10](layers[2](layers[0](normalize(outputs.image_embeds, dim=-1))))[:, 0].tolist()
    assert Aesthetic(str(file), folder)(images(), PROMPTS) == pytest.approx(expected, abs=1e-5)


def test_aesthetic_heads_of_one_layer(folder, outputs, tmp_path):
    torch.save({"weight": torch.ones(1, EMBED), "bias": torch.tensor([0.5])}, tmp_path / "head.pth")
    expected = (outputs.image_embeds.sum(-1) + 0.5).tolist()
    assert Aesthetic(str(tmp_path / "head.pth"), folder)(images(), PROMPTS) == pytest.approx(expected, abs=1e-5)


class EvilWeights:
    def __reduce__(self):
        return print, ("code in a file of weights was run",)


def test_bad_weights_files_are_named(folder, tmp_path, capsys):
    first, prompts = images()[:1], PROMPTS[:1]
    with pytest.raises(ValueError, match=r"none\.pth: there is no such weights file"):
        Aesthetic(str(tmp_path / "none.pth"), folder)(first, prompts)
    torch.save({"layers.0.weight": torch.ones(2, EMBED), "layers.0.bias": torch.ones(2)}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match="end in one number"):
        Aesthetic(str(tmp_path / "two.pth"), folder)(first, prompts)
    torch.save({"weight": EvilWeights()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        Aesthetic(str(tmp_path / "evil.pth"), folder)(first, prompts)
    assert "was run" not in capsys.readouterr().out


def test_missing_weights_are_rejected(folder, tmp_path):
    model = load_clip(folder, folder, "cpu").model
    state = {name: value for name, value in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"1 weights are missing, e\.g\. visual_projection\.weight"):
        ClipScore(str(tmp_path))(images()[:1], PROMPTS[:1])


def test_they_keep_the_contract(folder, tmp_path):
    torch.save({"weight": torch.ones(1, EMBED), "bias": torch.tensor([0.5])}, tmp_path / "head.pth")
    check_reward("rewards.clip:ClipScore", model=folder)
    check_reward("rewards.clip:PickScore", model=folder, processor=folder)
    check_reward("rewards.clip:Aesthetic", head=str(tmp_path / "head.pth"), model=folder)
    with pytest.raises(ValueError, match="expected one prompt per image, got 1 images and 2 prompts"):
        ClipScore(folder)([Image.new("RGB", (9, 9))], ["a", "b"])

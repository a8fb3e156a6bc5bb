"""Rewards by CLIP models: prompt alignment (CLIP score), human choice (PickScore), looks (aesthetic predictor).

``model`` is a directory, or the name of a model in the hub's local cache. Prompts are truncated to the text model's
length (77 tokens). Models are loaded at the first call, once per process.
"""

from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from rewards.weights import linear_head, read_weights

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Clip:
    """A CLIP model with the tokenizer and image processor of ``processor``; features have norm 1."""

    def __init__(self, model: CLIPModel, processor: str, device: str):
        self.model = model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(processor)
        # Published scores were computed with Pillow's resampling.
        self.pixels = AutoImageProcessor.from_pretrained(processor, backend="pil")

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features [B, D] of images."""
        pixels = self.pixels([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        return self.features(pixels)

    def features(self, pixels: Tensor) -> Tensor:
        """Features [B, D] of preprocessed images."""
        return normalize(self.model.get_image_features(pixels.to(self.model.device)).pooler_output, dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Features [B, D] of prompts."""
        length = self.model.config.text_config.max_position_embeddings
        rows = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        rows = rows.to(self.model.device)
        return normalize(self.model.get_text_features(rows.input_ids, rows.attention_mask).pooler_output, dim=-1)


@cache
def load_clip(model: str, processor: str, device: str) -> Clip:
    """Load a CLIP model. ValueError if weights are missing."""
    loaded, info = CLIPModel.from_pretrained(model, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{model}: {len(info['missing_keys'])} weights are missing, e.g. {min(info['missing_keys'])}")
    return Clip(loaded, processor, device)


def clip_from_state(state: dict[str, Tensor], processor: str, device: str) -> Clip:
    """A CLIP model with the config of ``processor`` and exactly these weights."""
    model = CLIPModel(CLIPConfig.from_pretrained(processor))
    model.load_state_dict(state)
    return Clip(model, processor, device)


class ClipScore:
    """The cosine of image and prompt, in [-1, 1]; the CLIP score as usually reported is 100 times that."""

    def __init__(self, model: str = CLIP_L, device: str = "cpu"):
        self.model, self.device = model, device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        return [] if not images else cosines(load_clip(self.model, self.model, self.device), images, prompts).tolist()


class PickScore:
    """PickScore: the cosine times the model's own scale. Of two images of a prompt, people prefer the higher one.

    The published model uses another model's processor.
    """

    def __init__(self, model: str = "yuvalkirstain/PickScore_v1", processor: str = CLIP_H, device: str = "cpu"):
        self.model, self.processor, self.device = model, processor, device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        if not images:
            return []
        clip = load_clip(self.model, self.processor, self.device)
        return (clip.model.logit_scale.exp() * cosines(clip, images, prompts)).tolist()


class Aesthetic:
    """Aesthetic score, about 1 to 10, independent of the prompt: linear layers on CLIP's image features.

    ``head`` is a weights file, safetensors or .pth: a published head of the LAION aesthetic predictors, of one or
    several layers, with the CLIP model it was trained on.
    """

    def __init__(self, head: str, model: str = CLIP_L, device: str = "cpu"):
        self.head, self.model, self.device = head, model, device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        if not images:
            return []
        clip = load_clip(self.model, self.model, self.device)
        return _load_head(self.head, self.device)(clip.image_features(images))[:, 0].tolist()


def cosines(clip: Clip, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Cosines [B] of each image with its own prompt. ValueError if the lengths differ."""
    check_lengths(images, prompts)
    return (clip.image_features(images) * clip.texts(prompts)).sum(-1)


def check_lengths(images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """ValueError unless there are as many prompts as images."""
    if len(images) != len(prompts):
        raise ValueError(f"expected one prompt per image, got {len(images)} images and {len(prompts)} prompts")


@cache
def _load_head(path: str, device: str) -> nn.Sequential:
    return linear_head(read_weights(path)).to(device)

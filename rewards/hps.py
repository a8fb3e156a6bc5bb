"""Human preference scores.

HPSv2 is a CLIP ViT-H/14, loaded from the published open_clip checkpoint. HPSv3 is a Qwen2-VL-7B with a head, run by its
authors' package, which needs torchvision and more: best in a separate environment (a term's ``python``).
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from rewards.clip import CLIP_H, Clip, check_lengths, clip_from_state
from rewards.weights import read_weights, rename

# open_clip's names -> those of transformers.
NAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)
IN_BLOCKS = {".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}


class HPSv2:
    """HPSv2: the cosine of image and prompt, about 0.2 to 0.35. Of two images, people prefer the higher one.

    ``weights`` is the published checkpoint (``HPS_v2.1_compressed.pt``) or its safetensors version. ``base`` is a
    directory or cached hub name of the CLIP model it was trained from; only its config and tokenizer are read.
    """

    def __init__(self, weights: str, base: str = CLIP_H, device: str = "cpu"):
        self.weights, self.base, self.device = weights, base, device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        check_lengths(images, prompts)
        if not images:
            return []
        clip = _load(self.weights, self.base, self.device)
        side = clip.model.config.vision_config.image_size
        mean, std = (torch.tensor(values)[:, None, None] for values in (clip.pixels.image_mean, clip.pixels.image_std))
        pixels = torch.stack([(_fit(image, side) - mean) / std for image in images])
        return (clip.features(pixels) * clip.texts(prompts)).sum(-1).tolist()


class HPSv3:
    """HPSv3: the mean of its score's normal distribution, about 0 to 15. Needs the package ``hpsv3`` and a GPU.

    On CPUs the package (1.0.0) passes bfloat16 to its float32 head: it autocasts on CUDA only.

    ``weights`` is the published checkpoint (``HPSv3.safetensors``); without it the package downloads it from the hub.
    """

    def __init__(self, weights: str | None = None, device: str = "cuda"):
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"weights={weights}: no such file")
        self.weights, self.device = weights, device

    @torch.inference_mode()  # the package itself would record gradients
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        check_lengths(images, prompts)
        if not images:
            return []
        rgb_images = [image.convert("RGB") for image in images]
        # By name: the order of the two has changed between releases.
        scores_B2 = _load_v3(self.weights, self.device).reward(image_paths=rgb_images, prompts=list(prompts))
        return scores_B2[:, 0].tolist()


@cache
def _load_v3(weights: str | None, device: str):
    try:
        from hpsv3 import HPSv3RewardInferencer
    except ImportError as error:
        raise ImportError(
            "HPSv3 needs `pip install hpsv3`, best in a separate environment, named by the term's `python`"
        ) from error
    return HPSv3RewardInferencer(checkpoint_path=weights, device=device)


@cache
def _load(weights: str, base: str, device: str) -> Clip:
    return clip_from_state(from_open_clip(read_weights(weights)), base, device)


def _fit(image: Image.Image, side: int) -> Tensor:
    """[3, side, side] in 0 to 1: scaled so that the longer side is ``side``, padded with black."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"), np.float32) / 255).permute(2, 0, 1)
    height, width = (max(1, round(n * side / max(pixels.shape[1:]))) for n in pixels.shape[1:])
    if (height, width) != tuple(pixels.shape[1:]):
        pixels = interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    left, top = (side - width) // 2, (side - height) // 2
    return pad(pixels, (left, side - width - left, top, side - height - top))


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of an open_clip model to the names and layout of transformers."""
    converted = {}
    for name, tensor in state.items():
        name = rename(name, NAMES)
        if name in ("visual_projection.weight", "text_projection.weight"):
            tensor = tensor.T
        for old, new in IN_BLOCKS.items():
            name = name.replace(old, new)
        if ".attn.in_proj_" in name:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                converted[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = values
        else:
            converted[name.replace(".attn.", ".self_attn.")] = tensor
    return converted

"""ImageReward: BLIP with a head, trained on human rankings, from the published checkpoint."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BlipConfig, BlipTextModel, BlipVisionModel, CLIPImageProcessorPil

from rewards.clip import check_lengths
from rewards.weights import linear_head, read_weights, rename

BASE = "Salesforce/blip-itm-large-coco"
MAX_TOKENS = 35
# Of the scores on the training set, as published.
MEAN, STD = 0.16717363, 1.0333395
# Names of the published vision model -> those of transformers; all other names are the same.
VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.", "encoder.layers."),
)


class ImageReward:
    """ImageReward: alignment and quality in one number, with a mean of about 0 and a deviation of 1.

    ``weights`` is the published checkpoint (``ImageReward.pt``) or its safetensors version. ``base`` is a directory or
    cached hub name of a BLIP model of the same size; only its config and tokenizer are read. Prompts are truncated to
    35 tokens.
    """

    def __init__(self, weights: str, base: str = BASE, device: str = "cpu"):
        self.weights, self.base, self.device = weights, base, device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        check_lengths(images, prompts)
        if not images:
            return []
        return list(_load(self.weights, self.base, self.device).score(images, prompts))


class Blip:
    """The published model: a text model reads the prompt, attends to the image, and a head turns that into a number."""

    def __init__(self, state: dict[str, Tensor], base: str, device: str):
        config = BlipConfig.from_pretrained(base)
        vision, text = config.vision_config, config.text_config
        patches = state["blip.visual_encoder.pos_embed"].shape[1] - 1
        vision.image_size, vision.layer_norm_eps = math.isqrt(patches) * vision.patch_size, 1e-6
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.vision.load_state_dict(_part(state, "blip.visual_encoder.", VISION))
        parts = _part(state, "blip.text_encoder.")
        self.text.load_state_dict({k: v for k, v in parts.items() if k != "embeddings.position_ids"})
        self.head = linear_head(_part(state, "mlp."))
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        side = vision.image_size
        self.pixels = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self.device = device
        for module in (self.vision, self.text, self.head):
            module.to(device).eval()

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One number for each image and its prompt."""
        rows = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        pixels = self.pixels([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        seen = self.vision(pixels.to(self.device)).last_hidden_state
        read = self.text(
            rows.input_ids,
            attention_mask=rows.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        return ((self.head(read[:, 0])[:, 0] - MEAN) / STD).tolist()


@cache
def _load(weights: str, base: str, device: str) -> Blip:
    return Blip(read_weights(weights), base, device)


def _part(state: dict[str, Tensor], prefix: str, names: Sequence[tuple[str, str]] = ()) -> dict[str, Tensor]:
    """The tensors under a prefix, with the prefix removed and renamed."""
    return {rename(n.removeprefix(prefix), names): tensor for n, tensor in state.items() if n.startswith(prefix)}

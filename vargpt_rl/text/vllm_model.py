"""The model class that vLLM runs: its own Qwen2-VL, loaded from a checkpoint that also has a visual decoder.

Images go through the Pillow processor of `vargpt_rl.model.prompt` on every machine, so both engines see the same
pixels; vLLM's own processor needs torchvision and a video processor. Videos are not supported.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vargpt_rl.text.layout import is_text


class ImageProcessor:
    """The part of a processor that vLLM needs for images: pixels, grids, and placeholder tokens."""

    image_token, video_token = "<|image_pad|>", "<|video_pad|>"

    def __init__(self, folder: str):
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def __call__(self, images: list, **ignored: object) -> BatchFeature:
        return self.image_processor(images=images, return_tensors="pt")


class ImagesOnly(Qwen2VLProcessingInfo):
    """Processing info without videos."""

    @cached_property
    def _processor(self) -> ImageProcessor:
        return ImageProcessor(self.ctx.model_config.model)

    def get_hf_processor(self, **kwargs: object) -> ImageProcessor:
        return self._processor

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens()}


class DummyImages(Qwen2VLDummyInputsBuilder):
    """Dummy inputs for vLLM's profiling at start."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ImageProcessor.image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping) -> dict:
        width, height = self.info.get_image_size_with_most_features()
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count)}


@MULTIMODAL_REGISTRY.register_processor(Qwen2VLMultiModalProcessor, info=ImagesOnly, dummy_inputs=DummyImages)
class VargptText(Qwen2VLForConditionalGeneration):
    """The language model and the vision tower; other tensors of the checkpoint are not loaded."""

    supports_mm_device_do_normalize = False  # pixels are already normalised

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((name, tensor) for name, tensor in weights if is_text(name))

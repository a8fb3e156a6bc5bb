"""Chat template of v1: Vicuna's, as in LLaVA-1.5, with the special tokens of images.

The system sentence, then ``USER: ... ASSISTANT:`` and the answer with its ``eos``. Deviation from the published code,
whose training omits ``bos`` and whose sampling omits the system sentence: every conversation begins with both
(specification, section 3).
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from vargpt_rl.model.prompt import ChatTemplate, Part, ShownImage, VisionInputs
from vargpt_rl.model.v1.configuration import VargptV1Config

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class VicunaFormat(ChatTemplate):
    """Chat template of v1."""

    def __init__(self, path: str, config: VargptV1Config):
        super().__init__(path, config)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(path)
        self.end = self.tokenizer.eos_token_id
        self.between = []
        self.least_side = config.vision_config.image_size

    def system(self) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.text(SYSTEM)]

    def pieces(self, role: str, parts: Iterable[Part]) -> Iterator[tuple[list[int], bool]]:
        if role == "assistant":
            yield from self.content(parts)
            yield [self.end], True
            return
        # The tokenizer must read words and markup as one text, split only at images.
        for is_text, found in groupby(["USER: ", *parts, " ASSISTANT:"], lambda part: isinstance(part, str)):
            pieces = list(found)
            yield from self.content(["".join(map(str, pieces))] if is_text else pieces)

    def asked(self, text: str, image_grid_thw: torch.Tensor | None) -> list[Part]:
        """Make the parts of a user's turn: each image on its own line, as in LLaVA, then the words."""
        return [*(part for shown in self.shown(image_grid_thw) for part in (shown, "\n")), text]

    def user(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        return [id for ids, _ in self.pieces("user", self.asked(text, image_grid_thw)) for id in ids]

    def seen(self, features: int) -> list[int]:
        return [self.config.image_token_id] * features

    def shown(self, image_grid_thw: torch.Tensor | None) -> list[ShownImage]:
        return [ShownImage(int(grid.prod())) for grid in (() if image_grid_thw is None else image_grid_thw)]

    def vision_inputs(self, images: list[Image.Image], max_pixels: int | None = None) -> VisionInputs:
        """Resize all images to the vision tower's only size; ``max_pixels`` is ignored."""
        batch = self.image_processor(images=images, return_tensors="np")
        pixels = torch.from_numpy(np.asarray(batch["pixel_values"], np.float32))
        side = pixels.shape[-1] // self.config.vision_config.patch_size
        return VisionInputs(pixels, torch.tensor([[1, side, side]] * len(images)))

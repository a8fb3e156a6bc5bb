"""The chat markup of v1: Vicuna's, as LLaVA-1.5 was trained with it, and the special tokens of pictures.

The system sentence, then ``USER: ... ASSISTANT:`` and the answer with its ``eos``; a picture stands before the words of
its turn. Deviation from the published code, whose training leaves ``bos`` out and whose sampling leaves the system
sentence out: every conversation begins with both (specification, section 3).
"""

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from vargpt_rl.model.prompt import Markup, Pictures
from vargpt_rl.model.v1.configuration import VargptV1Config

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class VicunaFormat(Markup):
    """v1's markup."""

    def __init__(self, path: str, config: VargptV1Config):
        super().__init__(path, config)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(path)
        self.end = self.tokenizer.eos_token_id
        self.closing = [self.end]

    def system(self) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.text(SYSTEM)]

    def user(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        if image_grid_thw is None or not len(image_grid_thw):
            return self.text(f"USER: {text} ASSISTANT:")
        features = int(image_grid_thw.prod(1).sum())
        return [*self.text("USER: "), *[self.config.image_token_id] * features, *self.text(f"\n{text} ASSISTANT:")]

    def pictures(self, images: list[Image.Image]) -> Pictures:
        batch = self.image_processor(images=images, return_tensors="np")
        pixels = torch.from_numpy(np.asarray(batch["pixel_values"], np.float32))
        side = pixels.shape[-1] // self.config.vision_config.patch_size
        return Pictures(pixels, torch.tensor([[1, side, side]] * len(images)))

"""Text engine on transformers: always available, uses a model that is already in memory.

Shape legend: B requests, T positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import GenerationMixin

from vargpt_rl.model.prompt import ChatTemplate
from vargpt_rl.text.engine import TextRequest


class TransformersEngine:
    """Wraps a model of either family, or any language-and-vision model. All requests of a call form one batch."""

    def __init__(self, model: GenerationMixin, chat: ChatTemplate):
        self.model = model
        self.chat = chat

    @torch.inference_mode()
    def write(self, requests: Sequence[TextRequest], max_tokens: int, stops: Sequence[int]) -> list[list[int]]:
        inputs = self._inputs(requests)
        written_BT = self.model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # published checkpoints set one in generation_config.json
            eos_token_id=list(stops),
            pad_token_id=self.chat.tokenizer.pad_token_id,
        )[:, inputs["input_ids"].shape[1] :]
        return [_cut(row, stops) for row in written_BT.tolist()]

    @torch.inference_mode()
    def log_probs(self, requests: Sequence[TextRequest], tokens: Sequence[int]) -> list[list[float]]:
        logits_BV = self.model(**self._inputs(requests), logits_to_keep=1).logits[:, -1]
        return logits_BV.float().log_softmax(-1)[:, list(tokens)].tolist()

    def _inputs(self, requests: Sequence[TextRequest]) -> dict[str, torch.Tensor]:
        """Make a left-padded batch on the model's device."""
        images = [image for request in requests for image in request.images]
        vision = self.chat.vision_inputs(images) if images else None
        rows, first = [], 0
        for text, shown in requests:
            grids = vision.image_grid_thw[first : first + len(shown)] if vision and shown else None
            rows.append(self.chat.question(text, grids))
            first += len(shown)
        ids_BT = self.chat.pad(rows, "left")
        inputs = {
            "input_ids": ids_BT,
            "attention_mask": self.chat.pad([[1] * len(row) for row in rows], "left", value=0),
            "mm_token_type_ids": (ids_BT == self.chat.config.image_token_id).int(),
            **(vision._asdict() if vision else {}),
        }
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}


def _cut(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Cut after the first stop: the rest is padding of the batch."""
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]

"""Text by transformers: the engine that is always there, on a model that is in memory anyway.

Shape legend: B requests, T positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import GenerationMixin

from vargpt_rl.model.prompt import ChatTemplate
from vargpt_rl.text.engine import TextRequest


class TransformersEngine:
    """A VARGPT of either family, or the language-and-vision model that it is. All requests of a call are one batch."""

    def __init__(self, model: GenerationMixin, chat: ChatTemplate):
        self.model, self.chat = model, chat

    @torch.inference_mode()
    def write(self, requests: Sequence[TextRequest], max_tokens: int, stops: Sequence[int]) -> list[list[int]]:
        inputs = self._inputs(requests)
        written_BT = self.model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # published checkpoints bring one along
            eos_token_id=list(stops),
            pad_token_id=self.chat.tokenizer.pad_token_id,
        )[:, inputs["input_ids"].shape[1] :]
        return [_cut(row, stops) for row in written_BT.tolist()]

    @torch.inference_mode()
    def log_probs(self, requests: Sequence[TextRequest], tokens: Sequence[int]) -> list[list[float]]:
        logits_BV = self.model(**self._inputs(requests), logits_to_keep=1).logits[:, -1]
        return logits_BV.float().log_softmax(-1)[:, list(tokens)].tolist()

    def _inputs(self, requests: Sequence[TextRequest]) -> dict[str, torch.Tensor]:
        """A batch padded on the left, on the model's device."""
        images = [request.image for request in requests if request.image is not None]
        vision = self.chat.vision_inputs(images) if images else None
        grids = iter(vision.image_grid_thw.split(1) if vision else ())
        rows = [self.chat.question(text, None if image is None else next(grids)) for text, image in requests]
        ids_BT = self.chat.pad(rows, "left")
        inputs = {
            "input_ids": ids_BT,
            "attention_mask": self.chat.pad([[1] * len(row) for row in rows], "left", value=0),
            "mm_token_type_ids": (ids_BT == self.chat.config.image_token_id).int(),
            **(vision._asdict() if vision else {}),
        }
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}


def _cut(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Up to and including the first stop: what follows it in a batch is padding."""
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]

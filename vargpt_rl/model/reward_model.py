"""The understanding half of the model as a reward: prompt and shown image in, one number out.

The last state of the language model, after the opening of the assistant's turn, goes through a linear head
(VARGPT-v1.1, section 3.2.2, names reward modelling as the source of preferences). The generation half is left out.

Shape legend: B rows, T positions, H language-model width.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.unified import Unified
from vargpt_rl.model.v1.modeling import VargptV1

if TYPE_CHECKING:
    from vargpt_rl.model.unified import Unified as MixedInto
else:
    MixedInto = object

GENERATION = ("image_tokenizer", "projector_in", "projector_out", "image_decoder")
"""Parts of the generation half."""
HEAD = "reward_head.weight"
"""Name of the head's only tensor, [1, H]. A bias would add the same to both images of a pair."""


class _ScoresShownImages(MixedInto):
    """Mixin that replaces a family's generation half by a scalar head."""

    _keys_to_ignore_on_load_unexpected = [rf"^{part}\." for part in GENERATION]
    _keys_to_ignore_on_load_missing = [HEAD]

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        config.num_labels = 1
        for part in GENERATION:
            delattr(self, part)
        self.reward_head = nn.Linear(config.text_config.hidden_size, 1, bias=False)

    def forward(  # type: ignore[override]  # a reward model is never called as a plain model
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor,
        **ignored,
    ) -> SequenceClassifierOutput:
        """Score right-padded rows [B, T] that show images each: fp32 ``logits`` [B, 1]."""
        embeds_BTH = self.embed(input_ids, pixel_values.to(self.dtype), image_grid_thw)
        hidden_BTH = self.language_states(embeds_BTH, *self.layout(input_ids, attention_mask, image_grid_thw, None))
        rows_B = torch.arange(len(input_ids), device=input_ids.device)
        last_BH = hidden_BTH[rows_B, attention_mask.sum(1) - 1]
        return SequenceClassifierOutput(logits=self.reward_head(last_BH).float())


class VargptReward(_ScoresShownImages, Vargpt):
    """v1.1 as a reward."""


class VargptV1Reward(_ScoresShownImages, VargptV1):
    """v1 as a reward."""


REWARD_MODELS: dict[type[Unified], type[Unified]] = {Vargpt: VargptReward, VargptV1: VargptV1Reward}


def is_generation(name: str) -> bool:
    """Tell whether a tensor belongs to the generation half."""
    return name.startswith(tuple(f"{part}." for part in GENERATION))

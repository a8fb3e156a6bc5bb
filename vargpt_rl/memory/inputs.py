"""Batches and losses like those of training and rollout, for models on the meta device.

Shape legend: B rows.
"""

import torch
import torch.nn.functional as F

from vargpt_rl.model.likelihood import image_log_probs, symbol_log_probs
from vargpt_rl.model.prompt import IGNORED
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import Unified, replayed

TEXT_TOKENS = 128
"""Assumed length of a row's text: markup, prompt and reply."""


def batch(
    model: Unified,
    rows: int,
    images: int,
    resolution: int,
    seen_side: int = 0,
    text: int = TEXT_TOKENS,
    edits: bool = False,
    scales: int | None = None,
) -> dict[str, torch.Tensor]:
    """Build what a collator makes of ``images`` rows that generate an image and, for the rest, questions about one.

    With ``edits``, the rows that generate show an image too; with ``scales``, they have that many coarse scales alone.
    Every row has padding.
    """
    config = model.config
    questions = rows - images
    schedule = config.image_tokenizer_config.schedule_for(resolution)
    tokens = token_count(schedule[:scales])
    count = rows if edits else questions
    shown, seen = model.blank_images(count, seen_side) if count else ({}, 0)
    prompt = text + edits * seen
    longest = max(prompt + tokens if images else 0, text + seen if questions else 0)
    length = -(-(longest + 1) // 8) * 8
    ids = torch.zeros(rows, length, dtype=torch.long)
    ids[:images, prompt - 1] = config.image_gen_start_token_id
    ids[:images, prompt : prompt + tokens] = config.image_gen_pad_token_id
    mask = torch.ones_like(ids)
    labels = torch.full_like(ids, IGNORED)
    mask[:, -1] = 0
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if images:
        channels = config.image_tokenizer_config.latent_channels
        found["features"] = torch.zeros(images, channels, *schedule[-1], device=model.device, dtype=model.dtype)
    ids[rows - count :, 1 : 1 + seen] = config.image_token_id
    return found | shown


def log_probs(model: Unified, inputs: dict, resolution: int, scales: int | None = None) -> torch.Tensor:
    """Compute the teacher-forced log-probability of each row's image, or of its coarse scales alone, float64 [B]."""
    tokenizer = model.config.image_tokenizer_config
    ids = inputs["input_ids"]
    tokens = token_count(tokenizer.schedule_for(resolution)[:scales])
    labels = torch.zeros(len(ids), tokens, tokenizer.symbols.depth, dtype=torch.uint8)
    drawing = replayed(labels, (resolution, resolution), scales)
    states = inputs.get("states")
    logits = model(ids, inputs["attention_mask"], drawing=drawing, text_logits=False, states=states).image_logits
    return image_log_probs(symbol_log_probs(logits, labels))


def preference_loss(model: Unified, inputs: dict, resolution: int) -> torch.Tensor:
    """DPO's loss on rows [chosen, rejected]; the reference log-probabilities take no memory."""
    chosen, rejected = log_probs(model, inputs, resolution).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def policy_loss(model: Unified, inputs: dict, resolution: int, scales: int | None) -> torch.Tensor:
    """Policy gradient on the first ``scales`` scales; the other log-probabilities take no memory."""
    return -log_probs(model, inputs, resolution, scales).exp().mean()

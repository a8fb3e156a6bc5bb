"""Answers in words to batches of questions about images: greedy, as the understanding benchmarks ask for."""

from collections.abc import Sequence

import torch
from PIL import Image

from vargpt_rl.model.prompt import ChatTemplate
from vargpt_rl.model.unified import Unified

Question = tuple[str, Sequence[Image.Image]]
"""What is asked, and the images it is asked about, which come before the words; there may be none."""


@torch.inference_mode()
def answer(model: Unified, chat: ChatTemplate, questions: Sequence[Question], max_tokens: int) -> list[str]:
    """The likeliest words to each question, at most ``max_tokens`` of them, without surrounding blanks."""
    images = [image for _, shown in questions for image in shown]
    seen = chat.vision_inputs(images) if images else None
    grids = iter(seen.image_grid_thw) if seen else iter(())
    rows = []
    for text, shown in questions:
        own = [next(grids) for _ in shown]
        rows.append(chat.question(text, torch.stack(own) if own else None))
    ids_BT = chat.pad(rows, "left").to(model.device)
    mask_BT = chat.pad([[1] * len(row) for row in rows], "left", value=0).to(model.device)
    vision = {name: tensor.to(model.device) for name, tensor in seen._asdict().items()} if seen else {}
    answers_BT = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        mm_token_type_ids=(ids_BT == model.config.image_token_id).int(),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=chat.end,
        pad_token_id=chat.tokenizer.pad_token_id,
        **vision,
    )[:, ids_BT.shape[1] :]
    return [text.strip() for text in chat.tokenizer.batch_decode(answers_BT, skip_special_tokens=True)]

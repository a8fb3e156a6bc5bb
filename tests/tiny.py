"""The smallest Vargpt with every part of the architecture: random weights, for tests that need a model but no skill."""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.modeling import Vargpt

BITS = 8
HIDDEN = 64
SENTENCES = (
    "system\nYou are a helpful assistant.",
    "user\nPlease draw a red circle above two small blue squares.",
    "assistant\nHere is a picture of a large green triangle left of a yellow star.",
    "How many circles are there? What colour is the square? three",
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|image_gen_start|>",
    "<|image_gen_end|>",
    "<|image_gen_pad|>",
)


class Patches:
    """A picture source whose keys are colours (``"red"``, ``"#102030"``); any other key cannot be loaded."""

    def load(self, key: str, side: int) -> Image.Image:
        return Image.new("RGB", (side, side), key)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences, with the model's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> VargptConfig:
    """A few layers of every part; the token ids are those of ``tokenizer``."""

    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    return VargptConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": token("im_end"),
            "pad_token_id": token("endoftext"),
        },
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": HIDDEN, "mlp_ratio": 2},
        decoder_config={"width": 64, "depth": 2, "heads": 2, "mlp_ratio": 2, "max_unconditional": 64},
        image_tokenizer_config={
            "bits": BITS,
            "base_channels": 8,
            "channel_multipliers": (1, 1, 1, 1, 1),
            "blocks_per_level": 1,
            "norm_groups": 4,
        },
        image_token_id=token("image_pad"),
        video_token_id=token("video_pad"),
        vision_start_token_id=token("vision_start"),
        vision_end_token_id=token("vision_end"),
        image_gen_start_token_id=token("image_gen_start"),
        image_gen_end_token_id=token("image_gen_end"),
        image_gen_pad_token_id=token("image_gen_pad"),
        tie_word_embeddings=False,
    )


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write a whole checkpoint (model, tokenizer, image processor) into ``folder``; returns it."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = Vargpt(tiny_config(tokenizer))
    # At the initial scale of 0.02 the bits would hardly depend on the prompt, and tests would compare constants.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = 4 * 14
    Qwen2VLImageProcessorPil(size={"shortest_edge": side**2, "longest_edge": side**2}).save_pretrained(folder)
    return folder

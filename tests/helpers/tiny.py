"""The smallest Vargpt with every part of the architecture: random weights, for tests that need a model but no skill."""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.v1.configuration import VargptV1Config
from vargpt_rl.model.v1.modeling import VargptV1

BITS = 8
HIDDEN = 64
SENTENCES = (
    "system\nYou are a helpful assistant.",
    "user\nPlease draw a red circle above two small blue squares.",
    "assistant\nHere is an image of a large green triangle left of a yellow star.",
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
V1_SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "<pad>",
    "<|image_gen_start|>",
    "<|image_gen_end|>",
    "<|image_gen_pad|>",
)
V1_CODES, V1_SIDES, V1_SEEN_SIDE = 24, (1, 2, 4), 28


class Patches:
    """An image source whose keys are colours (``"red"``, ``"#102030"``); any other key cannot be loaded."""

    def load(self, key: str, side: int) -> Image.Image:
        return Image.new("RGB", (side, side), key)


def byte_level_bpe(special_tokens: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE over a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """With v1.1's special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(SPECIAL_TOKENS),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def tiny_v1_tokenizer() -> PreTrainedTokenizerFast:
    """With v1's special tokens."""
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(V1_SPECIAL_TOKENS), extra_special_tokens=list(V1_SPECIAL_TOKENS), **named
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


def tiny_v1_config(tokenizer: PreTrainedTokenizerFast) -> VargptV1Config:
    """A few layers of every part of v1; the token ids are those of ``tokenizer``."""
    ids = {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in V1_SPECIAL_TOKENS}
    return VargptV1Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": ids["s"],
            "eos_token_id": ids["/s"],
            "pad_token_id": ids["pad"],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": V1_SEEN_SIDE,
            "patch_size": 14,
        },
        decoder_config={"width": 64, "depth": 2, "heads": 2, "mlp_ratio": 2},
        image_tokenizer_config={
            "codes": V1_CODES,
            "latent_channels": 8,
            "sides": V1_SIDES,
            "base_channels": 8,
            "channel_multipliers": (1, 1, 1, 1, 1),
            "blocks_per_level": 1,
            "norm_groups": 4,
        },
        image_token_index=ids["image"],
        image_seq_length=(V1_SEEN_SIDE // 14) ** 2,
        **{f"image_gen_{key}_token_id": ids[f"image_gen_{key}"] for key in ("start", "end", "pad")},
    )


def tiny_v1_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write a whole v1 checkpoint into ``folder``; returns it."""
    tokenizer = tiny_v1_tokenizer()
    torch.manual_seed(seed)
    model = VargptV1(tiny_v1_config(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        model.image_tokenizer.codebook.weight.normal_()  # of the size of the features
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": V1_SEEN_SIDE, "width": V1_SEEN_SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": V1_SEEN_SIDE}, crop_size=side).save_pretrained(folder)
    return folder

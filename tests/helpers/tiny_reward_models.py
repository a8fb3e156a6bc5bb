"""Random models of the published scorers' architecture, so small that a test makes them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
)

SIDE, PATCH, EMBED = 32, 8, 16
TEXT = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_settings(folder: Path) -> CLIPConfig:
    """Settings, letter tokenizer and image settings of a CLIP model with 16 positions for text, in ``folder``."""
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ?")} | {START: 28, END: 29}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 28), (END, 29)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, unk_token="?"
    ).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    text = TEXT | {"vocab_size": 30, "max_position_embeddings": 16, "bos_token_id": 28, "eos_token_id": 29}
    vision = VISION | {"image_size": SIDE, "patch_size": PATCH, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config=text | {"pad_token_id": 29, "hidden_act": "gelu"}, vision_config=vision, projection_dim=EMBED
    )
    config.save_pretrained(folder)
    return config


def clip_model(folder: Path) -> CLIPModel:
    """A random CLIP model in ``folder``, with everything that belongs to it."""
    torch.manual_seed(0)
    model = CLIPModel(clip_settings(folder)).eval()
    for parameter in model.parameters():  # the initialisation is so small that all prompts would be alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of these shapes, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shapes[name], generator=generator) for name in sorted(shapes)}


def open_clip_state() -> dict[str, Tensor]:
    """A checkpoint in the published layout of open_clip that fits `clip_settings`."""
    shapes = {
        "logit_scale": (),
        "positional_embedding": (16, 32),
        "text_projection": (32, EMBED),
        "token_embedding.weight": (30, 32),
        "visual.class_embedding": (48,),
        "visual.positional_embedding": (17, 48),
        "visual.proj": (48, EMBED),
        "visual.conv1.weight": (48, 3, PATCH, PATCH),
    }
    for name, width in {"ln_final": 32, "visual.ln_pre": 48, "visual.ln_post": 48}.items():
        shapes |= _affine(name, width)
    for tower, width in {"": 32, "visual.": 48}.items():
        for layer in range(2):
            block = f"{tower}transformer.resblocks.{layer}"
            shapes |= _affine(f"{block}.ln_1", width) | _affine(f"{block}.ln_2", width)
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= _linear(f"{block}.attn.out_proj", width, width)
            shapes |= _linear(f"{block}.mlp.c_fc", width, 4 * width) | _linear(f"{block}.mlp.c_proj", 4 * width, width)
    return random_state(shapes)


def blip_settings(folder: Path) -> None:
    """Settings and tokenizer of a BLIP model in ``folder``, for images twice as large as in `image_reward_state`."""
    ids = {"pad_token_id": 0, "bos_token_id": 2, "sep_token_id": 3}
    text = TEXT | ids | {"vocab_size": 40, "max_position_embeddings": 64}
    BlipConfig(text_config=text, vision_config=VISION | {"image_size": 2 * SIDE, "patch_size": PATCH}).save_pretrained(
        folder
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "cat", "on", "fog"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def image_reward_state() -> dict[str, Tensor]:
    """A checkpoint in the published layout of ImageReward."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{vision}.cls_token": (1, 1, 48),
        f"{vision}.pos_embed": (1, 17, 48),
        f"{vision}.patch_embed.proj.weight": (48, 3, PATCH, PATCH),
        f"{vision}.patch_embed.proj.bias": (48,),
        f"{text}.embeddings.word_embeddings.weight": (40, 32),
        f"{text}.embeddings.position_embeddings.weight": (64, 32),
        "blip.vision_proj.weight": (4, 48),
    }
    shapes |= _affine(f"{vision}.norm", 48) | _affine(f"{text}.embeddings.LayerNorm", 32)
    for layer in range(2):
        block = f"{vision}.blocks.{layer}"
        shapes |= _affine(f"{block}.norm1", 48) | _affine(f"{block}.norm2", 48)
        shapes |= _linear(f"{block}.attn.qkv", 48, 144) | _linear(f"{block}.attn.proj", 48, 48)
        shapes |= _linear(f"{block}.mlp.fc1", 48, 192) | _linear(f"{block}.mlp.fc2", 192, 48)
        block = f"{text}.encoder.layer.{layer}"
        for kind, width in {"attention": 32, "crossattention": 48}.items():
            shapes |= _linear(f"{block}.{kind}.self.query", 32, 32) | _linear(f"{block}.{kind}.self.key", width, 32)
            shapes |= _linear(f"{block}.{kind}.self.value", width, 32)
            shapes |= _linear(f"{block}.{kind}.output.dense", 32, 32) | _affine(f"{block}.{kind}.output.LayerNorm", 32)
        shapes |= _linear(f"{block}.intermediate.dense", 32, 128) | _linear(f"{block}.output.dense", 128, 32)
        shapes |= _affine(f"{block}.output.LayerNorm", 32)
    for number, (inputs, outputs) in {0: (32, 24), 2: (24, 8), 4: (8, 1)}.items():
        shapes |= _linear(f"mlp.layers.{number}", inputs, outputs)
    return random_state(shapes) | {f"{text}.embeddings.position_ids": torch.arange(64)[None]}


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

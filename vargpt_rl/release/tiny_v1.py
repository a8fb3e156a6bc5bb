"""Create a tiny untrained v1 model, and the text tokenizer of the shapes world.

The same seed makes the same files, so none are shipped.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from vargpt_rl.data.shapes import TASKS, sample_scene
from vargpt_rl.data.shapes_tasks import edit, question
from vargpt_rl.model.prompt import REPLY
from vargpt_rl.model.scales import STRIDE
from vargpt_rl.model.v1.configuration import V1ImageTokenizerConfig, VargptV1Config
from vargpt_rl.model.v1.modeling import VargptV1
from vargpt_rl.model.v1.prompt import SYSTEM
from vargpt_rl.storage.sharded import new_model_dir

V1_NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
V1_SPECIAL = [*V1_NAMED.values(), "<image>", *(f"<|image_gen_{name}|>" for name in ("start", "end", "pad"))]
SEEN_SIDE, PATCH = 112, 14  # of understood images: 8 x 8 patches


def shapes_bpe(special: list[str], texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE of 512 tokens on the shapes world's texts and ``texts``, with these special tokens."""
    rng = np.random.default_rng(0)
    texts = list(texts)
    for scene in [sample_scene(rng, task) for task in TASKS for _ in range(400)]:
        texts += [scene.caption, *question(scene, rng), edit(scene, rng)[0]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def sides_for(side: int) -> tuple[int, ...]:
    """Return the token grids of a v1 model that draws ``side`` pixels: the release's smaller ones, then its own."""
    last = side // STRIDE
    return (*(grid for grid in V1ImageTokenizerConfig.sides if grid < last), last)


def fresh_v1_config(side: int) -> VargptV1Config:
    """Configure the release's architecture with about 3 million parameters, for images of ``side`` pixels."""
    ids = {name: index for index, name in enumerate(V1_SPECIAL)}  # BPE numbers special tokens first
    return VargptV1Config(
        text_config=dict(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384, vocab_size=512,
            rms_norm_eps=1e-5, max_position_embeddings=4096, initializer_range=0.05,
            bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"],
        ),
        vision_config=dict(
            hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=3, image_size=SEEN_SIDE,
            patch_size=PATCH, initializer_range=0.05,
        ),
        # Unlike the release, draw and score under the condition used in training.
        decoder_config=dict(width=128, depth=4, heads=4, draws_unconditionally=False),
        image_tokenizer_config=dict(
            codes=1024, latent_channels=16, sides=sides_for(side), base_channels=8,
            channel_multipliers=[1, 2, 4, 8, 8], blocks_per_level=1, norm_groups=8,
        ),
        image_token_index=ids["<image>"], image_seq_length=(SEEN_SIDE // PATCH) ** 2, initializer_range=0.05,
        **{f"image_gen_{name}_token_id": ids[f"<|image_gen_{name}|>"] for name in ("start", "end", "pad")},
    )  # fmt: skip


def make_fresh_v1(folder: Path, side: int, seed: int) -> Path:
    """Write the model directory ``folder`` unless it exists; return its absolute path."""
    folder = folder.resolve()
    if folder.is_dir():
        return folder
    words = [SYSTEM, REPLY, "USER: ", " ASSISTANT:", "yes", "no"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=shapes_bpe(V1_SPECIAL, words), extra_special_tokens=V1_SPECIAL, **V1_NAMED
    )
    with torch.random.fork_rng(devices=[]), new_model_dir(folder) as unfinished:
        torch.manual_seed(seed)
        VargptV1(fresh_v1_config(side)).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        size = {"height": SEEN_SIDE, "width": SEEN_SIDE}
        CLIPImageProcessorPil(size={"shortest_edge": SEEN_SIDE}, crop_size=size).save_pretrained(unfinished)
    return folder

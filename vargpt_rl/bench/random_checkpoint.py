"""Write a checkpoint of the release's size with random weights: ``python -m vargpt_rl.bench.random_checkpoint DIR``.

A whole run can be rehearsed with it, in its real times and memory, before the weights are there. It has the embedded
model's small tokenizer, and the settings of the release else. ``--fraction`` of the layers makes it smaller.
"""

import argparse
import sys
from pathlib import Path

import torch

from vargpt_rl.bench.gpu import make_model, sized_config
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.storage.sharded import TOKENIZER_FILES, copy_files

TOKEN_IDS = (
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("image_gen_start_token_id", "image_gen_end_token_id", "image_gen_pad_token_id"),
)
TEXT_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_embedded_tokens(config: VargptConfig) -> VargptConfig:
    """Give a configuration the token ids of the embedded model's tokenizer; returns it."""
    embedded = VargptConfig.from_pretrained(EMBEDDED)
    for name in TOKEN_IDS:
        setattr(config, name, getattr(embedded, name))
    for name in TEXT_TOKEN_IDS:
        setattr(config.text_config, name, getattr(embedded.text_config, name))
    return config


def write_checkpoint(config: VargptConfig, folder: Path, device: torch.device) -> int:
    """Write model (bf16, random, seed 0), tokenizer and image processor; return the number of parameters."""
    model = make_model(with_embedded_tokens(config), device, torch.bfloat16)
    model.save_pretrained(folder)
    copy_files(EMBEDDED, folder, (*TOKENIZER_FILES, "preprocessor_config.json"))
    return sum(parameter.numel() for parameter in model.parameters())


def main(arguments: list[str] | None = None) -> int:
    """Write the checkpoint and say what it is; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the release's layers (default 1)")
    options = parser.parse_args(arguments)
    if not 0 < options.fraction <= 1:
        parser.error(f"--fraction {options.fraction}: expected above 0 and at most 1")
    if options.folder.exists():
        parser.error(f"{options.folder}: expected a folder that does not exist")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = write_checkpoint(sized_config(False, options.fraction), options.folder, device)
    print(f"{options.folder}: {count / 1e9:.1f} B parameters of random weights")
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())

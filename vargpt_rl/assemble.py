"""Assemble the starting point of VARGPT-v1.1's training from three published parts: ``python -m vargpt_rl.assemble``.

``language=DIR`` is a Qwen2-VL directory (Qwen2-VL-7B-Instruct in the paper), ``decoder=FILE`` Infinity's weights and
``image_tokenizer=FILE`` those of its image tokenizer, both written by ``torch.save``. The two generation projectors and
the start row are initialised at random from ``seed``; the tokenizer gets the three special tokens of drawn images.
Every tensor keeps its dtype. Only tensors are read from the ``.pth`` files, never objects. Errors are one line that
names the file; exit code 2.
"""

import pickle
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig

from vargpt_rl.common.command import run_command
from vargpt_rl.common.errors import first_line
from vargpt_rl.convert import model_shapes, print_counts, tied, usual_dtype
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.release.v1_1_config import (
    NEW_TOKENS,
    Sizes,
    decoder_config,
    dtype_name,
    image_tokenizer_config,
    own_settings,
    sizes_of,
)
from vargpt_rl.release.v1_1_names import START, our_name, reason_dropped, release_name, wrapped
from vargpt_rl.storage.sharded import (
    OTHER_FILES,
    Stored,
    Tensors,
    about,
    check_tensors,
    copy_files,
    new_model_dir,
    read_json,
    renamed,
    save_sharded,
    stored_in_folder,
)

DECODER_PLACES = ((), ("state_dict",), ("trainer", "gpt_fsdp"))
IMAGE_TOKENIZER_PLACES = ((), ("vae",), ("state_dict",), ("trainer", "vae_local"))
PREFIXES: tuple[str | tuple[str, ...], ...] = (("visual.", "model.", "lm_head."), "vargpt_gen.", "vae_local.")
"""Released name prefixes of the three parts: language, decoder, image tokenizer."""


@dataclass
class Assembly:
    """Settings of this command."""

    language: str
    """Folder of a Qwen2-VL model."""
    decoder: str
    """File of Infinity's weights."""
    image_tokenizer: str
    """File of the image tokenizer's weights."""
    target: str
    """Folder to write; must not exist, or be empty."""
    seed: int = 0
    """Seed of the randomly initialised weights."""


def stored_in_torch_file(path: Path, places: tuple[tuple[str, ...], ...]) -> Tensors:
    """List the state dict of a ``.pth`` file, at the first of ``places`` (nested keys) that has one."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: expected tensors written by torch.save: {first_line(error)}") from error
    for place in places:
        found = saved
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and found and all(isinstance(value, torch.Tensor) for value in found.values()):
            return {
                # The tensors are memory-mapped; cloning reads them.
                name: Stored(path, name, tuple(tensor.shape), tensor.dtype, partial(_in_memory, tensor))
                for name, tensor in found.items()
            }
    expected = ", ".join(".".join(place) or "the top" for place in places)
    raise ValueError(f"{path}: found no dictionary of tensors at {expected}")


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def language_part(folder: Path) -> Tensors:
    """List Qwen2-VL's tensors under the release's names, which are Qwen2-VL's original ones."""

    def rename(name: str) -> str:
        for later, published in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if name.startswith(later):
                return published + name.removeprefix(later)
        return name

    return renamed(stored_in_folder(folder), rename)


def decoder_part(path: Path) -> Tensors:
    """List Infinity's tensors under the release's names; blocks without chunks count as one chunk."""

    def rename(name: str) -> str:
        return "vargpt_gen." + re.sub(r"^(unregistered_)?blocks\.(\d+)\.", r"block_chunks.0.module.\2.", name)

    return renamed(stored_in_torch_file(path, DECODER_PLACES), rename)


def image_tokenizer_part(path: Path) -> Tensors:
    """List the image tokenizer's tensors under the release's names."""
    tensors = stored_in_torch_file(path, IMAGE_TOKENIZER_PLACES)
    rename = wrapped if "encoder.conv_in.weight" in tensors else str
    return renamed(tensors, lambda name: f"vae_local.{rename(name)}")


def reason_left_out(name: str) -> str | None:
    """Say why a tensor of one of the parts is not needed; None if it is."""
    if name.startswith("vae_local.quantizer."):
        return "a buffer of the quantiser, which has no weights"
    return reason_dropped(name)


def extended_tokenizer(folder: Path, rows: int) -> tuple[PreTrainedTokenizerBase, dict[str, int]]:
    """Add the new tokens to the tokenizer; return it and their ids by setting. ``rows`` is the embedding's size."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = {"extra_special_tokens": [f"<|{name}|>" for name in NEW_TOKENS]}
    tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in NEW_TOKENS}
    if max(ids.values()) >= rows:
        raise ValueError(f"{folder}: model.embed_tokens.weight has {rows} rows, the new tokens need {ids}")
    return tokenizer, ids


def random_weights(shapes: dict[str, tuple[int, ...]], config: VargptConfig, dtype: torch.dtype, seed: int) -> Tensors:
    """Draw weights from a normal distribution with the language model's initializer_range; biases are zero."""
    generator = torch.Generator().manual_seed(seed)
    spread = config.text_config.initializer_range
    tensors = {}
    for name, shape in sorted(shapes.items()):
        fresh = torch.zeros(shape)
        if not name.endswith(".bias"):
            fresh.normal_(0, spread, generator=generator)
        tensors[name] = Stored(Path("seed"), name, shape, dtype, partial(fresh.to, dtype))
    return tensors


@dataclass(frozen=True)
class Parts:
    """Tensors of the three parts under the release's names, each with the file or folder that it came from."""

    language: tuple[Path, Tensors]
    decoder: tuple[Path, Tensors]
    image_tokenizer: tuple[Path, Tensors]

    @property
    def each(self) -> list[tuple[Path, Tensors]]:
        """The parts in the order of `PREFIXES`."""
        return [self.language, self.decoder, self.image_tokenizer]

    @property
    def tensors(self) -> Tensors:
        """The tensors of all parts."""
        return {name: stored for _, part in self.each for name, stored in part.items()}


def whole_config(parts: Parts, language: Qwen2VLConfig, pad: int, ids: dict[str, int]) -> tuple[VargptConfig, Sizes]:
    """Return the configuration of the whole model, and the sizes that the released names depend on.

    The language half keeps its own settings; those of the others are inferred from their tensors' shapes.
    ``pad`` is the padding token, ``ids`` are those of the new tokens by setting.
    """
    shapes = {name: stored.shape for name, stored in parts.tensors.items()}
    with about(parts.decoder[0]):
        decoder, blocks_per_chunk = decoder_config(shapes, {})
    with about(parts.image_tokenizer[0]):
        image_tokenizer = image_tokenizer_config(shapes, {})
    text = own_settings(language.text_config) | {"pad_token_id": pad}
    text["rope_parameters"].pop("type", None)  # the published file's name of rope_type
    config = VargptConfig(
        text_config=text,
        vision_config=own_settings(language.vision_config),
        decoder_config=decoder,
        image_tokenizer_config=image_tokenizer,
        tie_word_embeddings=language.tie_word_embeddings,
        image_token_id=language.image_token_id,
        video_token_id=language.video_token_id,
        vision_start_token_id=language.vision_start_token_id,
        vision_end_token_id=language.vision_end_token_id,
        dtype=dtype_name(usual_dtype(parts.language[1])),
        architectures=["Vargpt"],
        **ids,
    )
    return config, sizes_of(config, blocks_per_chunk)


def assemble(command: Assembly) -> None:
    """Write ``target``, a model directory that ``Vargpt.from_pretrained`` reads."""
    folder = Path(command.language)
    decoder = Path(command.decoder)
    image_tokenizer = Path(command.image_tokenizer)
    found = read_json(folder / "config.json").get("model_type")
    if found != Qwen2VLConfig.model_type:
        raise ValueError(f"{folder / 'config.json'}: model_type is {found!r}, expected {Qwen2VLConfig.model_type!r}")
    with about(folder / "config.json"):
        language = Qwen2VLConfig.from_pretrained(folder)
    tokenizer, ids = extended_tokenizer(folder, language.text_config.vocab_size)
    parts = Parts(
        language=(folder, language_part(folder)),
        decoder=(decoder, decoder_part(decoder)),
        image_tokenizer=(image_tokenizer, image_tokenizer_part(image_tokenizer)),
    )
    config, sizes = whole_config(parts, language, tokenizer.pad_token_id, ids)

    needed = model_shapes(config)
    new = {name: shape for name, shape in needed.items() if name == START or name.startswith("projector_")}
    released = {release_name(name, *sizes): shape for name, shape in needed.items() if name not in new}
    for (where, part), prefixes in zip(parts.each, PREFIXES, strict=True):
        expected = {name: shape for name, shape in released.items() if name.startswith(prefixes)}
        kept = {name: stored for name, stored in part.items() if not reason_left_out(name)}
        check_tensors(kept, expected, where, tied(config))

    every = parts.tensors
    model = {
        ours: stored
        for name, stored in every.items()
        if not reason_left_out(name) and (ours := our_name(name, *sizes)) is not None
    }
    model |= random_weights(new, config, usual_dtype(parts.language[1]), command.seed)
    with new_model_dir(Path(command.target)) as target:
        config.save_pretrained(target)
        files = save_sharded(model, target)
        copy_files(folder, target, OTHER_FILES)
        tokenizer.save_pretrained(target)
    print(f"{len(every)} tensors read, {len(model)} written in {files} files, {len(new)} of them random; left out:")
    print_counts(filter(None, map(reason_left_out, every)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(Assembly, assemble, arguments)


if __name__ == "__main__":
    sys.exit(main())

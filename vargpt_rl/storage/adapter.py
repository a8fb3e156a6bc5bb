"""Adapters on disk: the first weights of a run's adapter, and the folder that is shared, in peft's format.

A shared folder has peft's ``adapter_config.json`` and ``adapter_model.safetensors``, which peft itself loads, the
base's configuration and tokenizer files, a model card, and ``base.json``: the base's family and a hash of its weights.
It serves as a checkpoint wherever its base is found.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from vargpt_rl.model.adapter import NAME, AdapterConfig, attach, fresh_tensors, merged_weight, target_modules
from vargpt_rl.model.families import family_of, load_config
from vargpt_rl.model.hub import check_model
from vargpt_rl.model.unified import Unified
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint, save_checkpoint
from vargpt_rl.storage.export import files_beside_weights
from vargpt_rl.storage.files import atomic_dir
from vargpt_rl.storage.hashes import set_checksum, tensor_hash
from vargpt_rl.storage.sharded import (
    Stored,
    Tensors,
    new_model_dir,
    read_json,
    save_sharded,
    save_together,
    stored_in,
    stored_in_folder,
)

SETTINGS, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
_PREFIX = "base_model.model."
"""Before the names of a model's tensors in peft's files."""
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Settings of peft that merging relies on."""


def adapted_on_meta(model: str, config: AdapterConfig) -> Unified:
    """Return a model directory's model with an adapter, without data. ValueError if the adapter does not fit it."""
    settings = load_config(model)
    with torch.device("meta"):
        adapted = family_of(settings).model(settings)
        attach(adapted, config)
    return adapted


def write_fresh_adapter(model: str, config: AdapterConfig, directory: Path, seed: int, dtype: torch.dtype) -> dict:
    """Write an adapter without effect, and the start model's own weights of the parts that train in full beside it.

    Together they are the start of every tensor that stages train. Returns their number and bytes.
    """
    tensors = fresh_tensors(adapted_on_meta(model, config), seed, dtype)
    for name, stored in stored_in_folder(Path(model)).items():
        if name.startswith(config.full_prefixes):
            tensors[name] = stored.read().to(dtype)
    save_checkpoint(directory, tensors)
    return {"tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}


def base_hash(model: Path) -> str:
    """Hash names, dtypes, shapes and values of a model directory's tensors, however they are split into files."""
    return set_checksum({name: tensor_hash(name, at.read()) for name, at in stored_in_folder(model).items()})


def write_adapter(policy: Policy, target: Path, base: str, files: dict[str, dict] | None = None) -> None:
    """Write a policy's adapter as a folder to share. ``base`` names its base to others; ``files`` are more JSON files.

    An older ``target`` is kept until the new one is whole.
    """
    from peft import LoraConfig  # takes a second, which a run without adapters need not wait for

    adapter = policy.adapter
    if adapter is None:
        raise ValueError(f"{policy.model}: the policy has no adapter")
    tensors: Tensors = {}
    for weights in policy.weights:
        tensors |= stored_in(check_checkpoint(weights))
    settings = load_config(policy.model)
    with torch.device("meta"):
        targets = target_modules(family_of(settings).model(settings), adapter)
    lora = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft divides it by r
        lora_dropout=adapter.dropout,
        target_modules=targets,
        modules_to_save=[prefix.removesuffix(".") for prefix in adapter.full_prefixes] or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    described = {"model_type": settings.model_type, "xxh3_128": base_hash(Path(policy.model))}
    with atomic_dir(target) as folder:
        renamed = {_PREFIX + name.replace(f".{NAME}.", "."): stored for name, stored in tensors.items()}
        save_together(renamed, folder / WEIGHTS, {})
        lora.save_pretrained(str(folder))
        (folder / BASE).write_text(json.dumps(described, indent=1) + "\n")
        (folder / "README.md").write_text(_card(adapter, base, described["xxh3_128"]))
        for file in files_beside_weights(Path(policy.model)):
            shutil.copyfile(file, folder / file.name)
        for name, content in (files or {}).items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def _card(adapter: AdapterConfig, base: str, found: str) -> str:
    full = f"; these parts are trained in full: {', '.join(adapter.full)}" if adapter.full else ""
    return (
        f"---\nlibrary_name: peft\nbase_model: {base}\ntags: [lora, vargpt]\n---\n\n"
        f"# Adapter of {base}\n\n"
        f"A low-rank adapter of rank {adapter.rank}, alpha {adapter.alpha:g}, of {', '.join(adapter.targets)}{full}. "
        f"It needs its base, whose weights have the xxh3-128 hash {found}.\n"
    )


def is_adapter_folder(folder: str | Path) -> bool:
    """Tell whether a folder holds an adapter instead of a model."""
    return (Path(folder) / SETTINGS).is_file()


def adapter_base(folder: Path) -> Path:
    """Return the model directory that a shared adapter stands on.

    ValueError, naming the adapter, if it is missing, of another family, or has other weights.
    """
    stated = read_json(folder / SETTINGS)
    expected = read_json(folder / BASE)
    for key, plain in _PLAIN.items():
        if stated.get(key, plain) != plain and (stated[key] or plain):
            raise ValueError(f"{folder / SETTINGS}: {key} is {stated[key]!r}, expected {plain!r}")
    try:
        base = Path(check_model(str(stated.get("base_model_name_or_path"))))
    except ValueError as error:
        reason = str(error).removeprefix("checkpoint=")
        raise ValueError(f"{folder / SETTINGS}: base_model_name_or_path={reason}") from error
    found = {"model_type": load_config(base).model_type}
    if found["model_type"] != expected.get("model_type"):
        raise ValueError(
            f"{folder}: an adapter of the family {expected.get('model_type')!r}, but its base {base} is of "
            f"{found['model_type']!r}"
        )
    found["xxh3_128"] = base_hash(base)
    if found["xxh3_128"] != expected.get("xxh3_128"):
        raise ValueError(
            f"{folder}: its base {base} has hash {found['xxh3_128']}, expected {expected.get('xxh3_128')}: the adapter "
            f"was trained on other weights"
        )
    return base


def merged_tensors(folder: Path, base: Path) -> Tensors:
    """List the tensors that an adapter changes in its base, as they are with the adapter merged.

    ValueError naming a tensor that the base does not have in this shape, or half of a pair of matrices.
    """
    settings = read_json(folder / SETTINGS)
    scale = settings["lora_alpha"] / settings["r"]
    own = {name.removeprefix(_PREFIX): stored for name, stored in stored_in(folder / WEIGHTS).items()}
    return dict(_changed(own, stored_in_folder(base), scale))


def _changed(own: Tensors, base: Tensors, scale: float) -> Iterator[tuple[str, Stored]]:
    for name, stored in own.items():
        layer, is_pair, _ = name.partition(".lora_")
        target = f"{layer}.weight" if is_pair else name
        if target not in base:
            raise ValueError(f"{stored.file}: {stored.name} is unexpected, the base has no {target}")
        weight = base[target]
        shape = stored.shape
        read = partial(_read_as, stored, weight.dtype)
        if is_pair:
            names = [f"{layer}.lora_{side}.weight" for side in "AB"]
            if name not in names or not own.keys() >= set(names):
                raise ValueError(f"{stored.file}: {stored.name} is not one of a pair lora_A.weight and lora_B.weight")
            a_rI, b_Or = own[names[0]], own[names[1]]
            shape = (*b_Or.shape[:1], *a_rI.shape[1:])
            read = partial(_read_merged, weight, a_rI, b_Or, scale)
        if shape != weight.shape:
            raise ValueError(f"{stored.file}: {stored.name} is of a layer {shape}, the base has {weight.shape}")
        yield target, Stored(stored.file, stored.name, weight.shape, weight.dtype, read)


def _read_merged(weight: Stored, a_rI: Stored, b_Or: Stored, scale: float) -> torch.Tensor:
    return merged_weight(weight.read(), a_rI.read(), b_Or.read(), scale)


def _read_as(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    return stored.read().to(dtype)


@torch.no_grad()
def apply_adapter(model: torch.nn.Module, folder: Path, base: Path) -> None:
    """Merge a shared adapter into a loaded model of its base, in the base's dtype, then cast to the model's."""
    own = model.state_dict()
    for name, stored in merged_tensors(folder, base).items():
        own[name].copy_(stored.read())


def write_merged(folder: Path, target: Path) -> Path:
    """Write the model directory of a shared adapter, merged into its base; return its absolute path."""
    base = adapter_base(folder)
    tensors = stored_in_folder(base) | merged_tensors(folder, base)
    with new_model_dir(target) as unfinished:
        for file in files_beside_weights(base):
            shutil.copyfile(file, unfinished / file.name)
        save_sharded(tensors, unfinished)
    return target.resolve()

"""The two families of the model, selected by the ``model_type`` in a model directory's config.json."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig

from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.image_tokenizer import ImageTokenizer
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat, ChatTemplate
from vargpt_rl.model.unified import Unified
from vargpt_rl.model.v1.configuration import VargptV1Config
from vargpt_rl.model.v1.image_tokenizer import V1ImageTokenizer
from vargpt_rl.model.v1.modeling import VargptV1
from vargpt_rl.model.v1.prompt import VicunaFormat

AnyImageTokenizer = ImageTokenizer | V1ImageTokenizer


class Family(NamedTuple):
    """Classes of one family: model, image tokenizer and chat template."""

    model: type[Unified]
    image_tokenizer: type[AnyImageTokenizer]
    markup: type[ChatTemplate]


FAMILIES: dict[str, Family] = {
    VargptConfig.model_type: Family(Vargpt, ImageTokenizer, ChatFormat),
    VargptV1Config.model_type: Family(VargptV1, V1ImageTokenizer, VicunaFormat),
}


def family_named(model_type: str) -> Family:
    """Look up a family by ``model_type``. Raises ValueError for an unknown one."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type is {model_type!r}, expected {' or '.join(map(repr, FAMILIES))}")
    return FAMILIES[model_type]


def family_of(config: PreTrainedConfig) -> Family:
    """Look up the family of a configuration. Raises ValueError if it belongs to another model."""
    return family_named(config.model_type)


def load_config(path: str | Path) -> PreTrainedConfig:
    """Load the configuration of a model directory of either family."""
    return AutoConfig.from_pretrained(path)


def load_model(path: str | Path, dtype: torch.dtype | str) -> Unified:
    """Load the model of a directory in ``dtype`` ("auto": that of its files)."""
    return family_of(load_config(path)).model.from_pretrained(path, dtype=dtype)


def markup_for(path: str | Path, config: PreTrainedConfig) -> ChatTemplate:
    """Load the chat template of a directory whose model has this configuration."""
    return family_of(config).markup(str(path), config)

"""From the command line to a checked configuration. Every fault is a ValueError of one line that names the key."""

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import LoopConfig
from vargpt_rl.common.secret_check import check_secrets


def load_config(overrides: list[str], assumed: dict[str, str] | None = None) -> LoopConfig:
    """Compose ``configs/loop.yaml`` with ``key=value`` overrides and check the result.

    ``assumed`` are values for keys that an experiment leaves empty, where they are not given. Secrets are refused.
    """
    for override in overrides:  # before Hydra repeats one in an error
        key, _, value = override.lstrip("+~").partition("=")
        check_secrets(value, key)
    ConfigStore.instance().store(name="schema", node=LoopConfig)
    try:
        with initialize_config_module("configs", version_base="1.3"):
            composed = compose("loop", overrides=overrides)
        for key, value in (assumed or {}).items():
            composed[key] = composed[key] or value
        check_secrets(OmegaConf.to_container(composed, resolve=True, enum_to_str=True), "")
        return OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        message = str(error).partition("Config search path")[0]
        parts = " ".join(message.split()), " ".join(str(error.__cause__ or "").split())
        raise ValueError(". ".join(filter(None, parts))) from error

"""What vLLM loads in each of its processes, by the entry point ``vargpt``: the language half of a VARGPT checkpoint.

Drawing stays with `vargpt_rl.model.generate`: embeddings in and hidden states out, scale by scale, are no interface of
vLLM's.
"""

import importlib
import sys
from collections.abc import Mapping

import torch
from transformers.utils import is_torchvision_available

NAME = "vargpt"
"""Of the entry point; ``VLLM_PLUGINS`` chooses by it."""
ARCHITECTURE = "Vargpt"
"""As ``config.json`` of a checkpoint has it."""

_IMAGES = "transformers.models.qwen2_vl.image_processing_"


def register() -> None:
    """Make the model known. vLLM's own module is not imported here, but where its class is first asked for."""
    from vllm import ModelRegistry

    import vargpt_rl.model.configuration  # noqa: F401 (registers the config's type with transformers)

    if not is_torchvision_available():
        # vLLM imports one function from the torchvision variant; the one built on Pillow has the same.
        sys.modules.setdefault(f"{_IMAGES}qwen2_vl", importlib.import_module(f"{_IMAGES}pil_qwen2_vl"))
    ModelRegistry.register_model(ARCHITECTURE, "vargpt_rl.text.vllm_model:VargptText")


class TakesWeights:
    """Mixed into vLLM's workers (``worker_extension_cls``). ``weights_version`` is that of the last set taken."""

    weights_version = 0

    def take_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> int:
        """Load tensors, named as in the checkpoint, in place; the version now held.

        vLLM reloads layer by layer: a layer that is given in part would keep garbage in the rest. Its caches still
        have what the old weights made; whoever calls this resets them.
        """
        self.weights_version = -1
        if tensors:
            self.reload_weights(weights_iterator=iter(tensors.items()))
        self.weights_version = version
        return self.weights_version

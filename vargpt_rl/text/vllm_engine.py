"""Text engine on vLLM: the language half of a checkpoint, continuous batching, weights swapped in place.

An engine takes over its process (process group, threads, seed): run one per process, and no other computation in it.
Memory: the weights and a key-value cache of fixed size, so that a GPU can be shared.
"""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.storage.sharded import stored_in_folder
from vargpt_rl.text.engine import TextRequest
from vargpt_rl.text.layout import check_set, is_text
from vargpt_rl.text.vllm_plugin import ARCHITECTURE, NAME, TakesWeights

MAX_TOKENS = 4096
"""Limit for one request with its image and answer; an image of 1024 px takes 1369."""
CACHE_TOKENS = 8 * MAX_TOKENS
"""Size of the key-value cache; 1.75 GiB for the 7B model in bfloat16."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # passes tensors to the worker without serialising them
    "VLLM_PLUGINS": NAME,
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes compute on the same cores
    "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler takes longer than the sampling
    "HF_HUB_OFFLINE": "1",
}


def is_installed() -> bool:
    """Tell whether this environment has vLLM."""
    return find_spec("vllm") is not None


class VllmEngine:
    """Serves the model in ``folder``, a VARGPT v1.1 or any other Qwen2-VL checkpoint. One image per request."""

    def __init__(self, folder: str, dtype: torch.dtype):
        os.environ.update(ENVIRONMENT)
        from vllm import LLM

        self.chat = ChatFormat(folder, AutoConfig.from_pretrained(folder))
        self.version = 0
        self.shapes = {name: at.shape for name, at in stored_in_folder(Path(folder)).items() if is_text(name)}
        self.llm = LLM(
            folder,
            dtype=dtype,
            hf_overrides={"architectures": [ARCHITECTURE]},
            worker_extension_cls=f"{TakesWeights.__module__}.{TakesWeights.__qualname__}",
            kv_cache_memory_bytes=CACHE_TOKENS * _token_bytes(self.chat.config.text_config, dtype),
            max_model_len=min(MAX_TOKENS, self.chat.config.text_config.max_position_embeddings),
            block_size=32,
            enforce_eager=True,
            limit_mm_per_prompt={"image": 1},
            skip_mm_profiling=True,
            mm_processor_cache_gb=1,
        )

    def write(self, requests: Sequence[TextRequest], max_tokens: int, stops: Sequence[int]) -> list[list[int]]:
        outputs = self._generate(requests, max_tokens=max_tokens, stop_token_ids=list(stops), ignore_eos=True)
        return [list(output.token_ids) for output in outputs]

    def log_probs(self, requests: Sequence[TextRequest], tokens: Sequence[int]) -> list[list[float]]:
        outputs = self._generate(requests, max_tokens=1, logprob_token_ids=list(tokens))
        return [[output.logprobs[0][token].logprob for token in tokens] for output in outputs]

    def swap(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace tensors of the language half, named as in the checkpoint, and clear all caches.

        Raises ValueError, before changing anything, if the set does not fit. Raises RuntimeError if the engine does
        not hold ``version`` afterwards, or its caches could not be cleared: its output cannot be trusted then.
        """
        check_set({name: tuple(tensor.shape) for name, tensor in tensors.items()}, self.shapes)
        held = self.llm.collective_rpc("take_weights", args=(version, tensors))
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        forgot = self.llm.reset_prefix_cache()
        if set(held) != {version} or not forgot:
            raise RuntimeError(f"weights of version {version}: the engine holds {held}, prefix cache reset: {forgot}")

    def _generate(self, requests: Sequence[TextRequest], **options: object) -> list:
        """Return the greedy completion of each request."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, detokenize=False, **options)
        prompts = [self._prompt(request) for request in requests]
        return [output.outputs[0] for output in self.llm.generate(prompts, params, use_tqdm=False)]

    def _prompt(self, request: TextRequest) -> dict[str, object]:
        """Make token ids with one ``image_pad`` for the image; vLLM expands it."""
        if not request.images:
            return {"prompt_token_ids": self.chat.question(request.text)}
        (image,) = request.images
        merge = self.chat.config.vision_config.spatial_merge_size
        ids = self.chat.question(request.text, torch.tensor([[1, merge, merge]]))
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": image.convert("RGB")}}


def _token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes that the keys and values of a token take."""
    head = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize

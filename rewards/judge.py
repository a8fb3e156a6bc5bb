"""A vision-language model as judge: the probability that an image shows what its prompt says.

The model is asked a question about each image, and only the first token of its answer counts: the score is
p(yes) / (p(yes) + p(no)), in (0, 1). VQAScore (Lin et al., 2024) uses p(yes) alone, which drops when a model prefers to
begin its answer with another word.

vLLM takes over its process; like every reward, the judge runs in its own. An environment without vLLM can use another
one that has it: the term's ``python`` (`rewards.processes.RewardTerm`).
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from vargpt_rl.data.reward_pairs import QUESTION
from vargpt_rl.inference.conversation import device_and_dtype
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.storage.sharded import read_json
from vargpt_rl.text.engine import TextEngine, TextRequest
from vargpt_rl.text.transformers_engine import TransformersEngine
from vargpt_rl.text.vllm_engine import VllmEngine, is_installed

KINDS = {"qwen2_vl": Qwen2VLForConditionalGeneration, "vargpt": Vargpt}


class VlmJudge:
    """``model``: the directory of a Qwen2-VL or VARGPT checkpoint. Scores of several ``questions`` are averaged.

    ``yes`` and ``no`` are single tokens. ``engine``: vllm, transformers or auto (vllm if it is installed and no
    ``device`` is given: vLLM uses the GPU that it finds). ValueError for a bad argument.
    """

    def __init__(
        self,
        model: str,
        questions: Sequence[str] = (QUESTION,),
        yes: str = "Yes",
        no: str = "No",
        engine: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
    ):
        if isinstance(questions, str) or not questions:
            raise ValueError(f"questions={questions!r}: expected a list of at least one question")
        kind = read_json(Path(model, "config.json")).get("model_type")
        if kind not in KINDS:
            raise ValueError(f"model={model}: expected a model of type {' or '.join(KINDS)}, got {kind!r}")
        device_and_dtype(device, dtype)  # raises if there is no such device
        self.questions, self.words = tuple(questions), (yes, no)
        self.settings = (str(Path(model).resolve()), _choose(engine, device), device, dtype)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        pairs = list(zip(images, prompts, strict=True))
        if not pairs:
            return []
        engine = _load(*self.settings)
        requests = [
            TextRequest(q.replace("{prompt}", prompt), [image]) for image, prompt in pairs for q in self.questions
        ]
        yes_no = torch.tensor(engine.log_probs(requests, _tokens(engine, self.words)), dtype=torch.float64)
        return yes_no.softmax(-1)[:, 0].view(len(pairs), -1).mean(1).tolist()


def _choose(engine: str, device: str) -> str:
    """Resolve ``auto``. ValueError for an engine that cannot be used."""
    if engine == "auto":
        return "vllm" if is_installed() and device == "auto" else "transformers"
    if engine == "vllm" and not is_installed():
        raise ValueError("engine=vllm: vLLM is not installed in this environment")
    if engine == "vllm" and device != "auto":
        raise ValueError(f"engine=vllm device={device}: expected no device, vLLM uses the GPU that it finds")
    if engine not in ("vllm", "transformers"):
        raise ValueError(f"engine={engine}: expected auto, vllm or transformers")
    return engine


def _tokens(engine: TextEngine, words: tuple[str, ...]) -> list[int]:
    """The token id of each word. ValueError if it is not a single token."""
    ids = [engine.chat.text(word) for word in words]
    for word, found in zip(words, ids, strict=True):
        if len(found) != 1:
            raise ValueError(f"{word!r}: expected a single token, got {len(found)} tokens of this model")
    return [found[0] for found in ids]


@cache
def _load(model: str, engine: str, device: str, dtype: str) -> TextEngine:
    """Load the model into its engine. ValueError if weights are missing."""
    place, kind = device_and_dtype(device, dtype)
    if engine == "vllm":
        return VllmEngine(model, kind)
    config = AutoConfig.from_pretrained(model)
    loaded, info = KINDS[config.model_type].from_pretrained(model, dtype=kind, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{model}: {len(info['missing_keys'])} weights are missing, e.g. {min(info['missing_keys'])}")
    return TransformersEngine(loaded.to(place).eval(), ChatFormat(model, config))

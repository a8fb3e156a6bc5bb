"""A vision-language model as judge: how sure it is that an image shows what its prompt says.

It is asked a question about each image and only the first token of its answer is looked at: the score is the
probability of ``yes`` as a share of ``yes`` and ``no`` together, in (0, 1). VQAScore (Lin et al., 2024) takes the
probability of "Yes" alone, which falls where a model would rather begin its answer in another way.

vLLM takes over the process it runs in; as every reward, the judge runs in one of its own. An environment without vLLM
can use one that has it: the term's ``python`` (`rewards.processes.Term`).
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from vargpt_rl.inference.conversation import device_and_dtype
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.storage.sharded import read_json
from vargpt_rl.text.engine import TextEngine, TextRequest
from vargpt_rl.text.transformers_engine import TransformersEngine
from vargpt_rl.text.vllm_engine import VllmEngine, is_installed

QUESTION = "Does this picture show: {prompt}? Answer Yes or No."
KINDS = {"qwen2_vl": Qwen2VLForConditionalGeneration, "vargpt": Vargpt}


class VlmJudge:
    """``model``: the directory of a Qwen2-VL or VARGPT checkpoint; of several ``questions`` the mean score counts.

    ``yes`` and ``no`` are single tokens. ``engine``: vllm, transformers or auto (vllm where it is installed, unless a
    ``device`` is given: vLLM takes the GPU that it finds). ValueError for whatever of this is wrong.
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
            raise ValueError(f"questions={questions!r}: expected a list of one question or more")
        kind = read_json(Path(model, "config.json")).get("model_type")
        if kind not in KINDS:
            raise ValueError(f"model={model}: a model of type {kind!r}, expected one of {', '.join(KINDS)}")
        device_and_dtype(device, dtype)  # refuses what there is not
        self.questions, self.words = tuple(questions), (yes, no)
        self.settings = (str(Path(model).resolve()), _choose(engine, device), device, dtype)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        pairs = list(zip(images, prompts, strict=True))
        if not pairs:
            return []
        engine = _load(*self.settings)
        requests = [
            TextRequest(q.replace("{prompt}", prompt), image) for image, prompt in pairs for q in self.questions
        ]
        yes_no = torch.tensor(engine.log_probs(requests, _tokens(engine, self.words)), dtype=torch.float64)
        return yes_no.softmax(-1)[:, 0].view(len(pairs), -1).mean(1).tolist()


def _choose(engine: str, device: str) -> str:
    """The engine that is meant. ValueError where it cannot be."""
    if engine == "auto":
        return "vllm" if is_installed() and device == "auto" else "transformers"
    if engine == "vllm" and not is_installed():
        raise ValueError("engine=vllm: vLLM is not installed in this environment")
    if engine == "vllm" and device != "auto":
        raise ValueError(f"engine=vllm device={device}: vLLM takes the GPU that it finds, expected no device")
    if engine not in ("vllm", "transformers"):
        raise ValueError(f"engine={engine}: expected auto, vllm or transformers")
    return engine


def _tokens(engine: TextEngine, words: tuple[str, ...]) -> list[int]:
    """The id of each word. ValueError for one that the model writes in several tokens."""
    ids = [engine.chat.text(word) for word in words]
    for word, found in zip(words, ids, strict=True):
        if len(found) != 1:
            raise ValueError(f"{word!r} is {len(found)} tokens of this model, expected an answer of one token")
    return [found[0] for found in ids]


@cache
def _load(model: str, engine: str, device: str, dtype: str) -> TextEngine:
    """The engine with the model in it. ValueError where weights are missing."""
    place, kind = device_and_dtype(device, dtype)
    if engine == "vllm":
        return VllmEngine(model, kind)
    config = AutoConfig.from_pretrained(model)
    loaded, info = KINDS[config.model_type].from_pretrained(model, dtype=kind, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{model}: {len(info['missing_keys'])} weights are missing, e.g. {min(info['missing_keys'])}")
    return TransformersEngine(loaded.to(place).eval(), ChatFormat(model, config))

"""vLLM as the writer of a run, with the embedded model, against transformers in this process."""

import os
import signal
from types import SimpleNamespace

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from actors import text_engine
from actors.config import RolloutConfig
from actors.pool import RolloutPool
from actors.resources import plan
from actors.text_engine import start_text_engine
from actors.transport import SharedFileTransfer
from actors.weights import WeightLayout, checksum, layout_of
from actors.worker import BaseWorker, Worker
from tests.helpers.driver import stage_context
from tests.helpers.vllm import needs_vllm
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.driver.evaluation import answer_questions
from vargpt_rl.model.adapter import AdapterConfig
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.prompt import REPLY
from vargpt_rl.storage.adapter import write_fresh_adapter
from vargpt_rl.storage.checkpoint import WEIGHTS, Policy, save_checkpoint
from vargpt_rl.text.layout import is_text

SIDE = 224
SOURCE = ShapesSource(ShapesConfig())
ASKED = [(key, question) for key, question, _ in SOURCE.questions(48, 0, "held_out")]
TEXTS = [prompt.text for prompt in SOURCE.prompts("held_out", 24, 0)]


@pytest.fixture(scope="module")
def text():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = RolloutConfig(text_engine="vllm")
    yield start_text_engine(
        config, plan([ray.cluster_resources()], config, ranks=1, dtype="fp32"), str(EMBEDDED), SOURCE
    )
    ray.shutdown()


@pytest.fixture(scope="module")
def worker():
    return Worker(str(EMBEDDED), SOURCE, threads=2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The embedded model's weights with noise: of the vision tower, of what understanding trains, of what draws.

    The noise is so loud that some answers and most replies are others, and some replies never end.
    """
    whole = load_file(EMBEDDED / "model.safetensors")
    noises = {
        "vision": (1.2, "model.visual."),
        "understanding": (0.7, "model.language_model.", "lm_head.", "model.visual.merger."),
        "decoder": (0.3, "image_decoder.", "projector_"),
        "half a layer": (0.3, "model.language_model.layers.0.self_attn.q_proj."),
    }
    folder = tmp_path_factory.mktemp("sets")
    for name, (noise, *starts) in noises.items():
        generator = torch.Generator().manual_seed(1)
        chosen = {key: tensor.float() for key, tensor in whole.items() if key.startswith(tuple(starts))}
        noisy = {
            key: tensor + noise * tensor.std(unbiased=False) * torch.randn(tensor.shape, generator=generator)
            for key, tensor in chosen.items()
        }
        save_file(noisy, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in noises}


def everything(writer: RolloutPool | Worker) -> tuple[list[str], list[str | None]]:
    """Answers about images, and replies before images."""
    if isinstance(writer, Worker):
        return writer.answer(ASKED, SIDE), writer.reply(TEXTS, 24)
    return writer.run(BaseWorker.answer, ASKED, SIDE), writer.run(BaseWorker.reply, TEXTS, 24)


@needs_vllm
def test_vllm_equals_transformers_after_every_swap(text, worker, sets):
    answers, replies = everything(worker)
    assert everything(text) == (answers, replies)
    assert replies == [REPLY] * len(TEXTS) and len(set(answers)) > 5
    assert text.run(BaseWorker.reply, TEXTS, 3) == worker.reply(TEXTS, 3) == [None] * len(TEXTS), (
        "too short for a reply"
    )

    # The same requests are asked again after each swap: whatever a cache kept of the old weights would show.
    said = [(answers, replies)]
    for version, name in enumerate(("vision", "understanding", "decoder"), start=1):
        report = text.publish(sets[name], version)
        worker.receive(version, checksum(sets[name]), SharedFileTransfer(layout_of(sets[name]), sets[name]))
        assert report.verified and text.status()[0]["version"] == version
        assert report.checksum == checksum(sets[name], is_text)
        said.append(everything(text))
        assert said[-1] == everything(worker), name
    (start, seen, understood, drawn), _ = zip(*said, strict=True)
    assert start != seen, "the vision tower changes what is said of images"
    assert seen != understood, "and so does the language model"
    assert said[0][1] == said[1][1] != said[2][1], "the language model alone what is said before them"
    assert None in said[2][1] and len(set(said[2][1])) > 5
    assert understood == drawn and report.bytes == 0, "what draws does not concern it"


@needs_vllm
def test_vllm_writes_with_the_adapter_that_the_workers_have(text, tmp_path):
    adapter = AdapterConfig("lora", rank=4, targets=["language_model"])
    write_fresh_adapter(str(EMBEDDED), adapter, tmp_path / "start", 0, torch.float32)
    torch.manual_seed(0)
    fresh = load_file(tmp_path / "start" / WEIGHTS)
    save_checkpoint(tmp_path / "tuned", {name: 0.3 * torch.randn_like(tensor) for name, tensor in fresh.items()})
    engine = start_text_engine(text.config, SimpleNamespace(text=text.plan), str(EMBEDDED), SOURCE, adapter=adapter)
    worker = Worker(str(EMBEDDED), SOURCE, threads=2, adapter=adapter)
    said = []
    for version, name in enumerate(("start", "tuned", "start"), start=1):
        path = tmp_path / name / WEIGHTS
        assert engine.publish(path, version).verified
        worker.receive(version, checksum(path), SharedFileTransfer(layout_of(path), path))
        said.append(engine.run(BaseWorker.answer, ASKED, SIDE))
        # Random matrices make near ties of words, which two programs may round apart: rarely, where weights are equal.
        same = [own == other for own, other in zip(said[-1], worker.answer(ASKED, SIDE), strict=True)]
        assert sum(same) >= 0.9 * len(same), name
    assert said[0] == said[2] != said[1]
    engine.close()


@needs_vllm
def test_a_set_that_does_not_fit_changes_nothing(text, sets):
    before, half = everything(text), sets["half a layer"]
    with pytest.raises(ValueError, match=r"k_proj.bias is missing: the set has other tensors of layer .*qkv_proj"):
        ray.get(
            text.workers.handles[0].receive.remote(
                text.version + 1, checksum(half), SharedFileTransfer(layout_of(half), half)
            )
        )
    assert everything(text) == before and text.status()[0]["version"] == text.version


@needs_vllm
def test_a_killed_engine_is_replaced(text):
    before, pid = everything(text), text.status()[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    assert everything(text) == before
    assert text.workers.restarts == 1 and text.status()[0]["pid"] != pid


@needs_vllm
def test_evaluation_questions_use_the_engine(text, worker, tmp_path):
    """The same accuracy as that of the workers, with the weights that are being served."""
    asked = []
    counting = SimpleNamespace(run=lambda *args: asked.append(args) or text.run(*args))
    alone = SimpleNamespace(run=lambda method, *args: method(worker, *args))
    settings = ["evaluation.questions=64", f"data.seen_side={SIDE}"]
    theirs = answer_questions(stage_context(tmp_path / "alone", *settings, pool=alone, source=SOURCE), Policy(""))
    engine = stage_context(tmp_path / "engine", *settings, pool=SimpleNamespace(), text=counting, source=SOURCE)
    assert answer_questions(engine, Policy("")) == theirs
    assert len(asked) == 1 and theirs["n"] == 64


class RecordingEngine:
    """Keeps what is swapped into it."""

    def __init__(self, folder: str, dtype: torch.dtype):
        self.shapes: dict = {}
        self.swapped: dict[str, torch.Tensor] = {}

    def swap(self, version: int, tensors: dict[str, torch.Tensor]) -> None:
        self.swapped |= tensors


def test_an_adapters_set_reaches_the_engine_as_whole_layers(monkeypatch, tmp_path):
    monkeypatch.setattr(text_engine, "VllmEngine", RecordingEngine)
    adapter = AdapterConfig("lora", rank=2, targets=["q_proj"])
    write_fresh_adapter(str(EMBEDDED), adapter, tmp_path / "start", 0, torch.float32)
    fresh = load_file(tmp_path / "start" / WEIGHTS)
    tuned = save_checkpoint(tmp_path / "tuned", {name: tensor + 0.1 for name, tensor in fresh.items()})
    path = tuned / WEIGHTS
    worker = text_engine.VllmWorker(str(EMBEDDED), SOURCE, threads=1, adapter=adapter)
    worker.receive(1, checksum(path, is_text), SharedFileTransfer(layout_of(path, is_text), path))
    assert worker.status()["checksum"] == checksum(path, is_text)
    assert {name.split(".")[-2] for name in worker.engine.swapped} == {"q_proj", "k_proj", "v_proj"}
    with pytest.raises(ValueError, match="expected a pair of matrices"):
        worker.check_layout(WeightLayout({"model.language_model.other.lora_A.default.weight": (2, 8)}, {}))

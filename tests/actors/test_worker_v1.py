"""A worker with a v1 model: indices travel packed, and everything a worker does holds for them."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from actors.transport import SharedFileTransfer
from actors.weights import checksum, layout_of
from actors.worker import Failure, Worker
from tests.helpers.tiny import V1_CODES, V1_SIDES, Patches, tiny_v1_checkpoint
from vargpt_rl.data.samples import Prompt
from vargpt_rl.model.bits import pack, unpack
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.likelihood import symbol_log_probs
from vargpt_rl.model.unified import Drawing

SIDE = 16 * V1_SIDES[-1]
TOKENS = sum(side**2 for side in V1_SIDES)
SAMPLING = SamplingConfig(cfg=1.5, tau=1.0, top_p=0.96)
PROMPTS = [Prompt("p0", "Please draw a red circle.", "Here is an image."), Prompt("p1", "a star"), Prompt("p2", "two")]


@pytest.fixture(scope="module")
def worker(v1_checkpoint):
    return Worker(str(v1_checkpoint), Patches(), threads=1)


@pytest.fixture(scope="module")
def samples(worker):
    return worker.generate_images(list(zip(PROMPTS, [3, 4, 5], strict=True)), SIDE, SAMPLING, "sft/step-10")


@pytest.fixture(scope="module")
def drawn(samples):
    return [(sample.prompt, sample.bits) for sample in samples]


def test_samples_are_indices_packed_in_as_few_bits_as_they_need(samples):
    width = (V1_CODES - 1).bit_length()
    for sample in samples:
        assert len(sample.bits) == -(-TOKENS * width // 8)
        indices = unpack(sample.bits, TOKENS, 1, V1_CODES)
        assert indices.max() < V1_CODES and len(np.unique(indices)) > 1
    assert len({sample.bits for sample in samples}) == 3


def test_score_is_the_teacher_forced_log_probability_under_the_condition_of_drawing(worker, drawn):
    assert worker.model.draws_unconditionally
    for (prompt, packed), score in zip(drawn, worker.score(drawn, SIDE), strict=True):
        labels = torch.from_numpy(unpack(packed, TOKENS, 1, V1_CODES))[None]
        ids = torch.tensor([worker.chat.drawn(prompt.text, prompt.reply, TOKENS).ids])
        with torch.no_grad():
            tokenizer = worker.model.image_tokenizer
            inputs = tokenizer.replay(labels, tokenizer.schedule_for(SIDE)).inputs_BLd
            drawing = Drawing(inputs, (SIDE, SIDE), torch.ones(1, dtype=torch.bool))
            logits = worker.model(ids, drawing=drawing).image_logits
        expected = symbol_log_probs(logits, labels).double().sum().item()
        assert score.total == pytest.approx(expected, abs=1e-4)
        assert sum(score.by_scale) == pytest.approx(score.total, abs=1e-9)
        assert len(score.hits_by_scale) == len(V1_SIDES)


def test_images_are_encoded_and_written(worker, drawn, tmp_path):
    red, missing, blue = worker.encode(["red", "no such colour", "blue"], SIDE)
    assert isinstance(missing, Failure)
    assert red.features.shape == (8, V1_SIDES[-1], V1_SIDES[-1]) and red.features.dtype == np.float16
    pixels = torch.full((1, 3, SIDE, SIDE), -1.0)
    pixels[:, 2] = 1
    with torch.no_grad():
        labels = worker.model.image_tokenizer.encode(pixels).labels_BLs
    assert blue.bits == pack(labels[0].numpy(), V1_CODES)
    paths = worker.write_images([(drawn[0], "a.png")], SIDE, str(tmp_path))
    assert Image.open(paths[0]).size == (SIDE, SIDE)
    sizes = worker.reward(drawn, SIDE, lambda images, prompts: [image.size[0] for image in images])
    assert sizes == [SIDE] * 3


def test_an_answer_does_not_depend_on_its_neighbours(worker):
    questions = [("red", "What colour is the square?"), ("#102030", "How many circles are there?"), ("blue", "?")]
    together = worker.answer(questions, SIDE, 8)
    assert together == [worker.answer([question], SIDE, 8)[0] for question in questions]
    assert len(set(together)) > 1


def test_new_weights_are_verified_and_change_the_scores(v1_checkpoint, drawn, tmp_path):
    worker = Worker(str(v1_checkpoint), Patches(), threads=1)
    other = tiny_v1_checkpoint(tmp_path / "other", seed=1) / "model.safetensors"
    before = worker.score(drawn, SIDE)
    worker.receive(1, checksum(other), SharedFileTransfer(layout_of(other), other))
    assert worker.score(drawn, SIDE) != before
    head = tmp_path / "head.safetensors"
    save_file({"image_decoder.head.bias": torch.ones(V1_CODES)}, head)
    with pytest.raises(RuntimeError, match="checksum"):
        worker.receive(2, "0" * 32, SharedFileTransfer(layout_of(head), head))


def test_another_resolution_than_the_models_own_is_refused(worker):
    with pytest.raises(ValueError, match=f"this model draws {SIDE}x{SIDE} pixels only"):
        worker.generate_images([(PROMPTS[0], 1)], 2 * SIDE, SAMPLING, "")

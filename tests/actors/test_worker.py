import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from actors.transport import SharedFileTransfer
from actors.weights import checksum, layout_of
from actors.worker import Failure, Worker
from tests.helpers.tiny import BITS, Patches, tiny_checkpoint
from vargpt_rl.data.batches import DrawExample, SftCollator, shown_image
from vargpt_rl.data.samples import Prompt
from vargpt_rl.inference.conversation import Conversation
from vargpt_rl.model.bits import Bits, unpack
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.likelihood import bit_log_probs
from vargpt_rl.model.prompt import REPLY
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.model.unified import Drawing

SIDE = 64
SCHEDULE = schedule_for(SIDE)
SAMPLING = SamplingConfig(cfg=2.0, tau=0.7)
PROMPTS = [
    Prompt("p0", "Please draw a red circle.", "Here is an image."),
    Prompt("p1", "two small blue squares above a large green triangle, left of a star"),
    Prompt("p2", "a star", "Here:"),
]


@pytest.fixture(scope="module")
def shared(checkpoint):
    return Worker(str(checkpoint), Patches(), threads=1)


@pytest.fixture
def worker(checkpoint):
    """One whose weights a test may change."""
    return Worker(str(checkpoint), Patches(), threads=1)


@pytest.fixture(scope="module")
def samples(shared):
    return shared.generate_images(list(zip(PROMPTS, [3, 4, 5], strict=True)), SIDE, SAMPLING, "sft/step-10")


@pytest.fixture(scope="module")
def drawn(samples):
    return [(sample.prompt, sample.bits) for sample in samples]


def test_samples_carry_their_provenance(samples):
    assert [sample.prompt for sample in samples] == PROMPTS
    assert [sample.seed for sample in samples] == [3, 4, 5]
    first = samples[0]
    assert (first.resolution, first.version, first.checkpoint) == (SIDE, 0, "sft/step-10")
    assert first.sampling == {"cfg": 2.0, "tau": 0.7, "top_k": 900, "top_p": 0.97}
    bits_Ld = unpack(first.bits, token_count(SCHEDULE), BITS)
    assert 0 < bits_Ld.mean() < 1


def test_a_sample_depends_on_prompt_and_seed_and_not_on_its_neighbours(shared, samples):
    def draw(*jobs):
        return [sample.bits for sample in shared.generate_images(list(jobs), SIDE, SAMPLING, "")]

    alone = [draw((sample.prompt, sample.seed))[0] for sample in samples]
    assert alone == [sample.bits for sample in samples]
    assert draw((PROMPTS[0], 8))[0] != samples[0].bits
    assert draw((PROMPTS[1], 3))[0] != samples[0].bits


def test_score_is_the_teacher_forced_log_probability(shared, drawn):
    for (prompt, packed), score in zip(drawn, shared.score(drawn, SIDE), strict=True):
        tokens = token_count(SCHEDULE)
        bits_1Ld = torch.from_numpy(unpack(packed, tokens, BITS))[None]
        ids = torch.tensor([shared.chat.drawn(prompt.text, prompt.reply, tokens).ids])
        drawing = Drawing(Bits().replay(bits_1Ld, SCHEDULE).inputs_BLd, (SIDE, SIDE))
        with torch.no_grad():
            logits = shared.model(ids, drawing=drawing).image_logits
        expected = bit_log_probs(logits, bits_1Ld).double().sum().item()
        assert score.total == pytest.approx(expected, abs=1e-4)
        assert sum(score.by_scale) == pytest.approx(score.total, abs=1e-9)
        assert len(score.hits_by_scale) == len(SCHEDULE)
        assert all(0 <= hits <= 1 for hits in score.hits_by_scale)


def test_score_alone_is_score_in_a_batch(shared, drawn):
    together = shared.score(drawn, SIDE)
    alone = [shared.score([item], SIDE)[0] for item in drawn]
    assert [score.total for score in together] == pytest.approx([score.total for score in alone], abs=1e-4)
    assert len({round(score.total, 2) for score in alone}) == len(drawn), "scores that tell images apart"


EDITS = [
    replace(PROMPTS[0], shown="red", shown_side=SIDE),
    PROMPTS[1],
    replace(PROMPTS[2], shown="blue", shown_side=2 * SIDE),
]


@pytest.fixture(scope="module")
def edited(shared):
    return shared.generate_images(list(zip(EDITS, [3, 4, 5], strict=True)), SIDE, SAMPLING, "")


def test_an_edit_depends_on_the_image_shown_and_not_on_its_neighbours(shared, samples, edited):
    alone = [
        shared.generate_images([(p, seed)], SIDE, SAMPLING, "")[0] for p, seed in zip(EDITS, [3, 4, 5], strict=True)
    ]
    assert [sample.bits for sample in alone] == [sample.bits for sample in edited]
    assert edited[1].bits == samples[1].bits, "a prompt that shows nothing draws as ever"
    assert edited[0].bits != samples[0].bits
    assert shared.generate_images([(replace(EDITS[0], shown="blue"), 3)], SIDE, SAMPLING, "")[0].bits != edited[0].bits
    assert [sample.prompt for sample in edited] == EDITS


def test_an_edit_is_drawn_as_in_a_conversation(shared, edited):
    image = shared.source.load("red", SIDE)
    talk = Conversation(shared.model, shared.chat, (SIDE, SIDE), SAMPLING, seed=3)
    prompt = replace(EDITS[0], reply=REPLY)
    drawn = talk.say(prompt.text, [image], draw=True)[1]
    sample = shared.generate_images([(prompt, 3)], SIDE, SAMPLING, "")[0]
    assert (unpack(sample.bits, token_count(SCHEDULE), BITS) == drawn.bits_Ld.numpy()).all()


def test_an_edit_is_scored_as_the_training_batch_would_be(shared, edited):
    items = [(sample.prompt, sample.bits) for sample in edited]
    together = [score.total for score in shared.score(items, SIDE)]
    assert together == pytest.approx([shared.score([item], SIDE)[0].total for item in items], abs=1e-4)
    tokens = token_count(SCHEDULE)
    prompt, packed = items[0]
    bits_1Ld = torch.from_numpy(unpack(packed, tokens, BITS))[None]
    features = np.zeros((BITS, SIDE // 16, SIDE // 16), np.float16)
    batch = SftCollator(shared.chat)([DrawExample(prompt, features, shown_image(prompt, shared.source, shared.chat))])
    drawing = Drawing(Bits().replay(bits_1Ld, SCHEDULE).inputs_BLd, (SIDE, SIDE))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    with torch.no_grad():
        logits = shared.model(**inputs, drawing=drawing).image_logits
    assert together[0] == pytest.approx(bit_log_probs(logits, bits_1Ld).double().sum().item(), abs=1e-4)


def test_images_that_cannot_be_shown_are_told(shared):
    good, bad = shared.find_unreadable(["red", "no such colour"], SIDE)
    assert good is None and bad.key == "no such colour" and bad.reason.startswith("ValueError: ")


def test_a_check_sees_whole_prompts(shared, drawn):
    def check(images: list[Image.Image], prompts: list[Prompt]) -> list[tuple[int, str]]:
        return [(image.width, prompt.id) for image, prompt in zip(images, prompts, strict=True)]

    assert shared.check(drawn, SIDE, check) == [(SIDE, "p0"), (SIDE, "p1"), (SIDE, "p2")]


def test_images_are_encoded_and_failures_told(shared):
    red, missing, blue = shared.encode(["red", "no such colour", "blue"], SIDE)
    assert missing == Failure("no such colour", missing.reason)
    assert missing.reason.startswith("ValueError: ")
    assert shared.encode(["no such colour"], SIDE) == [missing]
    assert (red.key, blue.key) == ("red", "blue")
    assert red.features.shape == (BITS, SIDE // 16, SIDE // 16)
    assert red.features.dtype == np.float16
    image_13HW = torch.zeros(1, 3, SIDE, SIDE) - 1
    image_13HW[:, 0] = 1
    with torch.no_grad():
        features_1dhw = shared.model.image_tokenizer.features(image_13HW)
    np.testing.assert_allclose(red.features, features_1dhw[0], atol=2e-3)
    expected_1Ld = Bits().quantise(features_1dhw, SCHEDULE).labels_BLs
    assert (unpack(red.bits, token_count(SCHEDULE), BITS) == expected_1Ld[0].numpy()).all()


def test_rewards_see_images_and_prompts(shared, drawn):
    def rewards(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        assert [image.size for image in images] == [(SIDE, SIDE)] * 3
        assert prompts == [prompt.text for prompt in PROMPTS]
        return [1, math.nan, None]

    assert shared.reward(drawn, SIDE, rewards) == [1.0, None, None]
    with pytest.raises(ValueError, match="2 values for 3 images"):
        shared.reward(drawn, SIDE, lambda images, prompts: [0.0, 0.0])


def test_images_are_written_whole(shared, drawn, tmp_path):
    paths = shared.write_images([(drawn[0], "a.png"), (drawn[1], "b.png")], SIDE, str(tmp_path))
    assert sorted(tmp_path.iterdir()) == paths
    assert Image.open(paths[0]).size == (SIDE, SIDE)
    assert np.ptp(np.asarray(Image.open(paths[0]))) > 0


def test_an_answer_does_not_depend_on_its_neighbours(shared):
    questions = [("red", "What colour is the square?"), ("#102030", "How many circles are there?"), ("blue", "?")]
    together = shared.answer(questions, SIDE, 8)
    assert together == [shared.answer([question], SIDE, 8)[0] for question in questions]
    assert len(set(together)) > 1
    assert not any("<|" in answer for answer in together)


def test_new_weights_are_verified_and_change_the_scores(worker, drawn, tmp_path_factory):
    other = tiny_checkpoint(tmp_path_factory.mktemp("other"), seed=1) / "model.safetensors"
    before = worker.score(drawn, SIDE)
    answer = worker.receive(2, checksum(other), SharedFileTransfer(layout_of(other), other))
    assert (answer["version"], answer["checksum"]) == (2, checksum(other))
    assert answer["bytes"] == sum(tensor.nbytes for tensor in load_file(other).values())
    assert worker.score(drawn, SIDE) != before
    assert worker.generate_images([(PROMPTS[0], 3)], SIDE, SAMPLING, "")[0].version == 2
    status = worker.status()
    assert (status["version"], status["checksum"], status["device"]) == (2, checksum(other), "cpu")


@pytest.fixture
def head(shared, tmp_path):
    """A set of one tensor, and its checksum."""
    path = tmp_path / "head.safetensors"
    save_file({"lm_head.weight": shared.model.lm_head.weight.detach() + 1}, path)
    return checksum(path), SharedFileTransfer(layout_of(path), path)


def test_an_older_version_is_refused(worker, head):
    worker.receive(3, *head)
    with pytest.raises(ValueError, match="version 2 is older than the worker's own, 3"):
        worker.receive(2, *head)
    assert worker.status()["version"] == 3


def test_a_damaged_set_makes_the_worker_stale(worker, drawn, head):
    with pytest.raises(RuntimeError, match="checksum"):
        worker.receive(1, "0" * 32, head[1])
    with pytest.raises(RuntimeError, match="stale"):
        worker.score(drawn, SIDE)
    worker.receive(1, *head)
    worker.score(drawn, SIDE)


def test_a_set_that_breaks_off_makes_the_worker_stale(worker, drawn, head):
    class Torn(SharedFileTransfer):
        def chunks(self):
            yield from super().chunks()
            raise OSError("connection lost")

    with pytest.raises(OSError, match="connection lost"):
        worker.receive(1, head[0], Torn(head[1].layout, head[1].path))
    with pytest.raises(RuntimeError, match="stale"):
        worker.score(drawn, SIDE)


def test_a_set_that_does_not_fit_changes_nothing(worker, drawn, tmp_path):
    path = tmp_path / "other.safetensors"
    head = worker.model.lm_head.weight.detach()
    save_file({"lm_head.weight": head + 1, "nobody": torch.zeros(2)}, path)
    before = worker.score(drawn, SIDE)
    with pytest.raises(KeyError, match="nobody"):
        worker.receive(1, checksum(path), SharedFileTransfer(layout_of(path), path))
    assert worker.score(drawn, SIDE) == before and worker.status()["version"] == 0


def test_a_replacement_serves_nothing_before_the_current_version(checkpoint, drawn, head):
    late = Worker(str(checkpoint), Patches(), threads=1, version_required=2)
    for version in (0, 1):
        with pytest.raises(RuntimeError, match=f"stale worker: holds version {version}, needs 2"):
            late.score(drawn, SIDE)
        late.receive(version + 1, *head)
    assert len(late.score(drawn, SIDE)) == len(drawn)


def test_guidance_and_temperature_reach_the_sampler(shared, samples):
    sure = replace(SAMPLING, top_k=1)
    a, b = (shared.generate_images([(PROMPTS[0], seed)], SIDE, sure, "")[0].bits for seed in (1, 2))
    assert a == b, "top_k=1 leaves nothing to the seed"

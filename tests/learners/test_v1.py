"""A v1 model in every stage on two real ranks, scored by a worker; its image tokenizer; its losses."""

import numpy as np
import pytest
import ray
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from actors.worker import Worker
from learners.config import DpoConfig, LearnerConfig, Recipe
from learners.group import LearnerGroup
from learners.image_tokenizer import reconstruction_loss, train_image_tokenizer
from learners.jobs import DpoJob, TokenizerJob
from tests.helpers.streams import corpus_of, sft_job
from tests.helpers.tiny import V1_CODES, V1_SIDES, Patches
from vargpt_rl.data.batches import DrawExample, SftCollator, TextExample
from vargpt_rl.data.preferences import write_table
from vargpt_rl.data.samples import ImageQuestion, Probe, Prompt
from vargpt_rl.losses.supervised import Noise, forward_batch, sft_loss
from vargpt_rl.model.bits import pack
from vargpt_rl.model.families import load_model
from vargpt_rl.model.v1.image_tokenizer import PATIENCE, conv_of_scale
from vargpt_rl.stages import NO_NOISE, STAGES, freeze
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint

SIDE = 16 * V1_SIDES[-1]
TOKENS = sum(side**2 for side in V1_SIDES)
PROMPT = Prompt("p", "a red circle", "Here:")
STEPS = 3
SFT_CONDITION = "image_decoder.class_embedding.weight"


def random_indices(seed: int, count: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [pack(rng.integers(0, V1_CODES, (TOKENS, 1), np.int32), V1_CODES) for _ in range(count)]


@pytest.fixture(scope="module")
def batch(v1_chat):
    """Two drawings and a question."""
    rng, draw = np.random.default_rng(0), []
    for text in ("a star", "two small blue squares"):
        features = rng.standard_normal((8, *[V1_SIDES[-1]] * 2)).astype(np.float16)
        draw.append(DrawExample(Prompt("0", text, "Here:"), features))
    return SftCollator(v1_chat)([draw[0], TextExample("How many circles are there?", "three"), draw[1]])


def test_the_loss_is_cross_entropy_over_the_codebook_with_equal_weights(v1_model, batch):
    with torch.no_grad():
        output, labels = forward_batch(v1_model, batch, NO_NOISE, text_logits=True)
        loss, metrics = sft_loss(v1_model, batch, NO_NOISE, 1.0)
        features = batch["features"].float()
        expected = v1_model.image_tokenizer.quantise(features, v1_model.image_tokenizer.schedule_for(SIDE)).labels_BLs
    assert torch.equal(labels, expected)
    image = F.cross_entropy(output.image_logits.flatten(0, 1), labels.flatten().long())
    assert metrics["loss/image"] == pytest.approx(image.item(), abs=1e-5)
    assert loss.item() == pytest.approx(metrics["loss/text"] + metrics["loss/image"], abs=1e-5)
    hits = (output.image_logits.argmax(-1) == labels[..., 0]).float()
    assert metrics["index_accuracy"] == pytest.approx(hits.mean().item())
    assert {f"index_accuracy/scale_{k}" for k in range(len(V1_SIDES))} <= metrics.keys()


def test_indices_are_never_flipped_but_conditions_and_paths_are_dropped(v1_model, batch):
    def losses(noise: Noise) -> set[float]:
        torch.manual_seed(0)
        with torch.no_grad():
            return {sft_loss(v1_model, batch, noise, 0.0)[0].item() for _ in range(4)}

    assert len(losses(Noise(0.9, 0.0, 0.0))) == 1
    for noise in (Noise(0.0, 0.5, 0.0), Noise(0.0, 0.0, 6.0)):  # a rate of 0.5 in a decoder of 2 blocks
        assert len(losses(noise)) > 1, noise


def test_supervised_training_conditions_as_published_and_scoring_as_drawing_does(v1_model, batch):
    with torch.no_grad():
        supervised = forward_batch(v1_model, batch, NO_NOISE, text_logits=False)[0].image_logits
        dropped = forward_batch(v1_model, batch, Noise(0.0, 1.0, 0.0), text_logits=False)[0].image_logits
    assert (supervised - dropped).abs().max() > 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_the_same_parts_as_in_the_other_family(v1_model, stage):
    names = freeze(v1_model, STAGES[stage])
    image = ("image_decoder.", "projector_in.", "projector_out.")
    language = ("lm_head.", "model.language_model.")
    every = (*image, *language, "model.vision_tower.", "model.multi_modal_projector.")
    parts = {
        "base": every,
        "edit": every,
        "pretrain": image[1:],
        "understanding": (*language, "model.multi_modal_projector."),
    }.get(stage, image)
    unreached = ("model.vision_tower.post_layernorm.", "model.vision_tower.encoder.layers.1.")
    found = (name for name, _ in v1_model.named_parameters() if name.startswith(parts))
    assert names == sorted(name for name in found if not name.startswith(unreached))


def test_no_loss_reaches_what_is_left_out(v1_model, v1_chat):
    shown = v1_chat.vision_inputs([Image.new("RGB", (28, 28), "red")])
    features = np.random.default_rng(0).standard_normal((8, *[V1_SIDES[-1]] * 2)).astype(np.float16)
    batch = SftCollator(v1_chat)([DrawExample(PROMPT, features, shown)])
    v1_model.requires_grad_(True)
    sft_loss(v1_model, batch, NO_NOISE, 1.0)[0].backward()
    idle = {name for name, p in v1_model.named_parameters() if p.grad is None and "image_tokenizer." not in name}
    assert idle == {name for name, _ in v1_model.named_parameters() if name.startswith(v1_model.unreached)}
    v1_model.zero_grad(set_to_none=True)


def test_a_part_can_be_frozen_by_its_name_in_either_family():
    stage = STAGES["understanding"]
    assert stage.without(["model.multi_modal_projector"]) == stage.without(["model.visual.merger"])


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def group(cluster):
    group = LearnerGroup(LearnerConfig(ranks=2), {"CPU": 0.5}, threads=1, use_gpu=False)
    yield group
    group.close()


@pytest.fixture(scope="module")
def start(v1_checkpoint):
    return Policy(str(v1_checkpoint))


@pytest.fixture(scope="module")
def probe():
    return Probe(PROMPT, random_indices(1, 1)[0], SIDE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    features = np.random.default_rng(0).standard_normal((12, 8, *[V1_SIDES[-1]] * 2))
    questions = [ImageQuestion("red", "What colour is the square?", "red"), ImageQuestion("blue", "How many?", "three")]
    return corpus_of(tmp_path_factory.mktemp("corpus"), features, questions)


@pytest.fixture(scope="module")
def table(v1_checkpoint, tmp_path_factory):
    """Pairs of random indices, scored by a worker in the micro-batches that the learner begins with."""
    worker, indices = Worker(str(v1_checkpoint), Patches(), threads=1), random_indices(2, 16)
    rows = []
    for at in range(0, 16, 4):
        scores = worker.score([(PROMPT, packed) for packed in indices[at : at + 4]], SIDE)
        for i in range(2):
            sides = {"chosen": at + i, "rejected": at + 2 + i}
            row = {"pair_id": f"pair-{at + i}", "prompt_id": f"prompt-{at + i}", "prompt": PROMPT.text}
            row |= {"reply": PROMPT.reply, "resolution": SIDE, "sampling": "{}", "reference_version": 0}
            for side, j in sides.items():
                row |= {f"{side}_bits": indices[j], f"{side}_source": "test", f"{side}_reward": None}
                row |= {f"{side}_seed": None, f"{side}_version": None}
                row[f"reference_{side}_logp"] = scores[j - at].total
                row[f"reference_{side}_by_scale"] = scores[j - at].by_scale
            rows.append(row)
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    write_table(path, rows)
    return path


@pytest.mark.parametrize(("stage", "zero"), [("understanding", 2), ("sft", 3), ("dpo", 3)])
def test_a_stage_trains_on_two_ranks_and_scores_as_a_worker_does(
    group, start, corpus, table, probe, tmp_path, stage, zero
):
    recipe = Recipe(steps=STEPS, batch=4, micro_batch=2, lr=1e-3, warmup_ratio=0.0, zero=zero)
    lines: list[dict] = []
    if stage == "dpo":
        result = group.run(
            DpoJob(start=start, table=table, recipe=recipe, dpo=DpoConfig(), output=tmp_path, seed=0, probe=probe),
            lines.append,
        )
        assert result["step0_max_abs_logratio"] <= 1e-4
        assert result["loss_first"] == pytest.approx(np.log(2), abs=1e-4)
        assert result["loss_last"] < result["loss_first"] and result["margin_last"] > 0
        assert {"index_accuracy/chosen/scale_0", "rewards/margins/scale_2"} <= lines[-1].keys() | lines[0].keys()
    else:
        stream = corpus if stage == "understanding" else corpus.at(SIDE)
        result = group.run(sft_job(stage, start, stream, recipe, tmp_path, probe), lines.append)
        assert "index_accuracy" in lines[0]
    trained = load_file(check_checkpoint(tmp_path / "final"))
    model = load_model(start.model, torch.float32)
    assert sorted(trained) == freeze(model, STAGES[stage])
    before = model.state_dict()
    assert {name for name in trained if torch.equal(trained[name], before[name])} <= {SFT_CONDITION}
    worker = Worker(start.model, Patches(), threads=1)
    worker.model.load_state_dict(trained, strict=False)
    assert result["probe"] == pytest.approx(worker.score([(PROMPT, probe.bits)], SIDE)[0].total, abs=1e-4)


def test_the_image_tokenizer_is_trained_with_its_codebook(group, start, tmp_path):
    job = TokenizerJob(
        start=start,
        keys=["red", "nothing", "blue"],
        source=Patches(),
        side=SIDE,
        steps=20,
        batch=2,
        lr=1e-2,
        output=tmp_path,
        seed=0,
    )
    result = group.run(job, lambda line: None)
    assert result["loss_last"] < result["loss_first"]
    after, before = load_file(check_checkpoint(tmp_path / "final")), load_file(f"{start.model}/model.safetensors")
    assert after.keys() == {name for name in before if name.startswith("image_tokenizer.")}
    unused = set(range(4)) - set(conv_of_scale(len(V1_SIDES), 4))
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert same == {f"image_tokenizer.residual.{conv}.{part}" for conv in unused for part in ("weight", "bias")}


def test_codes_learn_from_the_distance_and_features_from_the_images_too(v1_checkpoint):
    tokenizer = load_model(v1_checkpoint, "auto").image_tokenizer
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def gradients(criterion) -> dict[str, torch.Tensor]:
        tokenizer.zero_grad(set_to_none=True)
        tokenizer.training_loss(images, criterion).backward()
        return {name: p.grad.clone() for name, p in tokenizer.named_parameters() if p.grad is not None}

    with_images, without = gradients(reconstruction_loss), gradients(lambda output, target: 0 * output.sum())
    for name in ("codebook.weight", "residual.0.weight"):
        torch.testing.assert_close(with_images[name], without[name])
        assert without[name].abs().max() > 0
    assert (with_images["to_latent.weight"] - without["to_latent.weight"]).abs().max() > 1e-6


def test_codes_that_nothing_uses_begin_anew_where_they_are_of_use(v1_checkpoint):
    tokenizer = load_model(v1_checkpoint, "auto").image_tokenizer
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokenizer.codebook.weight[1:] = 1e3  # nothing is near these
    images = torch.rand(4, 3, SIDE, SIDE, generator=generator) * 2 - 1

    def used() -> int:
        with torch.no_grad():
            return len(tokenizer.encode(images).labels_BLs.unique())

    assert used() == 1
    torch.manual_seed(0)
    losses, steps = [], 2 * PATIENCE + 10  # those of the first round that found no use begin anew in the second
    train_image_tokenizer(tokenizer, iter(lambda: images, None), steps, 1e-3, lambda step, loss: losses.append(loss))
    assert used() > V1_CODES // 2
    assert losses[-1] < losses[0]

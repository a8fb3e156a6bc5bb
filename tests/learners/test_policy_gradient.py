"""Policy gradients on drawings: the loss in one process, and whole jobs that follow a driver's batches."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from learners.config import LearnerConfig, Recipe, RlConfig
from learners.grpo import PolicyGradientTrainer
from learners.image_policy import ImagePolicy
from learners.jobs import PolicyGradientJob, save_request, training_checkpoints
from learners.methods import ONLINE
from learners.policy_batches import PolicyBatches
from learners.rank import Rank
from tests.helpers.forks import FORKS
from tests.helpers.tiny import BITS
from vargpt_rl.common.network import free_port
from vargpt_rl.data.batches import PolicyBatchCollator
from vargpt_rl.data.policy_batches import STOP, batch_path, read_policy_batch, write_policy_batch
from vargpt_rl.data.samples import Probe, Prompt
from vargpt_rl.losses.credit import scale_credit, token_credit, weighted_sum
from vargpt_rl.model.bits import pack
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint, load_weights_into

SIDE = 64
SCHEDULE = schedule_for(SIDE)
TOKENS = token_count(SCHEDULE)
TAU = 0.5
MICRO = 2
BATCH = 4
STEPS, CUT = 3, 2
RECIPE = Recipe(steps=STEPS, batch=BATCH, micro_batch=MICRO, lr=1e-3, schedule="constant_with_warmup", warmup_ratio=0.0)
PROBE = Probe(Prompt("p", "a star", "Here:"), pack(np.zeros((TOKENS, BITS), np.uint8)), SIDE)


def drawings(model: ImagePolicy, chat: ChatFormat, step: int, count: int = BATCH) -> list[dict]:
    """Rows of a batch: random bits as if drawn and scored by ``model`` after ``step`` updates."""
    rng = np.random.default_rng(step)
    rows = [
        {
            "prompt_id": str(i),
            "prompt": "a red circle" if i % 2 else "two small blue squares",
            "reply": "Here:",
            "resolution": SIDE,
            "bits": pack(rng.integers(0, 2, (TOKENS, BITS)).astype(np.uint8)),
            "seed": i,
            "sampling": "{}",
            "tau": TAU,
            "version": step,
            "learner_step": step,
            "group": i // 2,
            "reward": float(i % 2),
            "advantage": [1.0 if i % 2 else -1.0],
            "sampler_by_scale": None,
            "reference_by_scale": None,
        }
        for i in range(count)
    ]
    for start in range(0, count, MICRO):
        part = rows[start : start + MICRO]
        batch = PolicyBatchCollator(chat)([row | {"weight": 1.0} for row in part])
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "bits", "resolution")}
        with torch.no_grad():
            scores = model.eval()(**inputs, tau=TAU).log_probs_BK
        for row, score in zip(part, scores.tolist(), strict=True):
            row |= {"sampler_by_scale": score, "reference_by_scale": score}
    return rows


@pytest.fixture
def policy(checkpoint):
    return ImagePolicy.from_pretrained(checkpoint)


@pytest.fixture
def trainer(policy, tmp_path):
    def build(method: str = "grpo", **settings) -> PolicyGradientTrainer:
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        batches = PolicyBatches(tmp_path, steps=1, updates=1, batch=BATCH, micro_batch=MICRO, collate=None)
        built = PolicyGradientTrainer(RlConfig(**settings), batches, ONLINE[method], model=policy, args=arguments)
        built.model.train()
        return built

    return build


def collated(chat, rows: list[dict], scales: int | None = None) -> dict:
    return PolicyBatchCollator(chat, scales)([row | {"weight": 1.0} for row in rows])


@pytest.mark.parametrize(("alpha", "scales"), [(0.0, None), (0.6, None), (0.6, 2)])
def test_the_first_update_has_ratio_1_and_the_policy_gradient(trainer, policy, chat, alpha, scales):
    rows = drawings(policy, chat, 0)
    batch = collated(chat, rows, scales)
    built = trainer(credit_alpha=alpha, credit_scales=scales)
    loss = built.compute_loss(built.model, batch)
    assert loss.item() == pytest.approx(0.0, abs=1e-6), "advantages of 1 and -1 at a ratio of 1"
    assert 0 <= built.first_update_max_abs_log_ratio <= 2e-4
    assert built.measured["ratio/max"][0].item() == pytest.approx(1.0, abs=1e-5)
    assert built.measured["clipped"][0].item() == 0
    loss.backward()
    found = policy.image_decoder.head.weight.grad.clone()

    policy.zero_grad()
    credit_L = token_credit(SCHEDULE, alpha, scales)[: token_count(SCHEDULE[:scales])]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "bits", "resolution")}
    sums_N = policy(**inputs, tau=TAU, credit_L=credit_L, scales=scales).log_probs.sum(1)
    (-(sums_N * batch["advantage"][:, 0]).mean() / (len(credit_L) * BITS)).backward()
    torch.testing.assert_close(found, policy.image_decoder.head.weight.grad)
    assert found.abs().max() > 0


def test_wrong_log_probabilities_stop_the_first_update(trainer, policy, chat):
    rows = drawings(policy, chat, 0)
    shifted = [row | {"sampler_by_scale": [value + 1.0 for value in row["sampler_by_scale"]]} for row in rows]
    built = trainer(credit_alpha=0.0)
    with pytest.raises(RuntimeError, match="step 0: log-probabilities of the sampler, .* differ by 3 nats"):
        built.compute_loss(built.model, collated(chat, shifted))
    stale = [row | {"learner_step": -1} for row in shifted]
    built.compute_loss(built.model, collated(chat, stale))
    assert built.measured["ratio"][0].item() < 1
    assert built.measured["staleness"][0].item() == 1
    untempered = [row | {"tau": 1.0} for row in rows]
    with pytest.raises(RuntimeError, match="another temperature"):
        built.compute_loss(built.model, collated(chat, untempered))


def test_kl_needs_a_reference_and_vanishes_at_it(trainer, policy, chat):
    rows = drawings(policy, chat, 0)
    built = trainer(kl=0.5)
    built.compute_loss(built.model, collated(chat, rows))
    built.state.global_step = 1
    assert built.measured["kl"][0].item() == pytest.approx(0.0, abs=1e-9)
    apart = [row | {"reference_by_scale": [value - 9.0 for value in row["reference_by_scale"]]} for row in rows]
    loss = built.compute_loss(built.model, collated(chat, apart))
    shift = weighted_sum(torch.full((1, len(SCHEDULE)), 9.0), scale_credit(SCHEDULE, 0.6)).item() / (TOKENS * BITS)
    assert loss.item() == pytest.approx(0.5 * (np.exp(-shift) - 1 + shift), abs=1e-6)
    with pytest.raises(ValueError, match="reference_by_scale is empty"):
        built.compute_loss(built.model, collated(chat, [row | {"reference_by_scale": None} for row in rows]))


def test_without_a_ratio_the_loss_is_the_weighted_likelihood(trainer, policy, chat):
    rows = [row | {"advantage": [1.0]} for row in drawings(policy, chat, 0)]
    by_scale = torch.tensor([row["sampler_by_scale"] for row in rows])
    expected = -weighted_sum(by_scale, scale_credit(SCHEDULE, 0.6)).mean().item() / (TOKENS * BITS)
    built = trainer("rft")
    loss = built.compute_loss(built.model, collated(chat, [row | {"sampler_by_scale": None} for row in rows]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_online_dpo_starts_at_ln_2_and_prefers_the_better_image(trainer, policy, chat):
    rows = drawings(policy, chat, 0)
    built = trainer("online_dpo", beta=0.1, credit_scales=2)
    batch = collated(chat, [row | {"sampler_by_scale": None} for row in rows], 2)
    loss = built.compute_loss(built.model, batch)
    assert loss.item() == pytest.approx(np.log(2), abs=1e-4) and built.first_update_max_abs_log_ratio > 0
    loss.backward()
    found = policy.image_decoder.head.weight.grad.clone()

    policy.zero_grad()
    credit_L = token_credit(SCHEDULE, 0.6, 2)[: token_count(SCHEDULE[:2])]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "bits", "resolution")}
    sums_N = policy(**inputs, tau=TAU, credit_L=credit_L, scales=2).log_probs.sum(1)
    margin = sums_N[1::2] - sums_N[::2]  # odd rows are the better
    (-0.05 * margin).mean().backward()  # the slope of -log sigmoid is -1/2 at 0
    torch.testing.assert_close(found, policy.image_decoder.head.weight.grad, atol=1e-6, rtol=1e-3)
    apart = [row | {"reference_by_scale": [value - 1 for value in row["reference_by_scale"]]} for row in rows]
    with pytest.raises(RuntimeError, match="log-probabilities of the reference"):
        built.compute_loss(built.model, collated(chat, apart, 2))


def test_prefix_and_rest_are_trained_apart(trainer, policy, chat):
    rows = [row | {"advantage": [row["advantage"][0], 0.0]} for row in drawings(policy, chat, 0)]
    built = trainer(completions=2, prefix_scales=2, credit_alpha=0.0)
    loss = built.compute_loss(built.model, collated(chat, rows))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    found = policy.image_decoder.head.weight.grad.clone()

    policy.zero_grad()
    coarse = trainer(credit_alpha=0.0, credit_scales=2)
    rows = [row | {"advantage": row["advantage"][:1]} for row in rows]
    share = token_count(SCHEDULE[:2]) / TOKENS
    (share * coarse.compute_loss(coarse.model, collated(chat, rows, 2))).backward()
    torch.testing.assert_close(found, policy.image_decoder.head.weight.grad, atol=1e-6, rtol=1e-3)


def loader(folder: Path, chat, **settings) -> PolicyBatches:
    given = {"steps": 2, "updates": 1, "batch": BATCH, "micro_batch": MICRO, "collate": PolicyBatchCollator(chat)}
    return PolicyBatches(folder, **(given | settings))


def test_a_batch_is_shared_over_ranks_and_padded(policy, chat, tmp_path):
    rows = drawings(policy, chat, 0, count=3)
    write_policy_batch(batch_path(tmp_path, 0), rows)
    assert read_policy_batch(batch_path(tmp_path, 0)) == rows
    (tmp_path / STOP).touch()
    (first,), (second,) = (list(loader(tmp_path, chat, rank=rank, ranks=2)) for rank in range(2))
    assert first["weight"].tolist() == pytest.approx([4 / 3, 4 / 3])
    assert second["weight"].tolist() == pytest.approx([4 / 3, 0.0])
    assert len(loader(tmp_path, chat, ranks=2)) == 2
    twice = list(loader(tmp_path, chat, updates=2))
    assert len(twice) == 4 and torch.equal(twice[0]["bits"], twice[2]["bits"])
    with pytest.raises(ValueError, match=r"batch-00000.parquet: 3 images, expected at most recipe.batch=2"):
        list(loader(tmp_path, chat, batch=2))


def test_a_request_to_save_is_served_while_waiting(chat, tmp_path):
    batches = loader(tmp_path, chat)
    batches.save_request = tmp_path / "save"
    batches.save_request.touch()

    def serve() -> None:
        batches.save_request.unlink()
        (tmp_path / STOP).touch()

    batches.on_save_request = serve
    assert list(batches) == [] and not batches.save_request.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "high"}, "column reward is not of type double"),
        ({"advantage": None}, "column advantage has 1 empty values"),
        ({"resolution": 32}, r"resolution is \[32, 64\]"),
        ({"extra": 1}, "missing or unknown columns: extra"),
    ],
)
def test_malformed_batches_are_refused(policy, chat, tmp_path, change, message):
    rows = drawings(policy, chat, 0, count=2)
    with pytest.raises(ValueError, match=message):
        write_policy_batch(tmp_path / "b.parquet", [rows[0], rows[1] | change])
    assert not list(tmp_path.iterdir())


def train(member: int, address: tuple[str, int], config: LearnerConfig, job: PolicyGradientJob, results) -> None:
    """One rank, in a process of its own."""
    rank = Rank(member, config, threads=1, use_gpu=False, bf16=False)
    rank.join(*address, own_address="127.0.0.1")
    results.put((member, rank.run(job)))


def run(checkpoint: Path, chat, output: Path, ranks: int, resume: Path | None = None) -> tuple[dict, list[dict]]:
    """A job whose driver draws each batch with the weights after the one before; batches that exist are kept.

    It asks for a training checkpoint after step ``CUT``, while the job waits for the next batch.
    """
    job = PolicyGradientJob(
        start=Policy(str(checkpoint)),
        batches=output / "batches",
        recipe=RECIPE,
        rl=RlConfig(),
        output=output,
        seed=0,
        probe=PROBE,
        resume=resume,
    )
    config = LearnerConfig(ranks=ranks, save_every=None)
    address = "127.0.0.1", free_port()
    results = FORKS.Queue()
    members = [
        FORKS.Process(target=train, args=(member, address, config, job, results), daemon=True)
        for member in range(ranks)
    ]
    for member in members:
        member.start()
    model = ImagePolicy.from_pretrained(checkpoint)
    for step in range(STEPS):
        weights = output / f"step-{step:06d}"
        if batch_path(job.batches, step).exists():
            continue
        while step and not (weights / "COMPLETE").exists():
            assert all(member.is_alive() for member in members)
            time.sleep(0.1)
        if step:
            load_weights_into(model, [weights])
        if step == CUT:
            save_request(output).touch()
            while save_request(output).exists():
                time.sleep(0.1)
        write_policy_batch(batch_path(job.batches, step), drawings(model, chat, step))
    found = dict(results.get(timeout=300) for _ in members)
    for member in members:
        member.join()
    lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return found[0], [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def runs(checkpoint, chat, tmp_path_factory) -> dict[str, tuple]:
    """Results, logs and final weights: of one rank, of the same resumed after step 2, and of two ranks."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    saved = training_checkpoints(folder / "whole") / f"checkpoint-{CUT:06d}"
    for name, ranks, resume in (("whole", 1, None), ("resumed", 1, saved), ("two", 2, None)):
        output = folder / name
        if name != "whole":
            shutil.copytree(folder / "whole/batches", output / "batches")
        result = run(checkpoint, chat, output, ranks, resume)
        found[name] = (*result, load_file(check_checkpoint(output / "final")))
    return found


@pytest.mark.timeout(900)
def test_a_job_follows_batches_drawn_with_its_own_weights(runs, checkpoint):
    result, lines, weights = runs["whole"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert 0 <= result["first_update_max_abs_log_ratio"] <= 2e-4, "asserted at each step, for each batch is new"
    assert result["waited"] > 0
    keys = {"ratio", "ratio/max", "clipped", "entropy", "log_prob", "staleness", "grad_norm", "learning_rate"}
    assert all(keys <= line.keys() for line in lines)
    assert all(line["staleness"] == 0 for line in lines)
    before = load_file(f"{checkpoint}/model.safetensors")
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in weights.items()) > 10


@pytest.mark.timeout(900)
def test_a_job_cut_between_batches_resumes_bitwise(runs):
    (result, lines, weights), (again, rest, resumed) = runs["whole"], runs["resumed"]
    assert [line["step"] for line in rest] == [3]
    timeless = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in (rest[0], lines[-1])]
    assert timeless[0] | {"epoch": 1.0} == timeless[1]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    assert again["probe"] == result["probe"]


@pytest.mark.timeout(900)
def test_two_ranks_train_as_one(runs):
    (result, lines, weights), (other, both, shared) = runs["whole"], runs["two"]
    assert all(line["ratio/max"] == pytest.approx(1.0, abs=1e-5) for line in both)
    assert [line["grad_norm"] for line in both] == pytest.approx([line["grad_norm"] for line in lines], rel=1e-2)
    assert both[0]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-4)
    assert other["probe"] == pytest.approx(result["probe"], abs=0.02)
    for name, tensor in weights.items():
        # AdamW's first steps are the signs of gradients, which differ where these are near 0
        assert (shared[name] - tensor).abs().mean() < 1e-4, name

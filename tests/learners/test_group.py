"""Every stage on two real ranks: Ray actors, DeepSpeed engines, checkpoints."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from actors.worker import Worker
from learners.config import DpoConfig, LearnerConfig, Recipe
from learners.group import LearnerGroup
from learners.jobs import DpoJob, SftJob
from learners.sft import SftTrainer
from tests.helpers.faults import ask
from tests.helpers.streams import corpus_of, feed_of, sft_job, write_sources
from tests.helpers.tiny import BITS, Patches, tiny_checkpoint
from vargpt_rl.common.failpoints import VARIABLE
from vargpt_rl.data.preferences import write_table
from vargpt_rl.data.samples import ImageQuestion, Probe, Prompt
from vargpt_rl.model.bits import Bits, pack
from vargpt_rl.model.likelihood import bit_log_probs, scale_sums
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.model.unified import Drawing
from vargpt_rl.stages import STAGES
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint

SIDE = 64
SCHEDULE = schedule_for(SIDE)
TOKENS = token_count(SCHEDULE)
PROMPT = Prompt("p", "a red circle", "Here:")
STEPS = 3
PATIENT_S, IMPATIENT_S = 300.0, 10.0
"""Seconds without progress after which ranks count as hanging: usually, and where they do hang."""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return Policy(str(tiny_checkpoint(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def model(start):
    return Vargpt.from_pretrained(start.model).eval()


@pytest.fixture(scope="module")
def chat(start, model):
    return ChatFormat(start.model, model.config)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    features = np.random.default_rng(0).standard_normal((12, BITS, SIDE // 16, SIDE // 16))
    questions = [ImageQuestion("red", "What colour is the square?", "red"), ImageQuestion("blue", "How many?", "three")]
    return corpus_of(tmp_path_factory.mktemp("corpus"), features, questions)


@pytest.fixture(scope="module")
def probe():
    bits = np.random.default_rng(1).integers(0, 2, (TOKENS, BITS))
    return Probe(PROMPT, pack(bits), SIDE)


def score(model, chat, bits_NLd: np.ndarray) -> torch.Tensor:
    """float64 [N, K]: log-probabilities of bits by scale, for ``PROMPT``."""
    bits = torch.from_numpy(bits_NLd.astype(np.uint8))
    ids = torch.tensor([chat.drawn(PROMPT.text, PROMPT.reply, TOKENS).ids] * len(bits))
    with torch.no_grad():
        logits = model(ids, drawing=Drawing(Bits().replay(bits, SCHEDULE).inputs_BLd, (SIDE, SIDE))).image_logits
    return scale_sums(bit_log_probs(logits, bits), SCHEDULE)


@pytest.fixture(scope="module")
def pairs(model, chat):
    """Rows of a preference table, scored by the starting weights."""
    rng = np.random.default_rng(2)

    def pair(i: int) -> dict:
        bits = rng.integers(0, 2, (2, TOKENS, BITS))
        by_scale = score(model, chat, bits)
        row = {
            "pair_id": f"pair-{i}",
            "prompt_id": f"prompt-{i}",
            "prompt": PROMPT.text,
            "reply": PROMPT.reply,
            "resolution": SIDE,
            "chosen_seed": None,
            "chosen_version": None,
            "rejected_seed": i,
            "rejected_version": 1,
            "sampling": "{}",
            "reference_version": 1,
        }
        for j, side in enumerate(("chosen", "rejected")):
            row[f"{side}_bits"] = pack(bits[j])
            row[f"{side}_source"] = "test"
            row[f"{side}_reward"] = None
            row[f"reference_{side}_logp"] = by_scale[j].sum().item()
            row[f"reference_{side}_by_scale"] = by_scale[j].tolist()
        return row

    return [pair(i) for i in range(8)]


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    """Where faults are asked for; the ranks of ``cluster`` look there."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def cluster(faults):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(VARIABLE, str(faults))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def group(cluster):
    group = LearnerGroup(LearnerConfig(ranks=2), {"CPU": 0.5}, threads=1, use_gpu=False, bf16=False)
    yield group
    group.close()


@pytest.fixture(scope="module")
def trained(group, start, corpus, probe, pairs, tmp_path_factory):
    """Runs a stage, once for each (stage, ZeRO stage): its result, folder and followed log."""
    done = {}

    def train(stage: str, zero: int = 2) -> tuple[dict, object, list[dict]]:
        if (stage, zero) not in done:
            folder, lines = tmp_path_factory.mktemp(f"{stage}-{zero}"), []
            recipe = Recipe(steps=STEPS, batch=4, micro_batch=2, lr=1e-3, warmup_ratio=0.0, zero=zero)
            if stage == "dpo":
                write_table(folder / "pairs.parquet", pairs)
                job = DpoJob(
                    start=start,
                    table=folder / "pairs.parquet",
                    recipe=recipe,
                    dpo=DpoConfig(),
                    output=folder,
                    seed=0,
                    probe=probe,
                )
                result = group.run(job, lines.append)
            else:
                stream = corpus if stage == "understanding" else corpus.at(SIDE)
                saves = (2,) if stage == "sft" else ()
                job = sft_job(stage, start, stream, recipe, folder, probe, save_steps=saves)
                result = group.run(job, lines.append)
            done[stage, zero] = result, folder, lines
        return done[stage, zero]

    return train


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_zero_3_trains_the_same_weights_as_zero_2(trained, stage):
    two, three = (load_file(trained(stage, zero)[1] / "final/weights.safetensors") for zero in (2, 3))
    assert two.keys() == three.keys()
    for name, tensor in two.items():
        # The same numbers reduced in another order, at weights of order 1. Adam divides by the size of the gradient, so
        # where that is next to nothing its rounding shows: in 1 of 4096 elements, by 1.2e-5.
        difference = (three[name] - tensor).abs()
        assert (difference > 1e-6).double().mean() <= 1e-3 and difference.max() <= 1e-4, name


@pytest.mark.parametrize("zero", [2, 3])
def test_dpo_starts_at_the_reference_and_moves_away(trained, zero):
    result, _, lines = trained("dpo", zero)
    assert 0 <= result["step0_max_abs_logratio"] <= 1e-4
    assert result["loss_first"] == pytest.approx(np.log(2), abs=1e-4)
    assert result["loss_last"] < result["loss_first"]
    assert result["margin_last"] > 0
    assert 0 <= result["accuracy_last"] <= 1
    last = [line for line in lines if "rewards/margins" in line][-1]
    assert result["margin_last"] == last["rewards/margins"]
    by_scale = [last[f"rewards/margins/scale_{k}"] for k in range(len(SCHEDULE))]
    # margins by scale add up, but for fp32 rounding of sums
    assert sum(by_scale) == pytest.approx(last["rewards/margins"], abs=1e-4)


def test_weights_are_also_saved_on_the_way(trained):
    _, folder, _ = trained("sft")
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000002"]
    halfway, final = (load_file(check_checkpoint(folder / name)) for name in ("step-000002", "final"))
    assert halfway.keys() == final.keys()
    assert any(not torch.equal(halfway[name], final[name]) for name in final)


@pytest.mark.parametrize("stage", ["sft", "understanding", "dpo"])
def test_the_log_is_followed_line_by_line(trained, stage):
    _, folder, lines = trained(stage)
    assert lines == [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    keys = {
        "sft": {"loss/image", "bit_accuracy", "grad_norm", "learning_rate"},
        "understanding": {"loss/text", "loss/image", "grad_norm"},
        "dpo": {"rewards/margins", "rewards/accuracies", "bit_accuracy/chosen/scale_0"},
    }[stage]
    assert all(keys <= line.keys() for line in lines if "loss" in line)


def test_a_stage_learns_from_streamed_records(group, start, probe, tmp_path):
    sources = write_sources(tmp_path / "data")
    feed = feed_of(tmp_path, sources, workers=1, held_out_fraction=0.2)
    recipe, lines = Recipe(steps=STEPS, batch=8, micro_batch=2, lr=1e-3, warmup_ratio=0.0), []
    job = sft_job("understanding", start, feed, recipe, tmp_path / "out", probe)
    result = group.run(job, lines.append)
    assert result["steps"] == STEPS
    logged = [line for line in lines if "loss" in line]
    assert all({"loss/text", "loss/image", "bit_accuracy"} <= line.keys() for line in logged)
    before = load_file(f"{start.model}/model.safetensors")
    after = load_file(check_checkpoint(tmp_path / "out/final"))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert "model.visual.merger.mlp.0.weight" in changed and any("language_model" in name for name in changed)
    children = [child for pid in group.pids for child in psutil.Process(pid).children()]
    assert not children, "the processes that read are gone with the stage"


def test_learner_and_worker_encode_images_alike(start, model, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = SftTrainer(STAGES["sft"], None, model.image_tokenizer, model=model, args=arguments)
    worker = Worker(start.model, Patches(), threads=1)
    encoded = worker.encode(["#102030", "#f0e010"], SIDE)
    crops = np.stack([np.asarray(Patches().load(one.key, SIDE)) for one in encoded])
    features = trainer._features(torch.from_numpy(crops)).numpy()
    assert features.dtype == np.float16
    np.testing.assert_array_equal(features, np.stack([one.features for one in encoded]))


def test_a_job_resumes_from_a_checkpoint_saved_on_request(group, start, corpus, probe, tmp_path):
    """It is asked while it works, so the step is any but the last."""
    recipe = Recipe(steps=40, batch=4, micro_batch=2, lr=1e-3, warmup_ratio=0.0)
    job, asked, lines = sft_job("sft", start, corpus.at(SIDE), recipe, tmp_path, probe), [], []

    def ask(line):
        if not asked:
            asked.append(line["step"])
            group.checkpoint(60)
            asked.extend(path.name for path in (tmp_path / "trainer").glob("checkpoint-*"))

    whole = group.run(job, ask)
    assert len(asked) == 2 and asked[0] < int(asked[1].removeprefix("checkpoint-")) < 40
    again = group.run(job, lines.append)
    assert lines[0]["step"] == int(asked[1].removeprefix("checkpoint-")) + 1
    assert {key: again[key] for key in ("loss_last", "probe")} == {key: whole[key] for key in ("loss_last", "probe")}
    group.checkpoint(60)  # nothing is under way


@pytest.fixture(scope="module")
def undisturbed(group, start, corpus, probe, tmp_path_factory) -> tuple[SftJob, dict]:
    """A job, and its result where nothing goes wrong."""
    recipe = Recipe(steps=STEPS, batch=4, micro_batch=2, lr=1e-3, warmup_ratio=0.0)
    job = sft_job("sft", start, corpus.at(SIDE), recipe, tmp_path_factory.mktemp("whole"), probe)
    return job, group.run(job, lambda line: None)


class Restarting(LearnerGroup):
    """Two ranks that save after each step and restart once; ``noted`` has what the group notes."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, bool]] = []
        config = LearnerConfig(ranks=2, save_every=1, max_restarts=1, stall_timeout_s=PATIENT_S)
        super().__init__(config, {"CPU": 0.5}, threads=1, use_gpu=False, bf16=False, note=self.take_note)

    def take_note(self, event: str, restart: bool = False) -> None:
        self.noted.append((event, restart))
        self.patience.limit_s = PATIENT_S

    def expect_a_hang(self) -> None:
        """Wait little until the next restart."""
        self.patience.limit_s = IMPATIENT_S


@pytest.fixture(scope="module")
def restarting(cluster):
    group = Restarting()
    yield group
    group.close()


@pytest.fixture
def other(restarting) -> Restarting:
    """A group as if it had never restarted."""
    restarting.noted.clear()
    restarting.restarts = 0
    return restarting


def assert_same_weights(whole: Path, cut: Path) -> None:
    expected, weights = (load_file(check_checkpoint(folder / "final")) for folder in (whole, cut))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("how", ["stopped", "hanging"])
def test_ranks_that_make_no_progress_restart_and_resume_bitwise(other, undisturbed, faults, tmp_path, how):
    """One of two ranks is stopped by a signal, or hangs in its own code: its peer waits for it and lives on."""
    job, _ = undisturbed
    first = list(other.pids)

    def stop(line: dict) -> None:
        if line["step"] == 1 and not other.noted:
            other.expect_a_hang()
            if how == "stopped":
                os.kill(first[1], signal.SIGSTOP)

    if how == "hanging":
        ask(faults, "cut/rank-1/step-2", "hang")
    other.run(replace(job, output=tmp_path / "cut"), stop)
    assert_same_weights(job.output, tmp_path / "cut")
    ((event, restart),) = other.noted
    assert re.fullmatch(r"learner rank lost during sft \(no progress in \d+ s\): restart 1 of 1", event) and restart
    assert not any(psutil.pid_exists(pid) for pid in first), "a stopped process would keep its memory"


def test_a_stopped_data_worker_counts_as_a_hang(group, other, start, probe, tmp_path):
    sources = write_sources(tmp_path / "data")
    feed = feed_of(tmp_path, sources, workers=1, held_out_fraction=0.2)
    recipe = Recipe(steps=6, batch=8, micro_batch=2, lr=1e-3, warmup_ratio=0.0)
    job = sft_job("understanding", start, feed, recipe, tmp_path / "whole", probe)
    group.run(job, lambda line: None)
    stopped = []

    def stop(line: dict) -> None:
        if not stopped:
            other.expect_a_hang()
            stopped.extend(psutil.Process(other.pids[0]).children())
            stopped[0].send_signal(signal.SIGSTOP)

    other.run(replace(job, output=tmp_path / "cut"), stop)
    ((event, _),) = other.noted
    assert re.fullmatch(r"learner rank lost during sft \(no progress in \d+ s\): restart 1 of 1", event)
    assert not stopped[0].is_running()
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_references_of_other_weights_stop_the_job_at_step_0(
    group, restarting, undisturbed, start, probe, pairs, tmp_path
):
    """The last job of ``group``, which its error closes."""
    shifted = [pair | {"reference_chosen_logp": pair["reference_chosen_logp"] + 1.0} for pair in pairs]
    write_table(tmp_path / "pairs.parquet", shifted)
    recipe = Recipe(steps=STEPS, batch=4, micro_batch=2)
    job = DpoJob(
        start=start,
        table=tmp_path / "pairs.parquet",
        recipe=recipe,
        dpo=DpoConfig(),
        output=tmp_path / "out",
        seed=0,
        probe=probe,
    )
    with pytest.raises(RuntimeError, match="DPO step 0: policy and reference differ by 1 nats"):
        group.run(job, lambda line: None)
    assert not (tmp_path / "out/final").exists()
    assert set(group.pids).isdisjoint(restarting.pids)
    for pid in restarting.pids:
        os.kill(pid, 0)  # the other group lives on


def test_lost_ranks_restart_and_resume_bitwise(other, undisturbed, faults, tmp_path):
    """The last jobs of ``other``, whose ranks are lost once too often."""
    job, expected = undisturbed
    killed = ask(faults, "cut/rank-1/step-2")
    found = other.run(replace(job, output=tmp_path / "cut"), lambda line: None)
    assert not killed.exists()
    assert {key: found[key] for key in found if key not in ("seconds", "time", "mfu", "peak_memory")} == {
        key: expected[key] for key in expected if key not in ("seconds", "time", "mfu", "peak_memory")
    }
    assert_same_weights(job.output, tmp_path / "cut")
    assert other.noted == [("learner rank lost during sft: restart 1 of 1", True)] and other.restarts == 1
    lines = map(json.loads, (tmp_path / "cut/log.jsonl").read_text().splitlines())
    assert next(line["step"] for line in lines if "loss" in line) > 1, "it went on from a checkpoint"
    killed = ask(faults, "again/rank-0/step-1")
    with pytest.raises(RuntimeError, match="lost more than 1 times, now in sft"):
        other.run(replace(job, output=tmp_path / "again"), lambda line: None)
    assert not killed.exists() and not (tmp_path / "again/final").exists()


def test_a_group_that_finds_no_room_says_so(cluster):
    with pytest.raises(RuntimeError, match="no room for 2 learner ranks of {'CPU': 8}"):
        LearnerGroup(LearnerConfig(ranks=2, start_timeout_s=1.0), {"CPU": 8}, threads=1, use_gpu=False, bf16=False)

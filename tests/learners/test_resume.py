"""A stage that is interrupted and resumed in fresh processes ends with the same weights, bit for bit.

With other ranks, micro-batches or another ZeRO stage, it resumes with the same weights and optimizer.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from learners.checkpoints import check
from learners.config import DpoConfig, LearnerConfig, Recipe
from learners.group import LearnerGroup
from learners.jobs import DpoJob, training_checkpoints
from learners.resume import checkpoint_bytes
from learners.shards import MOMENTS, SavedShards
from learners.step_times import PARTS
from tests.helpers.forks import ForkedRanks
from tests.helpers.streams import corpus_of, feed_of, sft_job, write_sources
from tests.helpers.tiny import BITS
from vargpt_rl.data.preferences import join_parts, part_path, write_table
from vargpt_rl.data.samples import Probe, Prompt
from vargpt_rl.model.bits import Bits, pack
from vargpt_rl.model.likelihood import bit_log_probs, scale_sums
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.model.unified import Drawing
from vargpt_rl.stages import STAGES, freeze
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint

SIDE = 64
SCHEDULE = schedule_for(SIDE)
TOKENS = token_count(SCHEDULE)
PROMPT = Prompt("p", "a red circle", "Here:")
STEPS, CUT = 5, 3
# Warm-up and decay, so that the schedule matters, and two micro-batches a step on each of two ranks.
RECIPE = dict(steps=STEPS, batch=8, micro_batch=2, lr=1e-3, warmup_ratio=0.25)
CASES = [("corpus", 3), ("records", 2), ("dpo", 2), ("parts", 2)]
"""Training data, and DeepSpeed's ZeRO stage. The second of two parts arrives after a step."""
CHANGED = [("corpus", 3), ("dpo", 2)]
"""Cases that are also resumed by one rank, and from there after another step by two."""
ZERO = {"fewer": {"corpus": 2, "dpo": 1}, "more": {"corpus": 0, "dpo": 3}}
"""ZeRO stages of those."""
ROUNDING = 2e-5
"""Largest difference of weights by the order of sums alone; a step moves them by up to the rate, 1e-3."""


@pytest.fixture(scope="module")
def data(checkpoint, tmp_path_factory) -> Path:
    """A corpus, and a table of pairs that is cut in the middle of its second epoch: two steps are one."""
    folder, rng = tmp_path_factory.mktemp("resume"), np.random.default_rng(0)
    features = rng.standard_normal((12, BITS, SIDE // 16, SIDE // 16))
    np.save(folder / "features.npy", features)
    model = Vargpt.from_pretrained(checkpoint).eval()
    rows = [pair(model, ChatFormat(str(checkpoint), model.config), i) for i in range(12)]
    write_table(folder / "pairs.parquet", rows)
    for number in range(2):
        path = part_path(folder / "parts.parquet", number)
        path.parent.mkdir(exist_ok=True)
        origin = {"samples": 6, "prompts": 6, "prompts_without_winner": 0, "dropped_by_reason": {}}
        write_table(path, rows[6 * number : 6 * number + 6], origin)
    return folder


def pair(model: Vargpt, chat: ChatFormat, number: int) -> dict:
    """Random bits, scored by the starting weights."""
    bits = torch.from_numpy(np.random.default_rng(number).integers(0, 2, (2, TOKENS, BITS)).astype(np.uint8))
    ids = torch.tensor([chat.drawn(PROMPT.text, PROMPT.reply, TOKENS).ids] * 2)
    with torch.no_grad():
        logits = model(ids, drawing=Drawing(Bits().replay(bits, SCHEDULE).inputs_BLd, (SIDE, SIDE))).image_logits
    by_scale = scale_sums(bit_log_probs(logits, bits), SCHEDULE)
    row = dict(pair_id=f"pair-{number}", prompt_id=f"prompt-{number}", prompt=PROMPT.text, reply=PROMPT.reply)
    row |= dict(resolution=SIDE, sampling="{}", reference_version=1)
    for i, side in enumerate(("chosen", "rejected")):
        row |= {f"{side}_bits": pack(bits[i].numpy()), f"{side}_source": "test", f"{side}_reward": None}
        row |= {f"{side}_seed": number, f"{side}_version": 1}
        row |= {f"reference_{side}_logp": by_scale[i].sum().item(), f"reference_{side}_by_scale": by_scale[i].tolist()}
    return row


def run(
    group: LearnerGroup, start: Policy, data: Path, case: tuple[str, int], output: Path, **changes: int
) -> tuple[dict, list[dict]]:
    """Train a case; a corpus also saves the weights after `CUT` steps, or those it resumes from."""
    kind, zero = case
    probe = Probe(PROMPT, pack(np.random.default_rng(1).integers(0, 2, (TOKENS, BITS))), SIDE)
    recipe, lines = Recipe(**RECIPE | {"zero": zero} | changes), []
    if kind == "dpo":
        result = group.run(
            DpoJob(
                start=start,
                table=data / "pairs.parquet",
                recipe=recipe,
                dpo=DpoConfig(),
                output=output,
                seed=0,
                probe=probe,
            ),
            lines.append,
        )
    elif kind == "parts":
        job = DpoJob(
            start=start,
            table=data / "parts.parquet",
            recipe=recipe,
            dpo=DpoConfig(),
            output=output,
            seed=0,
            probe=probe,
            parts=2,
        )
        result = in_parts(group, job, lines)
    elif kind == "corpus":
        stream = corpus_of(output / "data", np.load(data / "features.npy"))
        result = group.run(sft_job("sft", start, stream, recipe, output, probe, save_steps=(CUT,)), lines.append)
    else:
        feed = feed_of(output, write_sources(output / "data"), workers=1, packs=True)
        result = group.run(sft_job("understanding", start, feed, recipe, output, probe), lines.append)
    return result, [line for line in lines if "loss" in line]


def in_parts(group: LearnerGroup, job: DpoJob, lines: list[dict]) -> dict:
    """DPO that starts with a part; where the whole table is there, from a run before, with that."""
    if job.table.exists():
        return group.run(job, lines.append)
    parts = [part_path(job.table, number) for number in range(2)]
    late = parts[1].rename(parts[1].with_suffix(".late"))
    training = group.start(job, lines.append)
    while not lines:  # the loader is a step ahead, so the second waits already
        training.wait(0.1)
    late.rename(parts[1])
    result = training.result()
    assert result["waited"] > 0
    join_parts(job.table, parts)
    return result


class Notes:
    """Keeps what a group notes."""

    def __init__(self):
        self.said: list[str] = []

    def add(self, event: str, restart: bool = False) -> None:
        self.said.append(event)

    def take(self) -> list[str]:
        taken, self.said = self.said, []
        return taken


@pytest.fixture(scope="module")
def runs(checkpoint, data, tmp_path_factory) -> dict:
    """Of each case, folders, results and logs: of all steps at once, and of the last ones in fresh processes."""
    folder, start, found = tmp_path_factory.mktemp("runs"), Policy(str(checkpoint)), {}
    for moment in ("whole", "resumed"):
        with ForkedRanks(LearnerConfig(ranks=2, save_every=CUT)) as group:
            for case in CASES:
                output = folder / moment / "-".join(map(str, case))
                if moment == "resumed":  # all that a stage which is cut off after the checkpoint leaves behind
                    shutil.copytree(training_checkpoints(found["whole", case][0]), training_checkpoints(output))
                found[moment, case] = (output, *run(group, start, data, case, output))
    return found


@pytest.fixture(scope="module")
def others(runs, checkpoint, data, tmp_path_factory) -> dict:
    """Of each changed case, folders, results, logs and notes of other ranks, which resume one after the other."""
    folder, start, found = tmp_path_factory.mktemp("others"), Policy(str(checkpoint)), dict(runs)
    before = "whole"
    for moment, ranks, micro_batch in (("fewer", 1, 2), ("more", 2, 4)):
        notes = Notes()
        with ForkedRanks(LearnerConfig(ranks=ranks, save_every=1, keep_last=9), notes.add) as group:
            for case in CHANGED:
                output = folder / moment / "-".join(map(str, case))
                shutil.copytree(training_checkpoints(found[before, case][0]), training_checkpoints(output))
                if moment == "more":  # as if it had been stopped after one step
                    shutil.rmtree(training_checkpoints(output) / "checkpoint-000005", ignore_errors=True)
                changes = {"zero": ZERO[moment][case[0]], "micro_batch": micro_batch}
                found[moment, case] = (output, *run(group, start, data, case, output, **changes), notes.take())
        before = moment
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_stage_is_bitwise_the_uninterrupted_one(runs, case):
    (folder, whole, lines), (again, resumed, rest) = (runs[moment, case] for moment in ("whole", "resumed"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and [line["step"] for line in rest] == [4, 5]
    for one, other in zip(lines[CUT:], rest, strict=True):
        same = {key for key in one if key not in ("epoch", "data_wait") and not key.startswith("time/")}
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
    expected, found = (load_file(check_checkpoint(path / "final")) for path in (folder, again))
    assert expected.keys() == found.keys() and len(found) > 3
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    same = ("loss_first", "loss_last", "steps", "probe", "step0_max_abs_logratio", "margin_last")
    assert {key: resumed.get(key) for key in same} == {key: whole.get(key) for key in same}
    assert {f"time/{part}" for part in PARTS} <= lines[0].keys() and lines[0]["time/forward"] > 0
    assert set(whole["time"]) == set(PARTS) and whole["time"]["optimizer"] > 0
    assert 0 < lines[0]["time/mfu"] < 1 and 0 < whole["mfu"] < 1
    losses = {line["loss"] for line in lines}
    assert len(losses) >= STEPS - 1, "there is something to be equal; the first step, of warm-up, may change nothing"


def test_the_order_of_pairs_is_recorded(runs):
    for case in (("dpo", 2), ("parts", 2)):
        orders = [(runs[moment, case][0] / "order.jsonl").read_text() for moment in ("whole", "resumed")]
        assert orders[0] == orders[1]
        steps = [json.loads(line)["pairs"] for line in orders[0].splitlines()]
        assert [len(pairs) for pairs in steps] == [8] * STEPS
    assert set(steps[0] + steps[1]) == {f"pair-{i}" for i in range(6)}
    assert set(steps[2]) == {f"pair-{i}" for i in range(6, 12)}, "the new ones, until they were used as often"


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_other_ranks_resume_with_the_same_weights_and_optimizer(others):
    whole = load_file(check_checkpoint(others["whole", ("corpus", 3)][0] / f"step-{CUT:06d}"))
    resumed = load_file(check_checkpoint(others["fewer", ("corpus", 3)][0] / f"step-{CUT:06d}"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    for moment, first in (("fewer", CUT + 1), ("more", CUT + 2)):
        for case in CHANGED:
            output, result, lines, notes = others[moment, case]
            assert [line["step"] for line in lines] == list(range(first, STEPS + 1))
            assert np.isfinite([line["loss"] for line in lines]).all() and result["steps"] == STEPS
            (note,) = notes
            assert note.startswith(f"resuming {output.name} from checkpoint-{first - 1:06d} with learner.ranks=")
            assert ("in a new order" in note) == (case[0] == "corpus")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_other_ranks_train_on_the_same_pairs(others):
    whole, _, lines = others["whole", ("dpo", 2)]
    expected = load_file(check_checkpoint(whole / "final"))
    for moment in ("fewer", "more"):
        output, _, others, _ = others[moment, ("dpo", 2)]
        assert (output / "order.jsonl").read_text() == (whole / "order.jsonl").read_text()
        for line, other in zip(lines[-len(others) :], others, strict=True):
            assert (
                line["loss"] == pytest.approx(other["loss"], abs=1e-4)
                and line["learning_rate"] == other["learning_rate"]
            )
        found = load_file(check_checkpoint(output / "final"))
        worst = max((found[name] - tensor).abs().max().item() for name, tensor in expected.items())
        assert 0 < worst < ROUNDING, moment


def test_checkpoints_hold_no_frozen_weights(runs, checkpoint):
    folder = runs["whole", ("dpo", 2)][0]
    (kept,) = training_checkpoints(folder).glob("checkpoint-*")
    assert kept.name == "checkpoint-000003"
    check(kept)
    model = Vargpt.from_pretrained(checkpoint)
    freeze(model, STAGES["dpo"])
    files = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    # Besides, a file a rank for its generators, and names and shapes: some 300 kB, with two ranks.
    assert checkpoint_bytes(model) <= files <= checkpoint_bytes(model) + 500_000, "the room that is asked for"
    saved = SavedShards(kept)
    for name, tensor in load_file(folder / "final/weights.safetensors").items():
        assert all(len(saved.read(kind, name, 0, tensor.numel())) for kind in ("weight", *MOMENTS))
    assert not list(training_checkpoints(folder).glob(".*")), "nothing unfinished is left"


def test_missing_elements_of_a_checkpoint_are_named(tmp_path):
    save_file(
        {"weight/0/a": torch.arange(3.0), "weight/5/a": torch.arange(2.0)}, tmp_path / "state-00000-000.safetensors"
    )
    saved = SavedShards(tmp_path)
    assert saved.read("weight", "a", 1, 2).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="2 of 5 elements of a, weight, are missing"):
        saved.read("weight", "a", 1, 5)

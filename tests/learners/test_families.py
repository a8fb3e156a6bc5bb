"""The stages of both families on two real ranks, each scored by a worker, and the image tokenizers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.worker import Worker
from learners.config import DpoConfig, LearnerConfig, Recipe
from learners.jobs import DpoJob, TokenizerJob
from tests.helpers.forks import ForkedRanks
from tests.helpers.streams import corpus_of, sft_job
from tests.helpers.tiny import BITS, V1_CODES, V1_SIDES, Patches, tiny_checkpoint, tiny_v1_checkpoint
from vargpt_rl.data.preferences import write_table
from vargpt_rl.data.samples import ImageQuestion, Probe, Prompt
from vargpt_rl.model.bits import pack
from vargpt_rl.model.families import load_model
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.v1.image_tokenizer import conv_of_scale
from vargpt_rl.stages import STAGES, freeze
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint

SIDE = 64
PROMPT = Prompt("p", "a red circle", "Here:")
STEPS = 3
UNUSED_CONVS = set(range(4)) - set(conv_of_scale(len(V1_SIDES), 4))


@dataclass(frozen=True)
class FamilyCase:
    """A family's tiny model, its symbols, and the parameters that its stages leave unchanged."""

    make: Callable[[Path], Path]
    channels: int
    depth: int
    values: int
    symbol: str
    unread: set[str]
    """Read where a condition is dropped, which supervised stages do at random and preference training never does."""
    unused: set[str] = field(default_factory=set)
    """Parts of the image tokenizer that no scale of this size uses."""


CASES = {
    "v1.1": FamilyCase(tiny_checkpoint, BITS, BITS, 2, "bit", {"image_decoder.condition.unconditional"}),
    "v1": FamilyCase(
        tiny_v1_checkpoint,
        8,
        1,
        V1_CODES,
        "index",
        {"image_decoder.class_embedding.weight"},
        {f"image_tokenizer.residual.{conv}.{part}" for conv in UNUSED_CONVS for part in ("weight", "bias")},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> FamilyCase:
    return CASES[request.param]


@pytest.fixture(scope="module")
def start(case, tmp_path_factory) -> Policy:
    return Policy(str(case.make(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def worker(start) -> Worker:
    """A worker with the starting weights."""
    return Worker(start.model, Patches(), threads=1)


def random_images(case: FamilyCase, worker: Worker, seed: int, count: int) -> list[bytes]:
    tokens = token_count(worker.image_tokenizer.schedule_for(SIDE))
    rng = np.random.default_rng(seed)
    dtype = np.uint8 if case.values <= 256 and case.depth > 1 else np.int32
    return [pack(rng.integers(0, case.values, (tokens, case.depth), dtype), case.values) for _ in range(count)]


@pytest.fixture(scope="module")
def probe(case, worker) -> Probe:
    return Probe(PROMPT, random_images(case, worker, 1, 1)[0], SIDE)


@pytest.fixture(scope="module")
def corpus(case, tmp_path_factory):
    features = np.random.default_rng(0).standard_normal((12, case.channels, SIDE // 16, SIDE // 16))
    questions = [ImageQuestion("red", "What colour is the square?", "red"), ImageQuestion("blue", "How many?", "three")]
    return corpus_of(tmp_path_factory.mktemp("corpus"), features, questions)


@pytest.fixture(scope="module")
def table(case, worker, tmp_path_factory) -> Path:
    """Pairs of random images, scored by a worker in the micro-batches that the learner starts with."""
    images = random_images(case, worker, 2, 16)
    rows = []
    for at in range(0, 16, 4):
        scores = worker.score([(PROMPT, packed) for packed in images[at : at + 4]], SIDE)
        for i in range(2):
            row = {"pair_id": f"pair-{at + i}", "prompt_id": f"prompt-{at + i}", "prompt": PROMPT.text}
            row |= {"reply": PROMPT.reply, "resolution": SIDE, "sampling": "{}", "reference_version": 0}
            for side, j in {"chosen": i, "rejected": 2 + i}.items():
                row |= {f"{side}_bits": images[at + j], f"{side}_source": "test", f"{side}_reward": None}
                row |= {f"{side}_seed": None, f"{side}_version": None}
                row[f"reference_{side}_logp"] = scores[j].total
                row[f"reference_{side}_by_scale"] = scores[j].by_scale
            rows.append(row)
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    write_table(path, rows)
    return path


@pytest.fixture(scope="module")
def group():
    with ForkedRanks(LearnerConfig(ranks=2)) as group:
        yield group


@pytest.mark.parametrize(("stage", "zero"), [("pretrain", 2), ("understanding", 2), ("sft", 3), ("dpo", 3)])
def test_a_stage_trains_its_own_parameters(group, case, start, corpus, table, probe, tmp_path, stage, zero):
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
        assert {f"{case.symbol}_accuracy/chosen/scale_0", "rewards/margins/scale_2"} <= lines[0].keys()
    else:
        stream = corpus if stage == "understanding" else corpus.at(SIDE)
        result = group.run(sft_job(stage, start, stream, recipe, tmp_path, probe), lines.append)
        assert f"{case.symbol}_accuracy" in lines[0]
    trained = load_file(check_checkpoint(tmp_path / "final"))
    model = load_model(start.model, torch.float32)
    assert sorted(trained) == freeze(model, STAGES[stage])
    assert (result["steps"], result["trained_tensors"]) == (STEPS, len(trained))
    assert all(tensor.isfinite().all() for tensor in trained.values())
    before = model.state_dict()
    assert {name for name in trained if torch.equal(trained[name], before[name])} <= case.unread

    worker = Worker(start.model, Patches(), threads=1)
    untrained = worker.score([(PROMPT, probe.bits)], SIDE)[0].total
    worker.model.load_state_dict(trained, strict=False)
    assert result["probe"] == pytest.approx(worker.score([(PROMPT, probe.bits)], SIDE)[0].total, abs=1e-4)
    assert result["probe"] != pytest.approx(untrained, abs=1e-3)


def test_the_image_tokenizer_is_trained_on_one_rank(group, case, start, tmp_path):
    lines: list[dict] = []
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
    result = group.run(job, lines.append)
    assert result["loss_last"] < result["loss_first"]
    assert [key for key, _ in result["failures"]] == ["nothing"]
    assert [line["step"] for line in lines] == list(range(1, 21))
    after, before = load_file(check_checkpoint(tmp_path / "final")), load_file(f"{start.model}/model.safetensors")
    assert after.keys() == {name for name in before if name.startswith("image_tokenizer.")}
    assert {name for name in after if torch.equal(after[name], before[name])} == case.unused

"""The books of the rollout side: which weights are served, what became of each image, who agrees with whom."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from actors.config import RolloutConfig
from actors.weights import SwapReport
from actors.worker import EncodedImage, Failure
from tests.data.test_preferences import row as table_row
from tests.helpers.pools import FakePool
from vargpt_rl.data.preferences import read_table, write_table
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.samples import Probe, Prompt, Record, Sample
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.driver.rollout import Rollouts, apportion, seeds_for
from vargpt_rl.driver.run import Run
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.storage.checkpoint import save_checkpoint


class RecordingPool(FakePool):
    """Stands in for the workers: notes what is published, encodes keys that are not "bad", answers probes."""

    def __init__(self):
        self.version, self.published, self.verified, self.probed = 0, [], True, [-10.0, -10.0]

    def publish(self, path, version):
        self.version = version
        self.published.append(path.parent.name)
        return SwapReport(version, "", 8, 0.5, 0.0, 2, self.verified)

    def encode(self, keys, resolution):
        features = np.zeros((4, 2, 2), np.float16)
        return [Failure(key, "broken") if key == "bad" else EncodedImage(key, b"\0", features) for key in keys]

    def find_unreadable(self, keys, side):
        return [Failure(key, f"unreadable at {side}") if key == "bad" else None for key in keys]

    def probe(self, prompt, bits, resolution):
        return self.probed

    def generate_images(self, jobs, resolution, sampling, name):
        return [prompt for prompt, _ in jobs]

    def reply(self, texts, max_new_tokens):
        """Sparse words: every second text gets none."""
        self.asked = texts, max_new_tokens
        return [f"Here: {text}" if at % 2 == 0 else None for at, text in enumerate(texts)]


@pytest.fixture
def rollouts(tmp_path) -> Rollouts:
    run = Run(tmp_path / "run", {})
    return Rollouts(RecordingPool(), SimpleNamespace(), run, Quarantine(tmp_path / "q.jsonl"), SamplingConfig())


@pytest.fixture
def sets(tmp_path):
    """Weight sets: one of the language model's tensors, three of the decoder's."""
    names = {"language": "l", "sft": "d", "dpo": "d", "control": "d"}
    return {key: save_checkpoint(tmp_path / key, {name: torch.zeros(2)}) for key, name in names.items()}


def test_only_what_differs_travels(rollouts, sets):
    rollouts.serve((sets["language"], sets["sft"]))
    rollouts.serve((sets["language"], sets["sft"]))
    rollouts.serve((sets["language"], sets["sft"], sets["dpo"]))
    assert rollouts.pool.published == ["language", "sft", "dpo"]


def test_a_superseded_set_does_not_travel(rollouts, sets):
    rollouts.serve((sets["language"], sets["sft"], sets["dpo"]))
    assert rollouts.pool.published == ["language", "dpo"]


def test_serving_can_go_back(rollouts, sets):
    rollouts.serve((sets["language"], sets["sft"], sets["control"]))
    rollouts.serve((sets["language"], sets["sft"]))
    assert rollouts.pool.published == ["language", "control", "sft"]


def test_going_back_to_the_starting_model_is_refused(rollouts, sets):
    rollouts.serve((sets["sft"],))
    with pytest.raises(RuntimeError, match="do not set"):
        rollouts.serve(())


def test_an_unverified_swap_stops_the_run(rollouts, sets):
    rollouts.pool.verified = False
    with pytest.raises(RuntimeError, match="other weights"):
        rollouts.serve((sets["sft"],))


def test_versions_go_on_after_a_restart(rollouts, sets):
    steps = [("language", "sft"), ("language", "control"), ("language", "sft", "dpo")]
    done = []
    for i, names in enumerate(steps):
        serve = lambda: rollouts.serve([sets[name] for name in names])  # noqa: B023, E731
        done.append(rollouts.run.step(str(i), serve) if i < 2 else serve())
    pool, run = RecordingPool(), Run(rollouts.run.directory, {})
    again = Rollouts(pool, rollouts.source, run, rollouts.quarantine, None)
    assert again.serve([sets[name] for name in steps[2]]) == done[2], "the same as without the restart"
    assert [swap["version"] for swap in done] == [2, 3, 4]
    assert (pool.published, pool.version) == (["language", "control", "dpo"], 4)


def test_workers_that_disagree_with_the_learner_stop_the_run(rollouts):
    probe = Probe(Prompt("a", "a circle"), b"", 32)
    assert rollouts.agree(probe, -10.0) == 0.0
    rollouts.pool.probed = [-10.0, -10.5]
    with pytest.raises(RuntimeError, match="after the swap"):
        rollouts.agree(probe, -10.0)


def test_unreadable_images_are_counted_and_left_out(rollouts, tmp_path):
    records = [Record(str(i), Prompt(str(i), "a circle"), key) for i, key in enumerate(["good", "bad", "fine"])]
    counts, probe = rollouts.encode_corpus(records, 32, tmp_path / "corpus")
    assert counts == {"images": 2, "failed": 1} and probe.prompt.id == "0"
    assert rollouts.quarantine.counts == {"broken": 1}
    assert len((tmp_path / "corpus/prompts.jsonl").read_text().splitlines()) == 2
    features = (tmp_path / "corpus/features.safetensors").read_bytes()
    again = rollouts.encode_corpus(records, 32, tmp_path / "corpus")
    assert again == (counts, probe), "a run that goes on has it already"
    assert (tmp_path / "corpus/features.safetensors").read_bytes() == features
    gone = [record for record in records if record.image != "good"] + [Record("0", records[0].prompt, "bad")]
    with pytest.raises(ValueError, match="bad: could be read before, but not any more: broken"):
        rollouts.encode_corpus(gone, 32, tmp_path / "corpus")
    with pytest.raises(ValueError, match="none of 1 training images"):
        rollouts.encode_corpus(records[1:2], 32, tmp_path / "other")


@given(st.integers(0, 300), st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(sum), st.integers(0, 99))
def test_each_share_gets_its_items(count, shares, seed):
    whose = apportion(count, shares, seed)
    counts = np.bincount(whose, minlength=len(shares))
    assert len(whose) == count and len(counts) == len(shares)
    # Rounding moves each of a share's two ends by at most a half.
    assert np.abs(counts - count * np.array(shares) / sum(shares)).max() <= 1 + 1e-6
    assert (whose == apportion(count, shares, seed)).all()


def test_items_of_a_share_are_at_random():
    first, second = apportion(100, [0.25, 0.75], 0), apportion(100, [0.25, 0.75], 1)
    assert sorted(first) == sorted(second) == [0] * 25 + [1] * 75
    assert (first != second).any() and 0 < first[:50].sum() < 50


def test_pairs_are_shown_with_both_images(rollouts, tmp_path):
    rows = [table_row("a"), table_row("b", prompt="two", chosen_reward=None, rejected_bits=b"\x03")]
    write_table(tmp_path / "t.parquet", rows)
    pairs, shown, drawn = read_table(tmp_path / "t.parquet"), [], []

    def write_images(items, resolution, folder):
        drawn.extend((prompt.text, bits, resolution, name) for (prompt, bits), name in items)
        return [Path(folder, name) for _, name in items]

    rollouts.pool.write_images = write_images
    rollouts.run.log_table = lambda name, table: shown.append((name, table))
    rollouts.track_pairs(pairs, tmp_path / "images")
    assert not shown and not drawn  # nobody asked to see
    rollouts.run.tracker = object()
    rollouts.track_pairs(pairs.head(0), tmp_path / "images")
    rollouts.track_pairs(pairs, tmp_path / "images")
    [(name, table)] = shown
    assert name == "pairs/table" and list(table.prompt) == ["a red circle", "two"]
    assert list(table["winner reward"].notna()) == [True, False] and list(table["loser version"]) == [2, 2]
    assert list(table.winner) == [tmp_path / "images" / f"winner-0{i}.png" for i in range(2)]
    assert drawn[1] == ("two", b"\x03", 256, "loser-01.png") and drawn[3][1] == b"\x00\xff"
    assert not (tmp_path / "images").exists()


def test_images_that_cannot_be_shown_are_counted_and_left_out(rollouts, tmp_path):
    shown = ["bad", "good", None]
    records = [Record(str(i), Prompt(str(i), "turn it", "", key, 56), "target") for i, key in enumerate(shown)]
    counts, probe = rollouts.encode_corpus(records, 32, tmp_path / "corpus")
    assert counts == {"images": 2, "failed": 1} and probe.prompt == records[1].prompt
    assert rollouts.quarantine.counts == {"unreadable at 56": 1}
    prompts = [json.loads(line) for line in (tmp_path / "corpus/prompts.jsonl").read_text().splitlines()]
    assert [prompt["shown"] for prompt in prompts] == ["good", None]


def test_own_replies_are_drawn_with_and_those_that_are_missing_counted(rollouts):
    prompts = [Prompt(str(i), text, "Customary.") for i, text in enumerate(["a star", "a cross", "a star", "a cross"])]
    rollouts.pool.config = RolloutConfig()
    assert rollouts.draw(prompts, [0] * 4, 32, "")[0] == prompts
    rollouts.pool.config = RolloutConfig(reply="generate", reply_tokens=9)
    drawn, _ = rollouts.draw(prompts, [0] * 4, 32, "")
    assert [prompt.reply for prompt in drawn] == ["Here: a star", "Customary."] * 2
    assert [replace(prompt, reply="Customary.") for prompt in drawn] == prompts
    assert rollouts.pool.asked == (["a star", "a cross"], 9), "each text once"
    line = json.loads((rollouts.run.directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["stage"], line["generated"], line["template"]) == ("reply", 2, 2)


@contextmanager
def in_this_process(reward):
    """Stands in for the processes of rewards."""
    values = []

    def live(images, prompts):
        values[:] = reward(images, prompts)
        return values

    live.report = lambda: {
        "reward": {"scored": len(values), "mean": 0.5, "seconds": 0.1, "restarts": 0, "unscored": {}, "errors": []}
    }
    yield live


def test_held_out_drawings_are_judged_by_what_training_does_not_see(rollouts, monkeypatch):
    monkeypatch.setattr("vargpt_rl.driver.rollout.scorers", in_this_process)
    white = [Image.new("RGB", (64, 64), "white")]
    rollouts.pool.reward = lambda items, resolution, reward: reward(white * len(items), [p.text for p, _ in items])
    rollouts.pool.check = lambda items, resolution, check: check(white * len(items), [p for p, _ in items])
    captions = ["a red circle", "a blue square", "a small circle"]
    samples = [Sample(Prompt(text, text), b"", 64, 0, {}, 0, "") for text in captions]

    def trained_on(images, prompts):
        return [1.0] * len(images)

    def judge(images, prompts):
        return [None if "small" in prompt else float("red" in prompt) for prompt in prompts]

    rollouts.source = ShapesSource(ShapesConfig())
    assert rollouts.score_drawings(samples, trained_on)["overall"] == 0.0, "the exact check: there is nothing to see"
    assert "judge" not in rollouts.score_drawings(samples, trained_on)
    scores = rollouts.score_drawings(samples, trained_on, judge)
    assert (scores["overall"], scores["judge"], scores["judge_n"]) == (0.0, 0.5, 2)
    assert scores["judge_stderr"] == pytest.approx(0.5)
    rollouts.source = SimpleNamespace(image_check=lambda: None)
    judged = {"overall": 0.5, "overall_stderr": pytest.approx(0.5), "n": 2, "unscored": 1}
    assert rollouts.score_drawings(samples, trained_on, judge) == judged
    assert rollouts.score_drawings(samples, None, judge) == judged
    alone = {"overall": 1.0, "overall_stderr": 0.0, "n": 3, "unscored": 0}
    assert rollouts.score_drawings(samples, trained_on) == alone
    assert rollouts.score_drawings(samples, None) == {"n": 3}
    with pytest.raises(ValueError, match="none of 1 images was scored"):
        rollouts.score_drawings(samples[2:], None, judge)


def test_true_images_are_predicted_in_nats_a_bit_and_those_that_cannot_be_read_left_out(rollouts):
    prompts = [Prompt("red", "a red circle"), Prompt("bad", "a blue one"), Prompt("none", "nothing"), Prompt("x", "x")]
    rollouts.source.winner_key = lambda prompt: None if prompt.id == "none" else prompt.id
    totals = {"red": -4.0, "x": -8.0}
    rollouts.pool.score = lambda items, side: [SimpleNamespace(total=totals[prompt.id]) for prompt, _ in items]
    # Eight bits each.
    assert rollouts.predict(prompts, 32) == {"nats": 0.75, "nats_stderr": pytest.approx(0.25), "n": 2}
    assert rollouts.quarantine.counts.total() == 1


def test_vllm_writes_in_the_place_of_the_workers_and_takes_what_they_take(rollouts, sets, tmp_path):
    rollouts.pool.config, rollouts.text = RolloutConfig(reply="generate"), RecordingPool()
    rollouts.draw([Prompt("a", "a star")], [0], 32, "")
    assert rollouts.text.asked[0] == ["a star"] and not hasattr(rollouts.pool, "asked")
    rollouts.serve((sets["language"], sets["sft"]))
    assert rollouts.text.published == rollouts.pool.published == ["language", "sft"]
    assert rollouts.text.version == rollouts.pool.version
    rollouts.text.verified = False
    with pytest.raises(RuntimeError, match="other weights"):
        rollouts.serve((sets["language"], sets["dpo"]))


def test_seeds_depend_on_their_purpose():
    assert seeds_for(3, 0, 1) == seeds_for(3, 0, 1) != seeds_for(3, 0, 2)

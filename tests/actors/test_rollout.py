"""The books of the rollout side: which weights are served, what became of each picture, who agrees with whom."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.rollout import Rollouts, seeds_for
from actors.weights import SwapReport
from actors.worker import Encoded, Failure
from vargpt_rl.checkpoint import save_checkpoint
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.types import Probe, Prompt, Record
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.run import Run


class RecordingPool:
    """Stands in for the workers: notes what is published, encodes keys that are not "bad", answers probes."""

    def __init__(self):
        self.version, self.published, self.verified, self.probed = 0, [], True, [-10.0, -10.0]

    def publish(self, path, version):
        self.version = version
        self.published.append(path.parent.name)
        return SwapReport(version, "", 8, 0.5, 0.0, 2, self.verified)

    def encode(self, keys, resolution):
        features = np.zeros((4, 2, 2), np.float16)
        return [Failure(key, "broken") if key == "bad" else Encoded(key, b"\0", features) for key in keys]

    def probe(self, prompt, bits, resolution):
        return self.probed


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
    rollouts.serve((sets["language"], sets["sft"]))
    again = Rollouts(RecordingPool(), rollouts.source, Run(rollouts.run.directory, {}), rollouts.quarantine, None)
    assert again.serve((sets["language"],))["version"] == 3


def test_workers_that_disagree_with_the_learner_stop_the_run(rollouts):
    probe = Probe(Prompt("a", "a circle"), b"", 32)
    assert rollouts.agree(probe, -10.0) == 0.0
    rollouts.pool.probed = [-10.0, -10.5]
    with pytest.raises(RuntimeError, match="after the swap"):
        rollouts.agree(probe, -10.0)


def test_unreadable_pictures_are_counted_and_left_out(rollouts, tmp_path):
    records = [Record(str(i), Prompt(str(i), "a circle"), key) for i, key in enumerate(["good", "bad", "fine"])]
    counts, probe = rollouts.encode_corpus(records, 32, tmp_path / "corpus")
    assert counts == {"pictures": 2, "failed": 1} and probe.prompt.id == "0"
    assert rollouts.quarantine.counts == {"broken": 1}
    assert len((tmp_path / "corpus/prompts.jsonl").read_text().splitlines()) == 2
    features = (tmp_path / "corpus/features.safetensors").read_bytes()
    again = rollouts.encode_corpus(records, 32, tmp_path / "corpus")
    assert again == (counts, probe), "a run that goes on has it already"
    assert (tmp_path / "corpus/features.safetensors").read_bytes() == features
    gone = [record for record in records if record.picture != "good"] + [Record("0", records[0].prompt, "bad")]
    with pytest.raises(ValueError, match="bad: could be read before, but not any more: broken"):
        rollouts.encode_corpus(gone, 32, tmp_path / "corpus")
    with pytest.raises(ValueError, match="none of 1 training pictures"):
        rollouts.encode_corpus(records[1:2], 32, tmp_path / "other")


def test_seeds_depend_on_their_purpose():
    assert seeds_for(3, 0, 1) == seeds_for(3, 0, 1) != seeds_for(3, 0, 2)

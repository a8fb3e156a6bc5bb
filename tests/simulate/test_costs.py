"""Files of costs, and the command that reads them."""

import json
from dataclasses import asdict, replace

import pytest

from tests.simulate.test_iteration import FREE
from vargpt_rl.driver.run import CONFIG, SUMMARY
from vargpt_rl.simulate.__main__ import SimulateSettings, split
from vargpt_rl.simulate.__main__ import run as predict
from vargpt_rl.simulate.costs import Costs

SOME = replace(FREE, draw_s=2.0, encode_s=0.5, score_s=1.0, micro_batch_s=0.3, step_s=0.1, dispatch_s=0.002)


def test_costs_round_trip(tmp_path):
    SOME.write(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json") == SOME


@pytest.mark.parametrize(
    ("change", "message"),
    [({"draw_s": -1}, "draw_s=-1"), ({"batch": 0}, "batch"), ({"other": 1}, "other"), ({"draw_s": "2"}, "draw_s")],
)
def test_rejects_bad_costs(tmp_path, change, message):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(asdict(SOME) | change))
    with pytest.raises(ValueError, match=f"costs.json.*{message}"):
        Costs.read(path)


def test_takes_costs_of_a_run(tmp_path):
    (tmp_path / CONFIG).write_text(
        "{rollout: {workers: 3, batch_size: 8}, learner: {ranks: 2}, "
        "dpo: {recipe: {steps: 10, batch: 16, micro_batch: 2}}, resolutions: [64], iterations: 1}"
    )
    with pytest.raises(ValueError, match="no summary.json"):
        SOME.of_run(tmp_path)
    last = {
        "resolution": 64,
        "rollout": {"images": 80, "seconds": 20.0},
        "dpo": {"seconds": 50.0, "waited": 10.0, "steps": 10},
        "swap": {"bytes": 1000, "seconds": 0.5},
    }
    for without in ({"rollout": {}}, {"grpo": {}}):  # pairs from files, and no DPO
        lacking = {"resolution": 64} | without
        (tmp_path / SUMMARY).write_text(json.dumps({"iterations": [lacking]}))
        with pytest.raises(ValueError, match="summary.json: expected a last iteration that sampled pairs"):
            SOME.of_run(tmp_path)
    (tmp_path / SUMMARY).write_text(json.dumps({"iterations": [last]}))
    found = SOME.of_run(tmp_path)
    assert (found.batch, found.micro_batch, found.dispatch_s) == (8, 2, SOME.dispatch_s)
    assert found.draw_s == pytest.approx(6.0), "80 images are 10 batches, and 3 workers finish one every 2 s"
    assert found.score_s == pytest.approx(3.0) and found.micro_batch_s == pytest.approx(1.0)
    assert found.swap_byte_s * found.weight_bytes == pytest.approx(0.5)


def test_driver_limits_many_gpus(tmp_path, capsys):
    SOME.write(tmp_path / "costs.json")
    predict(SimulateSettings(str(tmp_path / "costs.json"), gpus=[2, 4000], prompts=8000, steps=5, pairs=4))
    first, second = capsys.readouterr().out.strip().splitlines()[-2:]
    assert first.split()[-1] == "workers" and second.split()[-1] == "driver"


def test_splits_gpus():
    assert [(m.workers, m.ranks) for m in (split(2, 0.9), split(8, 0.5), split(8, 0.01))] == [(1, 1), (4, 4), (1, 7)]

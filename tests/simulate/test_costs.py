"""Files of costs, those of the package too, and the command that reads them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.simulate.test_iteration import FREE
from vargpt_rl import simulate
from vargpt_rl.driver.run import SUMMARY
from vargpt_rl.page.contents import CONFIG
from vargpt_rl.simulate.__main__ import SimulateSettings, place
from vargpt_rl.simulate.__main__ import run as predict
from vargpt_rl.simulate.costs import SOURCES, Costs
from vargpt_rl.simulate.iteration import Work
from vargpt_rl.simulate.iteration import simulate as forecast

SOME = replace(FREE, draw_s=2.0, encode_s=0.5, score_s=1.0, micro_batch_s=0.3, step_s=0.1, dispatch_s=0.002)

SHIPPED = sorted(Path(simulate.__path__[0]).glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_costs_name_every_source(path):
    costs = Costs.read(path)
    sources = json.loads(path.read_text())[SOURCES]
    assert sources.keys() == asdict(costs).keys() and all(sources.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("placement", ["split", "colocated"])
def test_forecast_agrees_with_rates_times_gpus(path, placement):
    """Within 2 % (last batches are not full) if the driver and swaps take no time."""
    costs = replace(Costs.read(path), dispatch_s=0.0, byte_s=0.0, pair_s=0.0, swap_byte_s=0.0)
    machine = place(8, SimulateSettings(placement=placement))
    work = Work(prompts=16_000, steps=10, pairs=384)
    sampled = forecast(replace(costs, encode_s=0.0, score_s=0.0), work, machine)
    images_per_s = machine.workers * costs.batch / costs.draw_s
    assert sampled.pairs_s == pytest.approx(work.prompts / images_per_s, rel=0.02)
    found = forecast(costs, work, machine)
    batch_s = costs.draw_s + costs.encode_s + 2 * costs.score_s
    assert found.pairs_s == pytest.approx(work.prompts / costs.batch * batch_s / machine.workers, rel=0.02)
    step_s = work.pairs / costs.micro_batch / machine.ranks * costs.micro_batch_s + costs.step_s
    assert found.total_s - found.pairs_s == pytest.approx(work.steps * step_s)


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


@pytest.mark.parametrize(("gpus", "share", "expected"), [(2, 0.9, (1, 1)), (8, 0.5, (4, 4)), (8, 0.01, (1, 7))])
def test_splits_gpus(gpus, share, expected):
    machine = place(gpus, SimulateSettings(draw_share=share))
    assert (machine.workers, machine.ranks) == expected


def test_colocated_gpus_hold_a_worker_and_a_rank_each():
    machine = place(8, SimulateSettings(placement="colocated"))
    assert (machine.workers, machine.ranks) == (8, 8)
    with pytest.raises(ValueError, match="min_pairs=100: expected null with placement=colocated"):
        SimulateSettings(placement="colocated", min_pairs=100)

"""The measurement of the simulation's costs, as far as it needs no cluster."""

from vargpt_rl.simulate import measure


def test_driver_spends_time_on_every_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "PAIRS", 40)
    assert 0 < measure.pair_cost(tmp_path) < 1

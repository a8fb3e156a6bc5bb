"""The simulation against hand calculations and properties of any machine."""

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vargpt_rl.simulate.costs import Costs
from vargpt_rl.simulate.iteration import Machine, Work, simulate

FREE = Costs(
    batch=4,
    micro_batch=2,
    draw_s=0.0,
    encode_s=0.0,
    score_s=0.0,
    micro_batch_s=0.0,
    step_s=0.0,
    dispatch_s=0.0,
    byte_s=0.0,
    pair_s=0.0,
    swap_s=0.0,
    swap_byte_s=0.0,
    result_bytes=0.0,
    encoded_bytes=0.0,
    weight_bytes=0.0,
)
quick = settings(max_examples=25)
seconds = st.floats(0, 5)
costs = st.builds(
    Costs,
    batch=st.integers(1, 5),
    micro_batch=st.integers(1, 3),
    **dict.fromkeys(("draw_s", "encode_s", "score_s", "micro_batch_s", "step_s"), seconds),
    **dict.fromkeys(("dispatch_s", "byte_s", "pair_s", "swap_s", "swap_byte_s"), st.floats(0, 0.1)),
    **dict.fromkeys(("result_bytes", "encoded_bytes", "weight_bytes"), st.floats(0, 9)),
)
works = st.builds(
    Work,
    prompts=st.integers(1, 40),
    steps=st.integers(1, 9),
    pairs=st.integers(1, 12),
    sources=st.integers(1, 3),
    min_pairs=st.none() | st.integers(1, 40),
)
machines = st.builds(Machine, st.integers(1, 6), st.integers(1, 3), st.none() | st.integers(1, 4))


def batches(costs: Costs, work: Work) -> dict[str, int]:
    """Count the batches of each kind."""
    rounds = max(1, ceil(work.prompts / (work.min_pairs or work.prompts)))
    shares = [len(range(source, work.prompts, work.sources)) for source in range(work.sources)]
    last = [len(range(number, shares[-1], rounds)) for number in range(rounds)]
    pairs = [len(range(number, work.prompts, rounds)) for number in range(rounds)]
    found = {
        "draw": sum(ceil(share / costs.batch) for share in shares[:-1] + last),
        "encode": sum(ceil(count / costs.batch) for count in pairs),
        "score": sum(ceil(count / costs.micro_batch) for count in pairs),
        "train": work.steps,
    }
    return {what: count for what, count in found.items() if count}


@quick
@given(costs, works, machines)
def test_serves_every_batch_once(costs, work, machine):
    assert simulate(costs, work, machine).served == batches(costs, work)


@quick
@given(st.integers(1, 50), st.floats(0.01, 5), st.floats(0, 0.1))
def test_one_worker_takes_the_sum(prompts, draw_s, dispatch_s):
    found = simulate(replace(FREE, draw_s=draw_s, dispatch_s=dispatch_s), Work(prompts, 1, 1, sources=1), Machine(1))
    calls = ceil(prompts / 4) * 2 + ceil(prompts / 2)
    assert found.pairs_s == pytest.approx(draw_s * prompts / 4 + dispatch_s * calls)


@quick
@given(st.integers(4, 200), st.floats(0.01, 5))
def test_unlimited_workers_take_one_batch(prompts, draw_s):
    found = simulate(replace(FREE, draw_s=draw_s), Work(prompts, 1, 1, sources=1), Machine(1000))
    assert found.pairs_s == pytest.approx(draw_s)


@quick
@given(st.integers(1, 60), st.floats(0.001, 0.1))
def test_unlimited_workers_wait_for_the_driver(batches, dispatch_s):
    """If workers take no time, all time is the driver's."""
    work = Work(4 * batches, 1, 1, sources=1)
    found = simulate(replace(FREE, dispatch_s=dispatch_s), work, Machine(1000))
    assert found.pairs_s == pytest.approx(dispatch_s * (batches + batches + 2 * batches))
    assert found.driver == pytest.approx(1)


@quick
@given(st.integers(1, 9), st.integers(1, 9))
def test_training_takes_the_time_of_its_steps(steps, ranks):
    found = simulate(replace(FREE, micro_batch_s=1.0, step_s=0.5), Work(4, steps, 16), Machine(1, ranks))
    assert found.total_s == pytest.approx(steps * (ceil(8 / ranks) + 0.5))


@quick
@given(costs, works, machines)
def test_more_ranks_or_cheaper_work_never_take_longer(costs, work, machine):
    """Workers have their own cores and the driver costs nothing: behind a busy driver, order matters."""
    costs = replace(costs, dispatch_s=0.0, byte_s=0.0)
    machine = replace(machine, cores=None)
    before = simulate(costs, work, machine).total_s
    assert simulate(costs, work, replace(machine, ranks=machine.ranks + 1)).total_s <= before * (1 + 1e-9)
    for what in ("micro_batch_s", "step_s", "pair_s", "swap_s"):
        assert simulate(replace(costs, **{what: 0.0}), work, machine).total_s <= before * (1 + 1e-9)


@quick
@given(costs, works, machines)
def test_more_workers_never_take_longer_with_a_free_driver(costs, work, machine):
    costs = replace(costs, dispatch_s=0.0, byte_s=0.0)
    machine = replace(machine, cores=None)
    before = simulate(costs, work, machine).total_s
    assert simulate(costs, work, replace(machine, workers=machine.workers + 1)).total_s <= before * (1 + 1e-9)


@quick
@given(costs, works, machines)
def test_takes_at_least_as_long_as_the_busiest_part(costs, work, machine):
    found = simulate(costs, work, machine)
    busy = found.busy
    drawn = sum(busy.get(what, 0.0) for what in ("draw", "encode", "score", "swap"))
    driven = sum(busy.get(what, 0.0) for what in ("dispatch", "store", "table"))
    assert found.pairs_s >= max(drawn / machine.workers, driven) * (1 - 1e-9)
    assert found.total_s >= max(found.pairs_s, busy["train"]) * (1 - 1e-9)
    if machine.cores:
        assert found.total_s >= sum(busy.values()) / machine.cores * (1 - 1e-9)


@quick
@given(costs, works, st.integers(1, 40))
def test_overlap_hides_the_smaller_part(costs, work, min_pairs):
    """On separate devices, overlapped training and sampling never take longer than their sum."""
    machine = Machine(2, 1)
    apart = simulate(costs, replace(work, min_pairs=None), machine)
    beside = simulate(costs, replace(work, min_pairs=min_pairs), machine)
    assert beside.total_s <= beside.pairs_s + apart.busy["train"] + 1e-6


@pytest.mark.parametrize("wrong", [Work(0, 1, 1), Work(1, 0, 1), Work(1, 1, 1, sources=0)])
def test_rejects_an_empty_iteration(wrong):
    with pytest.raises(ValueError, match="expected 1 or more"):
        simulate(FREE, wrong, Machine(1))

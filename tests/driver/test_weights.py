"""Weight sync sends what differs, keeps versions across a resume, and stops a run whose workers disagree."""

import pytest
import torch

from tests.helpers.driver import WorkersDouble, stage_context
from vargpt_rl.data.samples import Probe, Prompt
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.weights import WeightSync, verify_swap
from vargpt_rl.storage.checkpoint import Policy, save_checkpoint


@pytest.fixture
def sets(tmp_path):
    """Weight sets: one of the language model's tensors, three of the decoder's."""
    names = {"language": "l", "sft": "d", "dpo": "d", "control": "d"}
    return {key: save_checkpoint(tmp_path / key, {name: torch.zeros(2)}) for key, name in names.items()}


@pytest.fixture
def swap(tmp_path, sets):
    """Swap the workers of a stage to weight sets by name."""
    context = stage_context(tmp_path)

    def to(*names: str) -> dict:
        return context.swap_to(Policy("", tuple(sets[name] for name in names)))

    to.context = context
    return to


def test_only_what_differs_is_sent(swap):
    swap("language", "sft")
    swap("language", "sft")
    swap("language", "sft", "dpo")
    assert swap.context.pool.published == ["language", "sft", "dpo"]


def test_a_superseded_set_is_not_sent(swap):
    swap("language", "sft", "dpo")
    assert swap.context.pool.published == ["language", "dpo"]


def test_workers_can_go_back(swap):
    swap("language", "sft", "control")
    swap("language", "sft")
    assert swap.context.pool.published == ["language", "control", "sft"]


def test_a_set_that_an_earlier_one_overwrites_is_sent_again(swap, tmp_path, sets):
    sets["start"] = save_checkpoint(tmp_path / "start", {name: torch.zeros(2) for name in "ld"})
    swap("start", "language", "sft")
    swap("start", "language")
    assert swap.context.pool.published == ["language", "sft", "start", "language"]


def test_going_back_to_the_starting_model_is_refused(swap):
    swap("sft")
    with pytest.raises(RuntimeError, match="do not set"):
        swap()


def test_an_unverified_swap_stops_the_run(swap):
    swap.context.pool.verified = False
    with pytest.raises(RuntimeError, match="other weights"):
        swap("sft")


def test_versions_are_the_same_after_a_resume(swap, sets):
    done = [
        swap.context.run.step("0", lambda: swap("language", "sft")),
        swap.context.run.step("1", lambda: swap("language", "control")),
        swap("language", "sft", "dpo"),
    ]
    pool = WorkersDouble()
    again = WeightSync(pool, None, Run(swap.context.run.directory, {}))
    policy = Policy("", tuple(sets[name] for name in ("language", "sft", "dpo")))
    assert again.swap_to(policy, swap.context.log) == done[2]
    assert [each["version"] for each in done] == [2, 3, 4]
    assert (pool.published, pool.version) == (["language", "control", "dpo"], 4)


def test_the_text_engine_gets_the_same_weights(tmp_path, sets):
    context = stage_context(tmp_path, text=WorkersDouble())
    context.swap_to(Policy("", (sets["language"], sets["sft"])))
    assert context.session.text.published == context.pool.published == ["language", "sft"]
    assert context.session.text.version == context.pool.version
    context.session.text.verified = False
    with pytest.raises(RuntimeError, match="other weights"):
        context.swap_to(Policy("", (sets["language"], sets["dpo"])))


def test_workers_that_disagree_with_the_learner_stop_the_run():
    pool = WorkersDouble()
    probe = Probe(Prompt("a", "a circle"), bytes(40), 32)
    assert verify_swap(pool, probe, -10.0, torch.float32) == 0.0
    pool.probed = [-10.0, -10.5]
    with pytest.raises(RuntimeError, match="after the swap"):
        verify_swap(pool, probe, -10.0, torch.float32)

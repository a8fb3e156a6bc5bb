"""Work in parts: an interrupted step resumes after its last part, and a damaged part is done again."""

import pytest

from actors.worker import ImageScore
from rewards.combined import merge_reports
from rewards.total import Total
from tests.helpers.driver import WorkersDouble, stage_context
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.driver.judging import reward_rows, rewards_of
from vargpt_rl.driver.parts import in_parts, part_size, sample_fields, sample_of, score_fields, score_of
from vargpt_rl.driver.sampling import generate_kept

PROMPTS = [Prompt(str(i), f"prompt {i}") for i in range(10)]


class CutWorkers(WorkersDouble):
    """Fails at a call."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def run(self, method, items, *args, **more):
        if len(self.calls) == self.at:
            raise ConnectionError("cut")
        return super().run(method, items, *args, **more)


def in_fours(folder, pool=None):
    return stage_context(folder, "rollout.keep_every=3", "rollout.batch_size=4", pool=pool)


def test_sampling_resumes_after_its_last_part(tmp_path):
    context = in_fours(tmp_path, CutWorkers(at=2))
    with pytest.raises(ConnectionError):
        generate_kept(context, PROMPTS, list(range(10)), "p")
    again = in_fours(tmp_path)
    samples = generate_kept(again, PROMPTS, list(range(10)), "p")
    assert [(name, len(jobs)) for name, jobs in again.pool.calls] == [("generate_images", 2)], "only the last part"
    assert [sample.seed for sample in samples] == list(range(10))
    assert [sample.prompt for sample in samples] == PROMPTS


def doubled(part: list[int]) -> dict:
    return {"twice": [2 * each for each in part]}


def test_parts_of_other_items_are_done_again(tmp_path):
    context = in_fours(tmp_path)
    done: list[list[int]] = []

    def work(part: list[int]) -> dict:
        done.append(part)
        return doubled(part)

    expected = [doubled([0, 1, 2, 3]), doubled([4, 5, 6, 7]), doubled([8, 9])]
    assert list(in_parts(context, "w", list(range(10)), work)) == expected
    assert list(in_parts(context, "w", list(range(10)), work)) == expected and len(done) == 3
    assert list(in_parts(context, "w", [0, 1, 2, 3, 40, 5, 6, 7, 8, 9], work))[1] == doubled([40, 5, 6, 7])
    assert done[3:] == [[40, 5, 6, 7]]


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{}", b"\xff{", b'{"items": 1', None])
def test_damaged_parts_are_done_again(tmp_path, damaged):
    context = in_fours(tmp_path)
    assert list(in_parts(context, "w", [1, 2], doubled)) == [doubled([1, 2])]
    path = context.run.parts / "w" / "00000000.json"
    path.write_bytes(path.read_bytes().replace(b"[2, 4]", b"[2, 5]") if damaged is None else damaged)
    assert list(in_parts(context, "w", [1, 2], doubled)) == [doubled([1, 2])]
    assert context.run.state["events"][0].startswith(f"doing a part again: {path} is damaged")


def test_parts_go_with_the_record_of_their_step(tmp_path):
    context = in_fours(tmp_path)
    context.run.step("iter-00/sample", lambda: next(in_parts(context, "w", [1], lambda part: {"n": 1})))
    assert not context.run.parts.exists()


def test_parts_are_whole_batches_and_no_worker_waits_long(tmp_path):
    context = stage_context(tmp_path, "rollout.batch_size=16", "rollout.workers=2")
    assert part_size(context, 16) == 1024 and part_size(context, 24) == 1032
    context = stage_context(tmp_path / "many", "rollout.batch_size=16", "rollout.workers=64")
    assert part_size(context, 16) == 16 * 64 * 16


def test_kept_results_are_read_as_they_were(tmp_path):
    sample = Sample(Prompt("1", "ä 李", "Here:"), b"\x00\xff", 32, 7, {"cfg": 0.1}, 3, "a/b", [-0.1])
    assert sample_of(sample_fields(sample)) == sample
    score = ImageScore(-0.1, [0.1, -0.2], [1.0])
    assert score_of(score_fields(score)) == score
    values = rewards_of(reward_rows([Total(0.5, {"a": 1.0}), None, 2.0]))
    assert values == [0.5, None, 2.0] and values[0].terms == {"a": 1.0}


def test_reports_of_parts_add_up():
    one = {"r": dict(scored=2, mean=1.0, seconds=1.0, restarts=0, unscored={"a": 1}, errors={"a": "x"})}
    two = {"r": dict(scored=6, mean=3.0, seconds=2.0, restarts=1, unscored={"a": 2, "b": 1}, errors={"a": "y"})}
    merged = dict(scored=8, mean=2.5, seconds=3.0, restarts=1, unscored={"a": 3, "b": 1}, errors={"a": "x"})
    assert merge_reports([one, two]) == {"r": merged}
    assert merge_reports([one]) == one and merge_reports([{}]) == {}

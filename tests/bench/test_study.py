"""Runs of a study begin as copies of one that has been through SFT."""

from tests.helpers.study import begun, scored
from vargpt_rl.bench.study import fork
from vargpt_rl.driver.run import Run
from vargpt_rl.evaluate.paired import write_scores


def test_a_fork_has_what_was_done_up_to_sft(tmp_path):
    source = begun(tmp_path / "dpo")
    write_scores(source / "evaluations/iter-00-control.jsonl", scored([1.0]))
    fork(source, tmp_path / "grpo")
    run = Run(tmp_path / "grpo", {"name": "grpo"})  # other settings are not refused
    done = ["understands/before", "iter-00/before", "iter-00/sft", "iter-00/after_sft"]
    assert list(run.state["steps"]) == done
    assert (run.directory / "checkpoints/iter-00-sft/final/weights.safetensors").read_bytes() == b"weights"
    assert [path.name for path in (run.directory / "preferences").iterdir()] == ["iter-00-held-out.parquet"]
    assert [path.name for path in (run.directory / "evaluations").iterdir()] == ["iter-00-after_sft.jsonl"]
    run.step("iter-00/grpo", dict)
    fork(source, tmp_path / "grpo")  # begun: left as it is
    assert list(Run(tmp_path / "grpo", {"name": "grpo"}).state["steps"]) == [*done, "iter-00/grpo"]
    assert not list(tmp_path.glob(".*"))

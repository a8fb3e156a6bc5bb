"""A run in bf16: workers and learner agree, and weights are swapped without loss."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.driver.test_interrupted import go
from tests.helpers.tiny import tiny_checkpoint


@pytest.mark.timeout(600)
def test_a_run_in_bf16_starts_dpo_at_its_reference(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    go(tmp_path, "half", "end", settings=("dtype=bf16",))
    found = json.loads((tmp_path / "half/summary.json").read_text())["iterations"][0]
    assert found["dpo"]["step0_max_abs_logratio"] <= 0.5
    assert found["dpo"]["loss_last"] != found["dpo"]["loss_first"]
    for stage in ("sft", "dpo"):
        assert found[stage]["swap"]["verified"] and found[stage]["swap"]["probe_difference"] <= 0.5
    weights = load_file(tmp_path / "half/checkpoints/iter-00-dpo/final/weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}

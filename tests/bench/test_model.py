"""The benchmark of the model runs at tiny size."""

import pytest
import torch

from learners.image_policy import ImagePolicy
from vargpt_rl.bench.model import main, step_rows
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.stages import STAGES, freeze


def test_tiny_benchmark_prints_a_row_per_work(capsys):
    assert main(["--tiny", "--batches", "1", "2", "--resolutions", "32"]) == 0
    printed = capsys.readouterr().out
    assert "batch 1" in printed and "batch 2" in printed
    assert printed.count("DPO step") == 4 and printed.count("%") == 5, "the row with stored states has no share"


def test_whole_step_counts_the_optimizers_state():
    torch.manual_seed(0)
    model = ImagePolicy(VargptConfig.from_pretrained(EMBEDDED))
    rows = {row.work: row for row in step_rows(model, 32)}
    freeze(model, STAGES["dpo"])
    state = 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert rows["DPO step, AdamW"].memory == pytest.approx(rows["DPO step"].memory + state, rel=0.02)
    assert rows["DPO step, states stored"].memory < rows["DPO step"].memory

"""The benchmark of the model runs at tiny size."""

from vargpt_rl.bench.model import main


def test_tiny_benchmark_prints_a_row_per_work(capsys):
    assert main(["--tiny", "--batches", "1", "2", "--resolutions", "32"]) == 0
    printed = capsys.readouterr().out
    assert "batch 1" in printed and "batch 2" in printed
    assert printed.count("DPO step") == 3

"""The GPU benchmark runs at tiny size on a CPU, with a plain checkout's packages alone."""

import gc
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vargpt_rl.bench import gpu
from vargpt_rl.bench.gpu import Bench, GpuRow, MasterWeights, make_model, markdown, measure_steps, parse, sized_config
from vargpt_rl.bench.gpu_checks import attention_kernels

ROOT = Path(__file__).parents[2]
ABSENT = {
    *("accelerate", "datasets", "deepspeed", "hydra", "omegaconf", "pandas", "peft", "psutil", "pyarrow"),
    *("ray", "rich", "scipy", "torchdata", "torchvision", "trl", "wandb", "xxhash"),
}
PROGRAM = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # importing it fails, as if it were not installed
from vargpt_rl.bench.gpu import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(400)
def test_a_plain_checkout_measures_everything(tmp_path):
    command = ["--tiny", "--resolutions", "32", "--batches", "1", "2", "--micro-batches", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command, "--deadline", "3000"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    works = [row["work"] for row in found["rows"]]
    assert works.count("sampling, guidance 3") == 2 and "DPO step" in works and "SFT step" in works
    assert "hash of a set, BLAKE2b" in works and "swap from the mapped file, verified" in works
    steps = [row for row in found["rows"] if row["work"] in ("DPO step", "SFT step")]
    assert all(row["seconds"] > 0 and row["plan"] > 0 and 0 < row["share"] < 2 for row in steps)
    attention = next(row["note"] for row in found["rows"] if row["work"] == "attention of a DPO step")
    assert attention.startswith("all in a flash kernel (flash_attention")
    difference = next(row["note"] for row in found["rows"] if row["work"].startswith("log-probabilities"))
    assert "largest difference" in difference
    table = (tmp_path / "gpu.md").read_text()
    assert table in done.stdout and table.count("\n| ") == len(works) + 2


def tiny_bench(out: Path) -> Bench:
    device = torch.device("cpu")
    return Bench(make_model(sized_config(True, 1.0), device, torch.float32), device, 1.0, 0.0, out)


def test_a_measurement_near_the_deadline_is_left_out(tmp_path):
    bench = tiny_bench(tmp_path)
    row = GpuRow("sampling", 256, 4)
    assert not bench.attempt(row, lambda row: pytest.fail("ran"), expected_s=1.0)
    assert row.note.startswith("left out") and bench.rows == [row]


def test_files_are_written_after_each_row(tmp_path):
    bench = tiny_bench(tmp_path)
    for count in (1, 2):
        bench.add(GpuRow("sampling", 256, count, seconds=0.5))
        assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == count
        assert (tmp_path / "gpu.md").read_text().count("| sampling |") == count


def test_masters_of_one_stage_are_gone_in_the_next(tmp_path, monkeypatch):
    made = []

    def masters(model):
        weights = MasterWeights(model)
        made.append(weakref.ref(weights))
        return weights

    monkeypatch.setattr(gpu, "MasterWeights", masters)
    bench = tiny_bench(tmp_path)
    bench.ends = time.monotonic() + 1000
    for stage in ("dpo", "sft"):
        assert not any(reference() for reference in made)
        measure_steps(bench, sized_config(True, 1.0), stage, [32], [1])
        gc.collect()
    assert [row.work for row in bench.rows] == ["DPO step", "SFT step"] and all(row.seconds for row in bench.rows)


def test_math_attention_is_not_a_flash_kernel():
    q = torch.zeros(1, 1, 4, 8, requires_grad=True)

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    found = attention_kernels(step, torch.device("cpu"))
    assert found.startswith("NOT in a flash kernel: attention_math")


def test_the_fraction_is_of_the_releases_layers():
    config = sized_config(False, 0.25)
    assert (config.text_config.num_hidden_layers, config.decoder_config.depth) == (7, 8)


@pytest.mark.parametrize("fraction", ["0", "1.5"])
def test_a_fraction_out_of_range_is_refused(fraction, capsys):
    with pytest.raises(SystemExit) as error:
        parse(["--fraction", fraction])
    assert error.value.code == 2 and "expected above 0 and at most 1" in capsys.readouterr().err


def test_a_table_has_a_line_per_row():
    table = markdown([GpuRow("step", 256, 2, 0.5, "4 rows/s", 0.25, 2**30, None, "a note")])
    assert table.splitlines()[-1] == "| step | 256 | 2 | 0.500 | 4 rows/s | 25.0% | 1.0 |  | a note |"

"""The doctor: plans of a full-size model, verdicts, bad settings, and vulnerable versions."""

from resource import RUSAGE_SELF, getrusage

import pytest
from rich.console import Console

from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl import doctor
from vargpt_rl.memory.units import GIB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return f"checkpoint={tiny_checkpoint(tmp_path_factory.mktemp('model'))}"


def test_plans_the_full_size_model_without_its_weights(capsys):
    before = getrusage(RUSAGE_SELF).ru_maxrss
    code = doctor.main(["experiment=vargpt_v1_1", "stage=dpo", "gpus=8", "gpu_memory_gib=80"])
    assert (getrusage(RUSAGE_SELF).ru_maxrss - before) * 1024 < GIB, "the weights alone are 20"
    printed = capsys.readouterr().out
    assert code == 0 and "the run fits into 8 GPUs of 80.0 GiB" in printed
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] == ["dpo"]]
    assert [row[1] for row in rows] == ["256", "512"]
    assert all(float(row[4]) == pytest.approx(10.629e9 * 2 / 4 / GIB, 0.01) for row in rows), "a quarter of the weights"
    assert "pretrain" not in printed and "torch 2." in printed


def test_nothing_is_abbreviated_on_a_terminal_of_80_columns(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "wide_console", lambda: Console(width=80))
    assert doctor.main([checkpoint, "resolutions=[32]"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "sft, 32 px\n" in text and "sum " in text


def test_an_adapter_fits_one_gpu_of_80_gb(capsys):
    assert doctor.main(["experiment=vargpt_v1_1_lora_1gpu", "gpus=1", "gpu_memory_gib=79.1"]) == 0
    printed = capsys.readouterr().out
    assert "the run fits into 1 GPUs of 79.1 GiB" in printed
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] == ["256"] and "yes" in line]
    assert [row[1] for row in rows] == ["sft", "dpo", "rl"]
    assert all(row[3:] == ["no", "no", "yes", "yes"] for row in rows)


def test_an_adapter_beside_4_bits_fits_one_gpu_of_24_gb(capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (make test-qlora)")
    assert doctor.main(["experiment=vargpt_v1_1_lora_24gb", "gpus=1", "gpu_memory_gib=23.6"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] == ["256"] and "yes" in line]
    assert [row[1] for row in rows] == ["sft", "dpo", "rl"] and all(row[3:] == ["yes"] * 4 for row in rows)
    assert all(float(row[2]) < 22 for row in rows), "with room for what the plan leaves out"


def test_explains_a_run_that_does_not_fit(checkpoint, capsys):
    small = [checkpoint, "resolutions=[32]", "iterations=1", "stages=[align]"]
    assert doctor.main([*small, "gpus=4", "gpu_memory_gib=1"]) == 1
    assert "which has 1.0 GiB: 1 learner rank of" in capsys.readouterr().out
    assert doctor.main([*small, "gpus=2", "gpu_memory_gib=80"]) == 1
    assert "need 4 GPUs in placement=split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("experiment=other", "vargpt_v1_1"),
        ("stage=sleep", "pretrain, understanding, sft, dpo"),
        ("gpus=0", "gpus=0"),
        ("gpus=many", "gpus=many"),
        ("gpu_memory_gib=-1", "gpu_memory_gib=-1"),
        ("checkpoint=nowhere", "checkpoint=nowhere"),
        ("sft.recipe.zer=3", "zer"),
        ("stages=[tokenizer]", "stages=['tokenizer']"),
    ],
)
def test_bad_settings_are_one_line_with_the_key(checkpoint, argument, named, capsys):
    start = [] if argument.startswith(("checkpoint", "experiment")) else [checkpoint]
    assert doctor.main([*start, "resolutions=[32]", argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "number", "named"),
    [
        ("ray", "2.51.1", ["CVE-2025-62593", "CVE-2026-27482"]),
        ("ray", "2.52.0", ["CVE-2026-27482"]),
        ("ray", "2.53.0", ["CVE-2026-27482"]),
        ("ray", "2.54.0", []),
        ("torch", "2.5.1+cu124", ["CVE-2025-32434", "CVE-2026-24747"]),
        ("torch", "2.6.0", ["CVE-2026-24747"]),
        ("torch", "2.9.1+cpu", ["CVE-2026-24747"]),
        ("torch", "2.10.0+cpu", []),
        ("torch", "2.10.0rc1", ["CVE-2026-24747"]),
        ("trl", "0.1", []),
    ],
)
def test_warns_of_vulnerable_versions(package, number, named):
    lines = doctor.warnings({package: number})
    assert [next(word for word in line.split() if word.startswith("CVE")).rstrip(":") for line in lines] == named
    assert all(line.startswith(f"warning: {package} {number} has ") for line in lines)


def test_installed_versions_have_no_warnings(monkeypatch):
    assert not [line for line in doctor.about([]) if line.startswith("warning")]
    monkeypatch.setattr(doctor, "version", {"ray": "2.40.0", "torch": "2.13.0"}.get)
    monkeypatch.setattr(doctor, "PACKAGES", ("ray", "torch"))
    first, *warned = doctor.about([])[:3]
    assert "ray 2.40.0, torch 2.13.0" in first and all("ray 2.40.0" in line for line in warned)


def test_warns_of_little_shared_memory(monkeypatch):
    said = [line for line in doctor.about([]) if "/dev/shm" in line]
    monkeypatch.setattr(doctor, "SHARED_NEEDED", 2**60)
    (warning,) = [line for line in doctor.about([]) if "/dev/shm" in line]
    assert said == [] and warning.startswith("warning: /dev/shm has ") and "--shm-size" in warning

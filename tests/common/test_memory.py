import pytest

from vargpt_rl.common import memory
from vargpt_rl.common.memory import available_memory, forget_peak, peak_memory

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {"memory.max": f"{GIB}\n"}),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{GIB}\n"}),
        ("0::/a\n", {"a/memory.max": f"{2 * GIB}\n", "memory.max": f"{GIB}\n"}),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": f"{GIB}\n"}),
        ("4:cpu,memory:/gone\n", {"memory/memory.limit_in_bytes": f"{GIB}\n"}),
    ],
)
def test_the_lowest_limit_counts(groups, own, files):
    groups(own, files)
    assert available_memory() == GIB


@pytest.mark.parametrize("files", [{}, {"memory.max": "max\n"}, {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}])
def test_without_a_limit_it_is_the_machines(groups, files):
    groups("4:memory:/\n0::/\n", files)
    assert available_memory() > GIB


def test_the_peak_is_that_since_it_was_forgotten():
    forget_peak()
    before = peak_memory()
    held = b"1" * (200 * 2**20)
    assert peak_memory() > before + 150 * 2**20
    del held
    forget_peak()
    assert peak_memory() < before + 100 * 2**20

"""All ways to the workers bring the same tensors, bounded in memory, and say so when they cannot."""

import threading
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from actors import transport
from actors.transport import AutoTransfer, BroadcastTransfer, ChunkServer, ObjectStoreTransfer, SharedFileTransfer
from actors.weights import WeightLayout, layout_of
from vargpt_rl.common.network import free_port


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(40 + i, 5).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(7)}
    tensors |= {"none": torch.zeros(0, 3), "one": torch.tensor(2.5), "ids": torch.arange(9)}
    path = tmp_path_factory.mktemp("set") / "weights.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def layout(path) -> WeightLayout:
    return layout_of(path)


@pytest.fixture(scope="module")
def chunk_server():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ChunkServer.remote()
    ray.shutdown()


def taken(transfer) -> dict[str, torch.Tensor]:
    """All that comes, each tensor once."""
    found: dict[str, torch.Tensor] = {}
    for chunk in transfer.chunks():
        assert not chunk.keys() & found.keys()
        found |= {name: tensor.clone() for name, tensor in chunk.items()}
    return found


def assert_same(found: dict[str, torch.Tensor], path: Path) -> None:
    expected = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_shared_file_is_read_tensor_by_tensor(path, layout):
    assert max(len(chunk) for chunk in SharedFileTransfer(layout, path).chunks()) == 1
    assert_same(taken(SharedFileTransfer(layout, path)), path)


@pytest.mark.parametrize("limit", [1, 1000, 10**9])
def test_chunks_have_a_bounded_size(path, layout, chunk_server, monkeypatch, limit):
    monkeypatch.setattr(transport, "CHUNK", limit)
    sizes = [
        sum(tensor.nbytes for tensor in chunk.values())
        for chunk in ObjectStoreTransfer(layout, path, chunk_server).chunks()
    ]
    assert sum(sizes) == layout.bytes
    assert max(sizes) <= max(limit, *map(layout.size, layout.shapes))
    assert_same(taken(ObjectStoreTransfer(layout, path, chunk_server)), path)


def test_the_chunk_server_keeps_two_current_chunks(tmp_path, monkeypatch):
    chunk_server = transport._ChunkServer()
    monkeypatch.setattr(transport.ray, "put", lambda chunk: chunk)
    path = tmp_path / "set.safetensors"
    save_file({name: torch.ones(3) for name in "abc"}, path)
    for name in "abca":
        (chunk,) = chunk_server.chunk(path, [name])
        assert list(chunk) == [name] and len(chunk_server.kept) <= 2
    assert chunk_server.chunk(path, ["a"])[0] is chunk, "workers in step share a chunk"
    save_file({name: torch.zeros(3) for name in "abc"}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert chunk_server.chunk(path, ["a"])[0]["a"].sum() == 0


def test_auto_prefers_the_shared_file(path, layout, chunk_server, tmp_path):
    size = path.stat().st_size
    assert_same(taken(AutoTransfer(layout, path, None, size)), path)  # the file is seen: no chunk_server is asked
    other = tmp_path / "other.safetensors"  # seen here, but not the file that the chunk_server's side means
    save_file({"t0": torch.zeros(1)}, other)
    with pytest.raises(AttributeError):
        taken(AutoTransfer(layout, other, None, size))
    assert_same(taken(AutoTransfer(layout, path, chunk_server, size + 1)), path)


def test_a_broadcast_reads_once_and_reaches_all(path, layout, tmp_path):
    address, found, world = ("127.0.0.1", free_port()), {}, 3

    def take(rank: int) -> None:
        own = path if rank == 0 else tmp_path / "not here"
        found[rank] = taken(BroadcastTransfer(layout, own, address, rank, world, "cpu", 30.0))

    threads = [threading.Thread(target=take, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(world):
        assert_same(found[rank], path)


def test_a_broadcast_without_peers_times_out(path, layout):
    with pytest.raises(RuntimeError, match="(?i)time"):
        taken(BroadcastTransfer(layout, path, ("127.0.0.1", free_port()), 0, 2, "cpu", 1.0))


def test_an_empty_set_has_no_chunks(path, chunk_server):
    nothing = layout_of(path, lambda name: False)
    assert (
        nothing.bytes == 0
        and taken(SharedFileTransfer(nothing, path)) == taken(ObjectStoreTransfer(nothing, path, chunk_server)) == {}
    )

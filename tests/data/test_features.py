"""The feature cache gives back the very bits that it was given, or says which shard is wrong."""

import hashlib
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargpt_rl.data.features import FeatureCache, FeatureWriter, drop_damaged, shard_files, tokenizer_checksum

DEPTH, RESOLUTION = 3, 32
BYTES = DEPTH * 2 * 2 * 2
TOKENIZER = "0123abcd"

# numpy's byte strings lose zeros at their end: digests that end in some are tried on purpose.
digests = (st.binary(min_size=32, max_size=32) | st.integers(0, 3).map(lambda n: bytes(31) + bytes([n]))).map(bytes.hex)
keys = st.tuples(digests, st.integers(0, 2) | st.just(256) | st.just(2**32 - 1))


def features(*seed: int) -> np.ndarray:
    """All bit patterns of finite float16: negative zeros and subnormal numbers too."""
    bits = np.random.default_rng(seed).integers(0, 2**16, (DEPTH, 2, 2), np.uint16)
    return np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits).astype(np.uint16).view(np.float16)


def name(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def written(folder, count: int = 5, shard: int = 2 * BYTES, resolution: int = RESOLUTION):
    with FeatureWriter(folder, TOKENIZER, resolution, shard) as writer:
        for number in range(count):
            writer.add(name(number), number % 2, features(number))
    return shard_files(folder)


@settings(max_examples=30)
@given(st.lists(st.sets(keys, max_size=9), min_size=1, max_size=3), st.integers(1, 5), st.data())
def test_what_is_put_is_got_across_shards_and_resumes(tmp_path_factory, runs, items, data):
    folder = tmp_path_factory.mktemp("cache")
    given = {key: features(number) for number, key in enumerate(sorted(set().union(*runs)))}
    for run in runs:  # a later run may write again what is there
        with FeatureWriter(folder, TOKENIZER, RESOLUTION, items * BYTES) as writer:
            for key in data.draw(st.permutations(sorted(run))):
                writer.add(*key, given[key])
    if not given:
        assert shard_files(folder) == []
        return
    cache = FeatureCache(folder, TOKENIZER, RESOLUTION)
    assert len(cache) == len(given)
    assert cache.crops == 1 + max(crop for _, crop in given)
    for (digest, crop), expected in given.items():
        got = cache.get(digest, crop)
        assert got.dtype == np.float16 and got.shape == (DEPTH, 2, 2)
        assert got.tobytes() == expected.tobytes()
        for near in ((digest, (crop + 1) % 2**32), (name(-1), crop)):
            assert (near in cache) == (near in given) == (cache.get(*near) is not None)


def test_shards_hold_no_more_than_they_should_and_are_read_bit_by_bit(tmp_path):
    files = written(tmp_path, 5)
    assert len(files) == 3, "two, two and one"
    assert all(path.stat().st_size < 1000 for path in files)
    assert len(written(tmp_path, 5)) == 3, "the same contents have the same name"
    again = pickle.loads(pickle.dumps(FeatureCache(tmp_path, TOKENIZER, RESOLUTION)))
    assert all(again.get(name(n), n % 2).tobytes() == features(n).tobytes() for n in range(5))


def test_features_in_any_order_of_memory_are_written(tmp_path):
    turned = np.asfortranarray(features(1))
    with FeatureWriter(tmp_path, TOKENIZER, RESOLUTION) as writer:
        writer.add(name(1), 0, turned)
    assert (FeatureCache(tmp_path, TOKENIZER, RESOLUTION).get(name(1), 0) == turned).all()


def test_what_was_added_before_a_fault_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), FeatureWriter(tmp_path, TOKENIZER, RESOLUTION) as writer:
        writer.add(name(1), 0, features(1))
        raise KeyboardInterrupt
    assert (name(1), 0) in FeatureCache(tmp_path, TOKENIZER, RESOLUTION)


@pytest.mark.parametrize(
    ("tokenizer", "resolution", "found"),
    [
        ("ffff", RESOLUTION, f"of image tokenizer {TOKENIZER} at 32 px, expected those of ffff at 32 px"),
        (TOKENIZER, 64, f"of image tokenizer {TOKENIZER} at 32 px, expected those of {TOKENIZER} at 64 px"),
    ],
)
def test_another_tokenizer_or_resolution_is_refused(tmp_path, tokenizer, resolution, found):
    (path,) = written(tmp_path, 1)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: features {found}')}$"):
        FeatureCache(tmp_path, tokenizer, resolution)


@pytest.mark.parametrize("folder", ["", "none"])
def test_a_folder_without_shards_is_refused(tmp_path, folder):
    (tmp_path / ".features-1.safetensors.7").write_bytes(b"half written")
    with pytest.raises(ValueError, match=f"^{tmp_path / folder}: no shards of features"):
        FeatureCache(tmp_path / folder, TOKENIZER, RESOLUTION)


def everything(folder) -> None:
    """Reads a cache of `written` through. ValueError, or what it gives is right."""
    cache = FeatureCache(folder, TOKENIZER, RESOLUTION)
    for number in range(5):
        assert cache.get(name(number), number % 2).tobytes() == features(number).tobytes()


@settings(max_examples=20)
@given(st.floats(0, 1, exclude_max=True))
def test_torn_shards_are_named(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("torn")
    path = written(folder)[1]
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: torn or damaged shard"):
        FeatureCache(folder, TOKENIZER, RESOLUTION)


@settings(max_examples=60)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_changed_bytes_are_never_taken_for_features(tmp_path_factory, share, change):
    folder = tmp_path_factory.mktemp("changed")
    path = written(folder)[1]
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= change
    path.write_bytes(data)
    try:
        everything(folder)  # a blank between two entries of the header may change
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


def test_what_is_no_features_is_refused(tmp_path):
    writer = FeatureWriter(tmp_path, TOKENIZER, RESOLUTION)
    for wrong in (features(1).astype(np.float32), features(1)[:, :1]):
        with pytest.raises(ValueError, match="expected float16 of 2 x 2"):
            writer.add(name(1), 0, wrong)
    with pytest.raises(ValueError, match=f"{name(1)}, crop 0, are not finite"):
        writer.add(name(1), 0, np.full((DEPTH, 2, 2), np.inf, np.float16))
    for digest in ("ab", "xy" * 32):
        with pytest.raises(ValueError):
            writer.add(digest, 0, features(1))


def test_a_checksum_is_that_of_names_shapes_and_values():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    known = tokenizer_checksum(tensors)
    assert known == tokenizer_checksum({"b": tensors["b"].half(), "a": tensors["a"].bfloat16()})
    others = [{"a": tensors["a"]}, tensors | {"a": tensors["a"].view(3, 2)}, tensors | {"b": tensors["b"] * 2}]
    others.append({"c": tensors["a"], "b": tensors["b"]})
    assert len({known, *map(tokenizer_checksum, others)}) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder"])
def test_damaged_shards_are_dropped_by_name_and_others_kept(tmp_path, damage):
    first, *others = written(tmp_path)
    assert drop_damaged(tmp_path, TOKENIZER, RESOLUTION) == []
    content = first.read_bytes()
    if damage == "folder":
        first.unlink()
        first.mkdir()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        first.write_bytes({"flip": flipped, "cut": content[:-3], "empty": b""}[damage])
    (told,) = drop_damaged(tmp_path, TOKENIZER, RESOLUTION)
    assert str(first) in told and shard_files(tmp_path) == others

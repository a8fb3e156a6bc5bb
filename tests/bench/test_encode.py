"""Cached and computed features give the same step."""

from vargpt_rl.bench import encode


def test_cached_and_computed_features_are_the_same():
    found = encode.measure(resolution=32, micro_batch=2, images=4, rounds=1)
    # half a float16 step below 16; batches of another size sum in another order
    assert found.difference <= 8e-3
    assert 32 * 2 * 2 * 2 < found.bytes_a_crop < 32 * 2 * 2 * 2 + 200, "features, 40 bytes of index and a header"
    assert min(found.cached, found.tokenized, found.crops_a_second) > 0

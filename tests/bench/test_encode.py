"""The bench compares two ways to the same step."""

from vargpt_rl.bench import encode


def test_features_read_and_made_are_the_same_and_their_size_is_counted():
    found = encode.measure(resolution=32, micro_batch=2, images=4, rounds=1)
    # half a step of float16 below 16, and batches of another size are added up in another order
    assert found.difference <= 8e-3
    assert 32 * 2 * 2 * 2 < found.bytes_a_crop < 32 * 2 * 2 * 2 + 200, "features, and 40 bytes of index with a header"
    assert min(found.cached, found.tokenized, found.crops_a_second) > 0

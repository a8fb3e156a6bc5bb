"""Rows of preference tables."""


def row(pair_id: str = "a", **changes) -> dict[str, object]:
    """Return a row of a preference table, its external winner chosen over a sample, with these ``changes``."""
    return {
        "pair_id": pair_id,
        "prompt_id": "p",
        "prompt": "a red circle",
        "reply": "",
        "resolution": 256,
        "chosen_bits": b"\x00\xff",
        "rejected_bits": b"\x01",
        "chosen_source": "shapes",
        "rejected_source": "step-10",
        "chosen_seed": None,
        "chosen_version": None,
        "rejected_seed": 1,
        "rejected_version": 2,
        "sampling": '{"cfg": 3.0}',
        "chosen_reward": 1.0,
        "rejected_reward": None,
        "reference_chosen_logp": -10.0,
        "reference_rejected_logp": -12.5,
        "reference_chosen_by_scale": [-4.0, -6.0],
        "reference_rejected_by_scale": [-12.5, 0.0],
        "reference_version": 3,
    } | changes

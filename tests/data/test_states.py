"""Stored states: what is read is what was written, for this very image."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from vargpt_rl.data.states import padded_states, read_states, states_path, write_states

STAR = ("a star", "Here:", b"\x01")
CIRCLE = ("a circle", "Here:", b"\x01")


def test_states_are_padded_and_cut_to_a_length(tmp_path):
    states = {STAR: torch.randn(5, 4).to(torch.bfloat16), CIRCLE: torch.randn(3, 4).to(torch.bfloat16)}
    for drawn, states_TH in states.items():
        write_states(tmp_path / "states", drawn, states_TH)
    found = padded_states(tmp_path / "states", [STAR, CIRCLE], 4)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 4, 4)
    assert torch.equal(found[0], states[STAR][:4])
    assert torch.equal(found[1, :3], states[CIRCLE]) and not found[1, 3].any()


def test_missing_and_damaged_states_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"safetensors is missing: expected the states of an image of 'a star'"):
        read_states(tmp_path, STAR)
    write_states(tmp_path, STAR, torch.ones(2, 3))
    path = states_path(tmp_path, STAR)
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"safetensors is damaged: its states have hash \w+, expected None"):
        read_states(tmp_path, STAR)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=path.name):
        read_states(tmp_path, STAR)

"""Summaries of model directories."""

import pytest

from vargpt_rl.model.summary import describe_model, main, part_of


def test_a_model_is_described_by_part(checkpoint, model):
    told = "\n".join(describe_model(checkpoint))
    assert "family      vargpt" in told and "image_decoder" in told and "other" not in told
    count = sum(tensor.numel() for tensor in model.parameters())
    assert f"parameters  {count / 1e6:,.1f} million" in told


def test_the_embedded_model_says_how_it_draws(capsys):
    main(["tiny"])
    told = capsys.readouterr().out
    assert "draws with  resolution=128 cfg=1.0" in told
    assert "trained on  conversations of 4 turns" in told and "edits       trained on them" in told


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json"):
        main([str(tmp_path)])


def test_parts_are_those_of_names():
    assert part_of("lm_head.weight") == "language_model" and part_of("image_tokenizer.a") == "image_tokenizer"
    assert part_of("something.else") == "other"

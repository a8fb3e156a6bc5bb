"""The reference of keys."""

import pytest

from vargpt_rl.cli.reference import as_markdown, as_text, keys_of_a_run, matching


@pytest.fixture(scope="module")
def keys():
    return keys_of_a_run()


def test_keys_have_types_defaults_ranges_and_meaning(keys):
    found = {key.name: key for key in keys}
    beta = found["dpo.beta"]
    assert beta.kind == "float" and beta.expected and beta.doc
    assert found["resolutions"].default == "[128, 256]"
    assert found["name"].kind == "str or null"
    assert found["dpo."].is_group and found["dpo."].doc.startswith("DPO on the pairs")
    assert found["align.methods"].default == "[dpo, grpo]", "the default of configs/loop.yaml"


def test_most_keys_have_a_meaning(keys):
    without = [key.name for key in keys if not key.doc]
    assert len(without) < len(keys) / 10, without


def test_keys_are_found_by_prefix_then_by_word(keys):
    assert {key.name.split(".")[0] for key in matching(keys, "dpo")} == {"dpo"}
    assert "learner.ranks" in [key.name for key in matching(keys, "rank")]
    assert matching(keys, "nothing_like_it") == []


def test_pages_have_a_line_for_each_key(keys):
    text, page = as_text(keys), as_markdown(keys)
    for key in keys:
        if not key.is_group:
            assert f"\n{key.name}=" in f"\n{text}"
            assert f"| `{key.name}` |" in page
    tables = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(line.replace("\\|", "").count("|") == 5 for line in tables)

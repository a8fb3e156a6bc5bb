"""Sampling: replies, winners, and samples that survive an interruption."""

import json
from dataclasses import replace

from tests.helpers.driver import WorkersDouble, stage_context
from vargpt_rl.data.rollouts import Rollouts, read_rollouts, write_rollouts
from vargpt_rl.data.samples import Prompt, Sample, Winner
from vargpt_rl.driver.sampling import encode_winners, generate

PROMPTS = [Prompt(str(i), text, "Template.") for i, text in enumerate(["a star", "a cross", "a star", "a cross"])]


def test_template_replies_are_used_as_they_are(tmp_path):
    context = stage_context(tmp_path)
    assert [sample.prompt for sample in generate(context, PROMPTS, [0] * 4, "")] == PROMPTS


def test_own_replies_are_used_and_missing_ones_counted(tmp_path):
    context = stage_context(tmp_path, "rollout.reply=generate", "rollout.reply_tokens=9")
    drawn = [sample.prompt for sample in generate(context, PROMPTS, [0] * 4, "")]
    assert [prompt.reply for prompt in drawn] == ["Here: a star", "Template."] * 2
    assert [replace(prompt, reply="Template.") for prompt in drawn] == PROMPTS
    assert context.pool.calls[0] == ("reply", ["a star", "a cross"]), "each text once"
    line = json.loads((context.run.directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["stage"], line["generated"], line["template"]) == ("reply", 2, 2)


def test_the_text_engine_replies_instead_of_the_workers(tmp_path):
    context = stage_context(tmp_path, "rollout.reply=generate", text=WorkersDouble())
    generate(context, PROMPTS, [0] * 4, "")
    assert [name for name, _ in context.session.text.calls] == ["reply"]
    assert [name for name, _ in context.pool.calls] == ["generate_images"]


def test_unreadable_winners_are_quarantined_and_left_out(tmp_path):
    context = stage_context(tmp_path)
    context.inputs.source.winner_key = lambda prompt: {"0": "good", "1": "bad"}.get(prompt.id)
    assert list(encode_winners(context, PROMPTS)) == ["0"]
    assert context.inputs.quarantine.counts == {"broken": 1}


def test_rollouts_are_read_as_they_were_written(tmp_path):
    prompt = Prompt("1", "a star", "Here.")
    sample = Sample(prompt, b"\x01", 32, 7, {"cfg": 1.5, "tau": 0.5}, 3, "sft/final")
    rollouts = Rollouts([sample, replace(sample, seed=8)], {"1": Winner(prompt, b"\x02", 32, "key")})
    write_rollouts(tmp_path / "new/samples.parquet", rollouts)
    assert read_rollouts(tmp_path / "new/samples.parquet") == rollouts
    assert rollouts.prompts == [prompt] and [bits for _, bits in rollouts.images] == [b"\x01", b"\x01", b"\x02"]

"""The benchmark of conversations: what counts as right, and its table."""

from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from vargpt_rl.bench.conversations import ConversationBench, converse, drawn_alone, main, table, two_kinds
from vargpt_rl.data.shapes import Scene, is_held_out, parse, render, scene_for
from vargpt_rl.data.shapes_tasks import edit, question
from vargpt_rl.inference.conversation import DrawnImage
from vargpt_rl.model.prompt import REPLY

KINDS = ["drawing, turn 1", "question about it, turn 2", "change of it, turn 3", "another drawing, turn 4"]


class Perfect:
    """A partner who draws and answers rightly; ``fails`` are the turns that it gets wrong."""

    def __init__(self, fails: set[int]):
        self.fails = fails
        self.turns: list[str] = []
        self.answers: dict[str, str] = {}
        self.changes: dict[str, Scene] = {}

    def say(self, text: str):
        self.turns.append(text)
        if len(self.turns) in self.fails:
            return ["no"]
        if text.endswith("?"):
            return [self.answers[text]]
        scene = self.changes[text] if text in self.changes else scene_for(text, np.random.default_rng(0))
        return [REPLY, DrawnImage(render(scene, 128, "clean", np.random.default_rng(0)), None, 0)]


def held(fails: set[int], monkeypatch) -> tuple[dict, Perfect]:
    partner = Perfect(fails)

    def asked(scene, rng):
        text, answer = question(scene, rng)
        partner.answers[text] = answer
        return text, answer

    def changed(scene, rng):
        text, after = edit(scene, rng)
        partner.changes[text] = after
        return text, after

    monkeypatch.setattr("vargpt_rl.bench.conversations.question", asked)
    monkeypatch.setattr("vargpt_rl.bench.conversations.edit", changed)
    results = defaultdict(list)
    converse(partner, np.random.default_rng(3), results)
    return {kind: [right for _, right in replies] for kind, replies in results.items()}, partner


def test_a_perfect_partner_gets_all_four_turns_right(monkeypatch):
    results, partner = held(set(), monkeypatch)
    assert results == {kind: [True] for kind in KINDS}
    assert is_held_out(partner.turns[0]) and is_held_out(partner.turns[3])


@pytest.mark.parametrize("turn", [2, 3, 4])
def test_a_wrong_turn_counts_against_its_kind_alone(monkeypatch, turn):
    results, _ = held({turn}, monkeypatch)
    assert results == {kind: [number != turn] for number, kind in enumerate(KINDS, 1)}


def test_nothing_is_asked_about_a_wrong_drawing(monkeypatch):
    results, partner = held({1}, monkeypatch)
    assert results == {KINDS[0]: [False]} and len(partner.turns) == 1


def test_a_reply_with_two_images_draws_none():
    image = DrawnImage(Image.new("RGB", (8, 8)), None, 0)
    assert drawn_alone([image]) is image.image
    assert drawn_alone([image, "and", image]) is None and drawn_alone(["words"]) is None


def test_scenes_have_two_kinds_and_held_out_captions():
    rng = np.random.default_rng(0)
    for scene in (two_kinds(rng) for _ in range(30)):
        assert len(parse(scene.caption).wanted) == 2 and is_held_out(scene.caption)


def test_the_table_has_a_column_for_each_model():
    replies = {"a": {"x": [("1", True), ("2", True), ("3", False)]}, "b": {"x": [("1", False)], "y": [("1", True)]}}
    rows = table(replies).splitlines()
    assert rows[0] == "| reply | a | b |"
    assert rows[2] == "| x | 0.667 (0.21 to 0.94) of 3 | 0.000 (0.00 to 0.79) of 1 |"
    assert rows[3].startswith("| y | - | 1.000")


def test_the_command_measures_the_embedded_model(capsys):
    assert main(["count=2", "seed=1"]) == 0
    assert "question, two kinds shown" in capsys.readouterr().out
    assert main(["count=0"]) == 2 and main(["checkpoints=[nowhere]"]) == 2
    assert ConversationBench().resolution == 128

"""The terminal chat: commands, images in and out, and lines that cannot be answered."""

import io
import sys

import pytest
from PIL import Image

from vargpt_rl import chat
from vargpt_rl.chat import HELP, Chat, main
from vargpt_rl.inference.conversation import DrawnImage


class Listener:
    """A conversation that notes what it is told and answers with what it was given."""

    def __init__(self, *reply):
        self.reply, self.turns = list(reply), []

    def say(self, text, images, draw):
        self.turns.append((text, len(images), draw))
        return self.reply


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "my image.png"
    Image.new("RGB", (56, 56), "red").save(path)
    return path


def talk(folder, *lines, reply=("Yes.",)) -> list[Listener]:
    """The conversations that the lines make."""
    begun = []

    def begin():
        begun.append(Listener(*reply))
        return begun[-1]

    Chat(begin, folder).run(lines)
    return begun


def test_lines_are_turns_and_replies_are_printed(tmp_path, capsys):
    (conversation,) = talk(tmp_path, "How many?\n", "\n", "  And now? \n")
    assert conversation.turns == [("How many?", 0, False), ("And now?", 0, False)]
    assert capsys.readouterr().out == "Yes.\nYes.\n"


def test_images_and_draw_are_for_one_turn(tmp_path, image):
    (conversation,) = talk(
        tmp_path, f"/image {image}", f"/image {image}", "Which?", "More?", "/draw", "a star", "a circle", "/draw it"
    )
    assert conversation.turns == [
        ("Which?", 2, False),
        ("More?", 0, False),
        ("a star", 0, True),
        ("a circle", 0, False),
        ("it", 0, True),
    ]


@pytest.fixture
def drawing(tmp_path):
    """Runs lines with a model trained on so many turns, which always draws; the turns of each conversation."""

    def run(turns, *lines, edits=True) -> list[list[tuple[str, int, bool]]]:
        begun = []

        def begin():
            begun.append(Listener("Here:", DrawnImage(Image.new("RGB", (8, 8)), None, 0)))
            return begun[-1]

        Chat(begin, tmp_path, turns, edits).run(lines)
        return [each.turns for each in begun]

    return run


def test_single_turns_are_conversations_of_their_own_and_questions_see_the_last_image(drawing, image):
    lines = ["hm?", "/draw a star", "What colour is it?", "a circle", f"/image {image}", f"/image {image}", "Which?"]
    assert drawing(1, *lines) == [
        [("hm?", 0, False)],
        [("a star", 0, True)],
        [("What colour is it?", 1, False)],
        [("a circle", 0, False)],
        [("Which?", 2, False)],
    ]


def test_a_conversation_ends_after_as_many_turns_as_were_trained_on(drawing, capsys):
    lines = ["a star", "What is it?", "a circle", "Is it red?", "/reset", "Why?", "a cross", "More?"]
    assert drawing(2, *lines) == [
        [("a star", 0, False), ("What is it?", 0, False)],
        [("a circle", 0, False), ("Is it red?", 0, False)],
        [("Why?", 0, False), ("a cross", 0, False)],
        [("More?", 1, False)],
    ]
    assert capsys.readouterr().out.count(chat.NEW) == 2, "those that no one asked for"
    assert len(drawing(None, *["a star"] * 9)) == 1, "a checkpoint that does not say how many"


def test_a_question_shows_the_last_image_only_where_the_conversation_has_none(tmp_path, image):
    begun = []

    class Mute(Listener):
        def say(self, text, images, draw):
            super().say(text, images, draw)
            return ["Yes."] if text != "a star" else [DrawnImage(Image.new("RGB", (8, 8)), None, 0)]

    lines = ["a star", "so", "hello", "Is it red?", f"/image {image}", "Which?", "/edit make it blue"]
    Chat(lambda: begun.append(Mute()) or begun[-1], tmp_path, turns=2).run(lines)
    assert [each.turns for each in begun] == [
        [("a star", 0, False), ("so", 0, False)],
        [("hello", 0, False), ("Is it red?", 1, False)],
        [("Which?", 1, False), ("make it blue", 1, True)],
    ]


def test_a_turn_that_fails_counts_for_nothing(tmp_path):
    class Refuses(Listener):
        def say(self, text, images, draw):
            if text == "bad":
                raise ValueError("no")
            return super().say(text, images, draw)

    begun = []
    Chat(lambda: begun.append(Refuses("Yes.")) or begun[-1], tmp_path, turns=2).run(["one", "bad", "two", "three"])
    assert [[text for text, _, _ in each.turns] for each in begun] == [["one", "two"], ["three"]]


def test_edits_show_the_last_image_or_the_given_one(drawing, image, capsys):
    lines = ["/edit make it blue", "a star", "/edit make it blue", f"/image {image}", f"/image {image}", "/edit merge"]
    assert drawing(4, *lines, "/edit") == [[("a star", 0, False), ("make it blue", 1, True), ("merge", 2, True)]]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("/edit: there is no image yet") and said[-1] == "/edit: expected what to change"
    drawing(4, "a star", "/edit make it blue", edits=False)
    assert chat.NO_EDITS in capsys.readouterr().out


def test_reset_forgets_and_quit_ends(tmp_path, image):
    first, second = talk(tmp_path, "one", f"/image {image}", "/draw", "/reset", "two", "/quit", "three")
    assert (first.turns, second.turns) == ([("one", 0, False)], [("two", 0, False)])


def test_images_are_saved_under_free_names(tmp_path, capsys):
    (tmp_path / "00000.png").write_bytes(b"an earlier one")
    drawn = DrawnImage(Image.new("RGB", (8, 8), "blue"), None, 0)
    talk(tmp_path, "/draw a star", reply=("Here:", drawn, "and", drawn))
    paths = [tmp_path / f"0000{k}.png" for k in (1, 2)]
    assert capsys.readouterr().out.splitlines() == ["Here:", str(paths[0]), "and", str(paths[1])]
    assert all(Image.open(path).getpixel((4, 4)) == (0, 0, 255) for path in paths)
    assert (tmp_path / "00000.png").read_bytes() == b"an earlier one"
    talk(tmp_path, "hm", reply=())
    assert capsys.readouterr().out == "(an empty reply)\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/image {}/nowhere.png", "{}/nowhere.png: not a readable image: [Errno 2] No such file"),
        ("/image {}/broken.png", "{}/broken.png: not a readable image: image of no known kind"),
        ("/image ~nobody-of-that-name/a.png", "~nobody-of-that-name/a.png: not a readable image: "),
        ("/image", "/image: expected a file"),
        ("/paint a star", "/paint a star: no such command, /help lists them"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_the_chat_goes_on(tmp_path, capsys, line, said):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (conversation,) = talk(tmp_path, line.format(tmp_path), "How many?")
    fault, answer = capsys.readouterr().out.splitlines()
    assert fault.startswith(said.format(tmp_path))
    assert answer == "Yes."
    assert conversation.turns == [("How many?", 0, False)]


@pytest.fixture
def piped(checkpoint, tmp_path, monkeypatch):
    """Runs the command on the smallest model with lines piped in; its exit code."""

    def run(*lines, arguments=()):
        stdin = io.TextIOWrapper(io.BytesIO(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines)))
        monkeypatch.setattr(sys, "stdin", stdin)
        return main([f"checkpoint={checkpoint}", f"out={tmp_path}/out", "resolution=64", "device=cpu", *arguments])

    return run


def test_a_image_that_cannot_be_shown_is_let_go(tmp_path, piped, capsys):
    Image.new("RGB", (2, 900)).save(tmp_path / "needle.png")
    lines = [f"/image {tmp_path}/needle.png", "What?", "/draw a star"]
    assert piped(*lines) == 0
    said = capsys.readouterr().out.splitlines()
    assert "aspect ratio" in said[1]
    assert said[2:] == ["Here is the picture.", str(tmp_path / "out/00000.png")]


def test_a_piped_chat_ends_with_its_lines(piped, tmp_path, image, capsys):
    lines = ["/help", "/draw a star", b"\xff\xfe?", f"/image {image}", "/draw Recolour it."]
    assert piped(*lines, arguments=["max_tokens=3", "aspect=4:3"]) == 0
    said = capsys.readouterr().out
    assert HELP in said
    assert said.splitlines()[-2:] == ["Here is the picture.", str(max(tmp_path.glob("out/*.png")))]
    assert Image.open(tmp_path / "out/00000.png").size == (64, 48)
    assert piped() == 0, "no lines at all"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("temperature=-1", "temperature=-1.0: expected"),
        ("max_tokens=0", "max_tokens=0: expected"),
        ("resolution=10", "resolution=10: expected"),
        ("colour=red", "colour=red: there is no key colour"),
    ],
)
def test_wrong_settings_are_named_before_the_model_is_loaded(monkeypatch, capsys, argument, said):
    monkeypatch.setattr(chat, "load", lambda *_: pytest.fail("the model was loaded"))
    assert main([argument]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")

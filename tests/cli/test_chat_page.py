"""The page to chat on: turns go to all checkpoints, with images, seeds and sizes; bad turns are refused."""

import base64
import io

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from fastapi.testclient import TestClient
from PIL import Image

from vargpt_rl.chat import Talk
from vargpt_rl.cli.app import main
from vargpt_rl.cli.chat_page import Speaker, Turn, make_chat_app
from vargpt_rl.inference.conversation import DrawnImage


class Echo:
    """A conversation that draws what it is told to, in one colour."""

    def __init__(self, colour):
        self.colour, self.size, self.next_seed, self.seen = colour, (64, 64), 0, []

    def resize(self, size):
        if size[0] > 512:
            raise ValueError(f"{size[0]} px are too many")
        self.size = size

    def say(self, text, images, draw):
        self.seen.append((text, len(images)))
        drawn = DrawnImage(Image.new("RGB", self.size[::-1], self.colour), None, self.next_seed)
        return [f"{self.colour}: {text}", drawn] if draw else [f"{self.colour}: {text} {len(images)}"]


@pytest.fixture
def client():
    speakers = [Speaker(colour, Talk(lambda colour=colour: Echo(colour))) for colour in ("red", "blue")]
    app = make_chat_app(speakers, Turn(text="-", resolution=128), "secret")
    return TestClient(app, base_url="http://127.0.0.1")


def say(client, **turn):
    return client.post("/say?token=secret", json={"text": "hello", "resolution": 64, **turn})


def uri(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def opened(part):
    return Image.open(io.BytesIO(base64.b64decode(part["image"].partition(",")[2])))


def test_a_turn_goes_to_all_with_its_seed_and_size(client):
    first, second = say(client, draw=True, seed=7, resolution=128, aspect="4:3").json()["replies"]
    assert (first[0]["text"], second[0]["text"]) == ("red: hello", "blue: hello")
    assert first[1]["seed"] == second[1]["seed"] == 7
    assert opened(first[1]).size == opened(second[1]).size and opened(first[1]).width > opened(first[1]).height
    assert opened(second[1]).getpixel((0, 0)) == (0, 0, 255)


class Fragile(Echo):
    """A conversation that refuses images, and fails where it is told to."""

    def say(self, text, images, draw):
        if images:
            raise ValueError("the conversation is too long")
        if text == "fail":
            raise RuntimeError("out of memory\ndetails")
        return super().say(text, images, draw)


@pytest.fixture
def uneven():
    """A page with a checkpoint that takes every turn and a fragile one, trained on two turns and no edits."""
    speakers = [
        Speaker("red", Talk(lambda: Echo("red"))),
        Speaker("blue", Talk(lambda: Fragile("blue"), turns=2), edits=False),
    ]
    app = make_chat_app(speakers, Turn(text="-", resolution=128), "secret")
    return speakers, TestClient(app, base_url="http://127.0.0.1")


def test_a_checkpoint_that_refuses_leaves_the_other_its_reply(uneven):
    speakers, client = uneven
    refused = say(client, text="look", images=[uri(Image.new("RGB", (8, 8)))]).json()["replies"]
    assert refused[0] == [{"text": "red: look 1"}]
    assert refused[1] == [{"error": "This turn was not taken: the conversation is too long"}]
    assert [reply[0]["text"] for reply in say(client).json()["replies"]] == ["red: hello 0", "blue: hello 0"]
    assert [speaker.talk.taken for speaker in speakers] == [2, 1]


def test_a_checkpoint_that_fails_begins_a_new_conversation(uneven):
    speakers, client = uneven
    say(client)
    failed = say(client, text="fail").json()["replies"]
    assert failed[0] == [{"text": "red: fail 0"}]
    assert failed[1] == [{"error": "RuntimeError: out of memory. A new conversation begins."}]
    assert [reply[0]["text"] for reply in say(client).json()["replies"]] == ["red: hello 0", "blue: hello 0"]
    assert [speaker.talk.taken for speaker in speakers] == [3, 1]


def test_a_new_conversation_is_told_with_the_first_turn_that_it_takes(uneven):
    _, client = uneven
    for _ in range(2):
        say(client)
    say(client, images=[uri(Image.new("RGB", (8, 8)))])
    assert say(client).json()["replies"][1] == [{"text": "(a new conversation)"}, {"text": "blue: hello 0"}]
    assert say(client).json()["replies"][1] == [{"text": "blue: hello 0"}]


def test_what_was_said_is_shown_again_until_a_new_conversation(uneven):
    _, client = uneven
    assert client.get("/turns?token=secret").json() == []
    shown = uri(Image.new("RGB", (8, 8)))
    turns = [say(client).json(), say(client, images=[shown]).json()]
    assert client.get("/turns?token=secret").json() == turns and turns[1]["images"] == [shown]
    assert say(client, aspect="9:1").status_code == 422
    assert client.get("/turns?token=secret").json() == turns, "nobody has taken that turn"
    client.post("/reset?token=secret")
    assert client.get("/turns?token=secret").json() == []


def test_what_a_checkpoint_was_not_trained_on_is_told():
    speaker = Speaker("green", Talk(lambda: Echo("green"), turns=1), edits=False)
    client = TestClient(make_chat_app([speaker], Turn(text="-", resolution=128), "secret"), base_url="http://127.0.0.1")
    assert "was trained on conversations of 1 turn: each turn is" in client.get("/?token=secret").text
    (edited,) = say(client, draw=True, images=[uri(Image.new("RGB", (8, 8)))]).json()["replies"]
    assert edited[0] == {"text": "This checkpoint was not trained on edits: expect no image that makes sense."}
    assert say(client, draw=True).json()["replies"][0][0] == {"text": "green: hello"}


def test_an_image_that_is_too_large_is_refused_without_its_data(client):
    answer = say(client, images=["data:image/png;base64," + "A" * 20 * 2**20])
    assert answer.status_code == 422
    assert answer.json() == {"detail": "an image has 15.0 MiB, expected at most 12 MiB"}
    answer = client.post("/say?token=secret", json={"text": "x" * 9000, "resolution": 64})
    assert answer.json() == {"detail": "text: String should have at most 8000 characters"}


def test_images_are_shown_and_a_new_conversation_forgets(client):
    shown = say(client, images=[uri(Image.new("RGB", (8, 8)))] * 2).json()["replies"]
    assert shown[0] == [{"text": "red: hello 2"}]
    assert client.post("/reset?token=secret").json() == {}


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        ({"images": ["data:image/png;base64,AAAA"]}, "not a readable image"),
        ({"images": ["http://elsewhere/a.png"]}, "no data URI of an image"),
        ({"resolution": 1024}, "1024 px are too many"),
        ({"aspect": "9:1"}, "aspect=9:1"),
        ({"resolution": 100}, "resolution=100"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"text": ""}, "at least 1 character"),
        ({"images": ["a"] * 5}, "at most 4 items"),
    ],
)
def test_a_turn_that_cannot_be_taken_is_refused(client, turn, told):
    answer = say(client, **turn)
    assert answer.status_code == 422 and told in answer.text


def test_strangers_are_refused(client):
    assert client.get("/").status_code == 403 and client.post("/say?token=x", json={}).status_code == 403
    page = client.get("/?token=secret").text
    assert "<b>red</b>" in page and "<b>blue</b>" in page and "<option selected>128</option>" in page


def test_options_of_the_page_need_the_page(capsys):
    assert main(["chat", "--beside", "tiny"]) == 2
    assert "are for --page" in capsys.readouterr().err


def test_a_bad_setting_is_one_line(capsys):
    assert main(["chat", "--page", "resolution=10"]) == 2
    assert capsys.readouterr().err.startswith("error: resolution=10: expected")

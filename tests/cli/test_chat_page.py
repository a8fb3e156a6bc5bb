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
    assert "<b>red</b><b>blue</b>" in page and "<option selected>128</option>" in page


def test_options_of_the_page_need_the_page(capsys):
    assert main(["chat", "--beside", "tiny"]) == 2
    assert "are for --page" in capsys.readouterr().err


def test_a_bad_setting_is_one_line(capsys):
    assert main(["chat", "--page", "resolution=10"]) == 2
    assert capsys.readouterr().err.startswith("error: resolution=10: expected")

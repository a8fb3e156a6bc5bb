"""A reward behind HTTP: a real server in its own process, and its client."""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
from PIL import Image

from rewards.images import to_png
from rewards.remote import TOKEN, HttpReward

PLUGIN = """
import time

class Reward:
    def __init__(self, factor=1):
        self.factor = factor

    def __call__(self, images, prompts):
        if "slow" in prompts:
            time.sleep(5)
        if "raise" in prompts:
            raise ValueError("a bad mood")
        if "short" in prompts:
            return []
        special = {"none": None, "nan": float("nan")}
        return [special.get(p, self.factor * float(i.getpixel((0, 0))[0])) for i, p in zip(images, prompts)]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a running server that asks for a token."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "mine.py").write_text(PLUGIN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rewards.serve", "path=mine.py:Reward", 'options={"factor": 2}', f"port={port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | {TOKEN: "secret"}, stderr=log, stdout=log)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 200
    while True:
        try:
            assert json.load(urllib.request.urlopen(f"{address}/health")) == {"status": "ok"}
            break
        except URLError:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
    yield f"{address}/score"
    process.terminate()
    process.wait(10)
    assert "secret" not in (folder / "log").read_text()


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")


def reds(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (value, 0, 0)) for value in values]


def test_scores_are_returned_unchanged(server):
    assert HttpReward(server)(reds(10, 20, 30, 40), ["a", "none", "nan", "b"]) == [20.0, None, None, 80.0]
    assert HttpReward(server)([], []) == []


def test_images_arrive_to_the_last_bit(server):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0, 0, 0] = 201
    assert HttpReward(server)([Image.fromarray(pixels)], ["a"]) == [402.0]


@pytest.mark.parametrize(
    ("prompt", "said"), [("raise", "500: .*ValueError: a bad mood"), ("short", "500: .*0 values for 1 images")]
)
def test_errors_of_the_reward_reach_the_client(server, prompt, said):
    with pytest.raises(OSError, match=said):
        HttpReward(server)(reds(1), [prompt])


def test_unusable_servers_are_errors(server):
    with pytest.raises(TimeoutError):
        HttpReward(server, timeout_s=0.5)(reds(1), ["slow"])
    with pytest.raises(OSError, match="127.0.0.1:9: .*refused"):
        HttpReward("http://127.0.0.1:9")(reds(1), ["a"])
    with pytest.raises(OSError, match="answered 405"):
        HttpReward(server.replace("/score", "/health"))(reds(1), ["a"])
    with pytest.raises(ValueError, match="expected http"):
        HttpReward("file:///etc/passwd")


@pytest.mark.parametrize("given", ["", "wrong"])
def test_without_the_token_nothing_is_scored(server, monkeypatch, given):
    monkeypatch.setenv(TOKEN, given)
    with pytest.raises(OSError, match="answered 401"):
        HttpReward(server)(reds(1), ["a"])


ANSWERS = {
    "status": b"nonsense\r\n\r\n",
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]",
    "nested": b"HTTP/1.1 200 OK\r\n\r\n" + b'{"scores":' + b"[" * 100_000,
    "huge": b'HTTP/1.1 200 OK\r\n\r\n{"scores": [1' + b"0" * 400 + b"]}",
    "text": b'HTTP/1.1 200 OK\r\n\r\n{"scores": "1"}',
    "texts": b'HTTP/1.1 200 OK\r\n\r\n{"scores": ["1"]}',
    "object": b'HTTP/1.1 200 OK\r\n\r\n{"scores": {"1": 2}}',
    "boolean": b'HTTP/1.1 200 OK\r\n\r\n{"scores": [true]}',
    "two": b'HTTP/1.1 200 OK\r\n\r\n{"scores": [1, 2]}',
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    "nothing": b"",
}


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that answers each connection as it likes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(100_000)
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/score"


@pytest.mark.parametrize("name", ANSWERS)
def test_odd_answers_are_errors_of_two_kinds(name):
    with raw_server(lambda connection: connection.sendall(ANSWERS[name])) as url, pytest.raises((OSError, ValueError)):
        HttpReward(url, timeout_s=10)(reds(1), ["a"])


@pytest.mark.parametrize("where", ["status", "header", "body", "body of an error"])
def test_an_answer_that_drips_ends_at_the_deadline(where):
    before = {
        "status": b"",
        "header": b"HTTP/1.1 200 OK\r\nX: ",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        "body of an error": b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n",
    }[where]

    def drip(connection: socket.socket) -> None:
        connection.sendall(before)
        for _ in range(200):
            connection.sendall(b"1")
            time.sleep(0.1)

    began = time.monotonic()
    with raw_server(drip) as url, pytest.raises(OSError):
        HttpReward(url, timeout_s=1)(reds(1), ["a"])
    assert time.monotonic() - began < 8


def test_a_refused_token_is_not_repeated():
    refusal = b"HTTP/1.1 401 No\r\nContent-Length: 16\r\n\r\nbad token secret"
    with (
        raw_server(lambda connection: connection.sendall(refusal)) as url,
        pytest.raises(OSError, match="answered 401: bad token ...") as error,
    ):
        HttpReward(url)(reds(1), ["a"])
    assert "secret" not in str(error.value)


def test_the_loopback_is_not_asked_through_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert HttpReward(server)(reds(1), ["a"]) == [2.0]
    with pytest.raises(OSError):  # others are
        HttpReward("http://reward.invalid/score")(reds(1), ["a"])


@pytest.mark.parametrize(
    "url", ["ftp://a/b", "http://", "http://a:port/", "http://[::1/", "http://a b/", "http://a/\n"]
)
def test_addresses_that_are_none_are_refused_at_once(url):
    with pytest.raises(ValueError, match="expected http"):
        HttpReward(url)


def test_a_request_that_is_never_finished_leaves_the_server_to_others(server):
    host, port = server.removeprefix("http://").removesuffix("/score").split(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(50)]
    for each in sockets:
        each.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\n")
    began = time.monotonic()
    assert json.load(urllib.request.urlopen(server.replace("/score", "/health"))) == {"status": "ok"}
    assert HttpReward(server)(reds(1), ["a"]) == [2.0]
    assert time.monotonic() - began < 20
    for each in sockets:
        each.close()


def post(server: str, body: bytes) -> tuple[int, str]:
    request = urllib.request.Request(server, body, {"Authorization": "Bearer secret"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


PNG = base64.b64encode(to_png(reds(1)[0])).decode()
LARGE = base64.b64encode(to_png(Image.new("1", (4096, 4096)))).decode()
WIDE = base64.b64encode(to_png(Image.new("1", (20000, 1000)))).decode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"not json", "not JSON"),
        (b"[1]", "expected {"),
        ({"images": [PNG]}, "expected {"),
        ({"images": [1], "prompts": ["a"]}, "images: expected a list of strings"),
        ({"images": [PNG], "prompts": []}, "1 images, 0 prompts"),
        ({"images": [PNG] * 257, "prompts": ["a"] * 257}, "at most 256"),
        ({"images": [PNG, "%%"], "prompts": ["a", "b"]}, "images[1]: "),
        ({"images": [base64.b64encode(b"GIF89a").decode()], "prompts": ["a"]}, "images[0]: not a readable PNG"),
        ({"images": [PNG[: len(PNG) // 2 // 4 * 4]], "prompts": ["a"]}, "images[0]: not a readable PNG"),
        ({"images": [WIDE], "prompts": ["a"]}, "images[0]: 20000 x 1000 pixels"),
        ({"images": [LARGE] * 5, "prompts": ["a"] * 5}, "images[4]: 4096 x 4096 pixels"),
        (b"[" * 100_000, "too deeply nested"),
    ],
)
def test_bad_requests_say_what_is_wrong(server, body, said):
    code, text = post(server, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert code == 400 and said in json.loads(text)["detail"]


def test_too_large_a_request_is_cut_off(server):
    try:
        code, _ = post(server, b" " * (129 * 2**20))
        assert code == 413
    except URLError as error:  # the server hung up while we were still sending
        assert isinstance(error.reason, (BrokenPipeError, ConnectionResetError))
    assert HttpReward(server)(reds(1), ["a"]) == [2.0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["path=nowhere.py:Reward"], "there is no file"),
        (["path=rewards.technical:sharpness", "host=0.0.0.0"], f"set the environment variable {TOKEN}"),
        (["path=rewards.technical:sharpness", "options={"], "options={"),
        (["port=1"], "path is not given"),
    ],
)
def test_a_bad_command_is_one_line(monkeypatch, arguments, said):
    monkeypatch.delenv(TOKEN)
    done = subprocess.run([sys.executable, "-m", "rewards.serve", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr and len(done.stderr.splitlines()) == 1

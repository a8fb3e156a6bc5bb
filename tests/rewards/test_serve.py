"""The server of a reward behind HTTP: requests that are bad, slow or many."""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import psutil
import pytest
from PIL import Image

from rewards.images import to_png
from rewards.remote import TOKEN, HttpReward
from tests.helpers.reward_server import reds, serving

pytestmark = pytest.mark.usefixtures("token")


def connections(address: str, count: int, sent: bytes = b"") -> list[socket.socket]:
    """Open connections to a server and send the same on each."""
    parts = urlsplit(address)
    opened = [socket.create_connection((parts.hostname, parts.port), timeout=60) for _ in range(count)]
    for each in opened:
        each.sendall(sent)
    return opened


HALF_REQUESTS = {
    "nothing": b"",
    "header": b"POST /score HTTP/1.1\r\nHost: x\r\n",
    "body": b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 100\r\n\r\n{",
    "body without a token": b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
}


@pytest.mark.parametrize("kind", ["nothing", "header", "body without a token"])
def test_half_requests_leave_the_server_to_others(server, kind):
    opened = connections(server, 50, HALF_REQUESTS[kind])
    began = time.monotonic()
    assert HttpReward(server)(reds(1), ["a"]) == [2.0]
    assert time.monotonic() - began < 20
    for each in opened:
        each.close()


@pytest.mark.parametrize("kind", ["nothing", "header"])
def test_connections_without_a_request_are_closed(server, kind):
    opened = connections(server, 256, HALF_REQUESTS[kind])
    began = time.monotonic()
    with pytest.raises(OSError, match=r"503|reset|refused"):
        HttpReward(server)(reds(1), ["a"])
    for each in opened:
        with contextlib.suppress(ConnectionResetError):
            assert each.recv(100) == b""  # closed by the server
        each.close()
    assert time.monotonic() - began < 40
    assert HttpReward(server)(reds(1), ["a"]) == [2.0]


def test_a_further_request_on_a_connection_has_to_come_too(server):
    (opened,) = connections(server, 1, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    with opened:
        said = b""
        while not said.endswith(b"}"):
            said += opened.recv(1000)
        opened.sendall(b"GET /hea")  # which ends the wait for anything at all
        began = time.monotonic()
        assert opened.recv(1000) == b""
        assert time.monotonic() - began < 30


def test_clients_that_leave_are_no_error_of_the_server(server):
    for each in connections(server, 20, HALF_REQUESTS["body"]):
        each.close()
    assert HttpReward(server)(reds(1), ["a"]) == [2.0]


def test_64_clients_are_all_answered(server):
    def ask(number: int) -> list[float | None]:
        return HttpReward(server, timeout_s=120)(reds(number, 1), ["a", "a"])

    with ThreadPoolExecutor(64) as clients:
        assert list(clients.map(ask, range(64))) == [[2.0 * number, 2.0] for number in range(64)]


def test_large_requests_of_many_clients_stay_within_the_memory(tmp_path):
    """16 clients send 96 MiB at once, each of four images with 16 million pixels."""
    noise = base64.b64encode(os.urandom(24 * 2**20)).decode()  # no PNG: refused when its turn has come
    body = json.dumps({"images": [LARGE] * 3 + [noise], "prompts": ["a"] * 4}).encode()
    body += b" " * (96 * 2**20 - len(body))
    with serving(tmp_path) as (address, process), ThreadPoolExecutor(16) as clients:
        before = psutil.Process(process.pid).memory_info().rss
        answers = [clients.submit(post, address, body, 200) for _ in range(16)]
        most = before
        while not all(answer.done() for answer in answers):
            most = max(most, psutil.Process(process.pid).memory_info().rss)
            time.sleep(0.05)
        assert {answer.result()[0] for answer in answers} == {400}
    assert most - before < 1400 * 2**20, f"{(most - before) / 2**20:.0f} MiB"


def test_a_reward_that_hangs_ends_the_server(tmp_path):
    with serving(tmp_path, "timeout_s=1") as (address, process):
        with pytest.raises(OSError):
            HttpReward(address, timeout_s=60)(reds(1), ["hang"])
        assert process.wait(30) == 1
    assert "the reward did not return within 1 s" in (tmp_path / "log").read_text()


def test_a_request_that_waits_too_long_for_others_is_refused(tmp_path):
    with serving(tmp_path, "timeout_s=7") as (address, _), ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(post, address, BODIES["slow"], 60) for _ in range(4)]
        codes = sorted(each.result()[0] for each in asked)
    assert codes == [200, 200, 503, 503]  # a turn takes five seconds


def test_sigterm_ends_a_server_whose_reward_hangs(tmp_path):
    with serving(tmp_path) as (address, process):
        (opened,) = connections(address, 1)
        body = BODIES["hang"]
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: {len(body)}\r\n\r\n"
        opened.sendall(head.encode() + body)
        time.sleep(1)
        process.terminate()
        process.wait(14)
        opened.close()


def post(server: str, body: bytes, timeout_s: float = 30) -> tuple[int, str]:
    request = urllib.request.Request(server, body, {"Authorization": "Bearer secret"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


PNG = base64.b64encode(to_png(reds(1)[0])).decode()
LARGE = base64.b64encode(to_png(Image.new("1", (4096, 4096)))).decode()
BODIES = {name: json.dumps({"images": [PNG], "prompts": [name]}).encode() for name in ("slow", "hang")}
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
        (b"[" + b"[]," * 2**21 + b"[]]", "more than 1048576 commas"),
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

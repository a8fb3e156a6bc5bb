"""The way of a language model, against a server process that speaks the protocol and checks every request."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("openai")

from vargpt_rl.data.instruct.__main__ import main
from vargpt_rl.data.instruct.llm import in_order, request

KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def server():
    script = Path(__file__).parents[2] / "helpers" / "chat_server.py"
    with subprocess.Popen([sys.executable, str(script), KEY], stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def captions_file(path: Path, captions: list[str]) -> Path:
    rows = [
        {"id": f"c{number}", "caption": caption, "file": f"{number}.png"} for number, caption in enumerate(captions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(address: str, captions: Path, out: Path, *more: str) -> list[str]:
    where = [f"captions={captions}", f"out={out}", "method=llm", f"endpoint={address}/v1", "model=small-model"]
    return [*where, "api_key_env=TEST_KEY", *more]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(address: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{address}/asked") as answer:
        return json.load(answer)


def test_good_answers_become_records(server, tmp_path):
    captions = captions_file(tmp_path / "t.jsonl", ["a red fox", "two blue birds", "a fenced garden fenced in"])
    assert main(arguments(server, captions, tmp_path / "out")) == 0
    records = read(tmp_path / "out")
    assert [record["id"] for record in records] == ["c0", "c1", "c2"]
    _, _, seed = request("a red fox", "c0", 0)
    assert records[0] == {
        "id": "c0",
        "messages": [
            {"role": "user", "content": f"Please show me a red fox, version {seed}."},
            {"role": "assistant", "content": "Here is the picture of a red fox. <image_gen>"},
        ],
        "images": ["0.png"],
        "task": "generation",
        "method": "llm",
        "model": "small-model",
    }
    assert records[2]["messages"][0]["content"] == "Please show me a fenced garden fenced in again."


def test_failures_are_counted_by_reason_and_the_key_is_nowhere(server, tmp_path, capfd):
    moods = {
        "malformed": "reply is not JSON",
        "halved": "reply without prompt or answer",
        "refused": "refusal",
        "forgotten": "caption content lost",
        "silent": "empty reply",
        "garbled": "answer is not a chat completion",
        "hollow": "answer is not a chat completion",
        "crowded": "status 429",
        "broken": "status 500",
        "leaking": "status 400",
        "cut": "no connection",
    }
    captions = captions_file(tmp_path / "t.jsonl", [f"a {mood} fox" for mood in moods])
    code = main(arguments(server, captions, tmp_path / "out", "retries=1", "concurrency=12"))
    assert code == 1
    rejects = read(tmp_path / "out.rejects.jsonl")
    assert [(reject["record"].split()[0], reject["reason"]) for reject in rejects] == [
        (f"c{number}", reason) for number, reason in enumerate(moods.values())
    ]
    said = capfd.readouterr()
    assert "2  rejected: answer is not a chat completion" in said.out and "11 of 11 records rejected" in said.out
    assert "Bearer ***" in next(reject["record"] for reject in rejects if reject["reason"] == "status 400")
    assert KEY not in said.out + said.err + "".join(file.read_text() for file in tmp_path.iterdir())
    times = asked(server)
    assert all(times[f"a {mood} fox"] == 2 for mood in ("crowded", "broken", "cut"))
    assert all(times[f"a {mood} fox"] == 1 for mood in ("malformed", "refused", "leaking"))


def test_a_busy_server_is_asked_again(server, tmp_path):
    captions = captions_file(tmp_path / "t.jsonl", ["a busy street"])
    assert main(arguments(server, captions, tmp_path / "out", "retries=2")) == 0
    assert len(read(tmp_path / "out")) == 1 and asked(server)["a busy street"] == 3


def test_a_server_that_hangs_is_asked_again(server, tmp_path):
    captions = captions_file(tmp_path / "t.jsonl", ["a slow turtle"])
    assert main(arguments(server, captions, tmp_path / "out", "retries=20", "timeout_s=0.5")) == 0
    assert len(read(tmp_path / "out")) == 1 and asked(server)["a slow turtle"] >= 2


def test_a_server_that_always_hangs_is_a_reason(server, tmp_path):
    captions = captions_file(tmp_path / "t.jsonl", ["a hanging bridge"])
    began = time.monotonic()
    assert main(arguments(server, captions, tmp_path / "out", "retries=1", "timeout_s=0.5")) == 1
    assert time.monotonic() - began < 50  # much more than it takes, less than any default
    assert [reject["reason"] for reject in read(tmp_path / "out.rejects.jsonl")] == ["timed out"]


def test_rejects_are_tried_again_by_the_same_command(server, tmp_path):
    captions = captions_file(tmp_path / "t.jsonl", ["a red fox", "a busy harbour"])
    command = arguments(server, captions, tmp_path / "out", "retries=0")
    assert main(command) == 0 and [record["id"] for record in read(tmp_path / "out")] == ["c0"]
    assert main(command) == 0 and main(command) == 0  # asked a third time, the server has time
    assert [record["id"] for record in read(tmp_path / "out")] == ["c0", "c1"]
    assert not (tmp_path / "out.rejects.jsonl").exists()


def test_a_killed_run_goes_on_to_the_same_file(server, tmp_path):
    """The caption at 20 hangs when it is first asked for, so that the kill comes after what is before it."""
    kinds = {20: "slow "} | dict.fromkeys(range(3, 60, 7), "refused ")
    names = [f"{number} {kinds.get(number, '')}killers" for number in range(60)]
    written = [f"c{number}" for number in range(60) if kinds.get(number) != "refused "]
    captions, out, whole = captions_file(tmp_path / "t.jsonl", names), tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "vargpt_rl.data.instruct", *arguments(server, captions, out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    before = written[: written.index("c20")]
    deadline = time.monotonic() + 200
    while not (out.exists() and out.read_bytes().count(b"\n") == len(before)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert [record["id"] for record in read(out)] == before
    with out.open("ab") as file:
        file.write(b'{"id": "c20", "messages": [{"role": "user"}')  # as if killed within a line
    asked_before = asked(server)
    assert main(arguments(server, captions, out)) == 0
    again = {name for name, times in asked(server).items() if times > asked_before.get(name, 0)}
    assert again == {name for number, name in enumerate(names) if f"c{number}" not in before}
    assert main(arguments(server, captions, whole, "concurrency=8")) == 0
    assert [record["id"] for record in read(whole)] == written
    assert out.read_bytes() == whole.read_bytes()
    assert Path(f"{out}.rejects.jsonl").read_bytes() == Path(f"{whole}.rejects.jsonl").read_bytes()


def test_a_key_that_is_refused_ends_the_run(server, tmp_path, monkeypatch, capfd):
    captions = captions_file(tmp_path / "t.jsonl", ["a red fox"] * 3)
    monkeypatch.setenv("TEST_KEY", "sk-wrong-and-secret")
    assert main(arguments(server, captions, tmp_path / "out")) == 2
    message = capfd.readouterr().err
    assert "answers 401" in message and "api_key_env=TEST_KEY" in message and message.count("\n") == 1
    assert "secret" not in message


def test_a_key_that_no_header_can_have_is_not_told(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TEST_KEY", "sk-secret\nsk-second")
    assert main(arguments(server, captions_file(tmp_path / "t.jsonl", ["a fox"]), tmp_path / "out")) == 2
    message = capfd.readouterr().err
    assert "api_key_env=TEST_KEY" in message and "secret" not in message


def test_another_key_of_the_environment_is_not_sent(server, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("TEST_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-someone-else")
    assert main(arguments(server, captions_file(tmp_path / "t.jsonl", ["a fox"]), tmp_path / "out")) == 2
    assert "Bearer none is no key" in capfd.readouterr().err


def test_a_wrong_address_ends_the_run(server, tmp_path, capfd):
    captions = captions_file(tmp_path / "t.jsonl", ["a red fox"])
    assert main(arguments(f"{server}/elsewhere", captions, tmp_path / "out")) == 2
    message = capfd.readouterr().err
    assert "answers 404" in message and "model=small-model" in message and message.count("\n") == 1


def test_a_wrong_model_is_told_by_the_servers_check(server, tmp_path):
    """The server's own checks do bite: a request of another shape is not answered."""
    captions = captions_file(tmp_path / "t.jsonl", ["a red fox"])
    assert main([*arguments(server, captions, tmp_path / "out")[:-2], "model=other", "api_key_env=TEST_KEY"]) == 1
    (reject,) = read(tmp_path / "out.rejects.jsonl")
    assert reject["reason"] == "status 422" and "model other" in reject["record"]


def test_requests_follow_from_seed_and_id():
    assert request("a fox", "1", 0) == request("a fox", "1", 0)
    assert request("a cat", "1", 0)[0][:-1] == request("a fox", "1", 0)[0][:-1]
    drawn = [request("a fox", str(number), 0) for number in range(50)]
    assert len({seeds for _, seeds, _ in drawn}) > 40 and len({seed for *_, seed in drawn}) == 50
    assert len({str(messages[1:-1]) for messages, *_ in drawn}) > 40
    assert request("a fox", "1", 0) != request("a fox", "1", 1)


def test_in_order_keeps_the_order_and_takes_no_more_than_it_needs():
    taken, together = [], threading.Barrier(3, timeout=60)

    def items():
        for number in range(99):
            taken.append(number)
            yield number

    def work(number):
        together.wait()  # for three at a time
        return number

    results = in_order(work, items(), 3)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) < 30
    assert list(results) == list(range(10, 99))


def test_the_extra_is_named_where_it_is_missing(server, tmp_path, capfd):
    """In a process of its own, in which the client cannot be imported."""
    captions = captions_file(tmp_path / "t.jsonl", ["a red fox"])
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from vargpt_rl.data.instruct.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments(server, captions, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "pip install 'vargpt-rl[instruct]'" in done.stderr

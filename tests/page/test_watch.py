"""The live page: it follows a run, survives torn lines, and answers nobody else."""

import json
import socket
import subprocess
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from fastapi.testclient import TestClient

from tests.helpers.browser import wait_until
from tests.helpers.run_folder import CONFIG, make_run
from vargpt_rl.page.plan import expected_steps
from vargpt_rl.page.serving import serve
from vargpt_rl.page.watch import main, make_app, version_of

TOTAL = len(expected_steps(CONFIG))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", done=9)


def advance(folder, done):
    """Record more steps, as the loop does."""
    state = json.loads((folder / "state.json").read_text())
    state["steps"] = {step: {} for step in expected_steps(CONFIG)[:done]}
    (folder / "state.json").write_text(json.dumps(state))


def test_only_the_printed_address_is_answered(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    assert client.get("/?token=secret").status_code == 200
    assert client.get("/").status_code == client.get("/version?token=wrong").status_code == 403
    elsewhere = TestClient(make_app(run, "secret"), base_url="http://attacker.example")
    assert elsewhere.get("/?token=secret").status_code == 400


def test_a_torn_line_changes_the_version_and_breaks_nothing(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    before = client.get("/version?token=secret").json()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.0, "stage": "dpo", "st')
    assert client.get("/version?token=secret").json() != before
    assert f"9 of {TOTAL} steps" in client.get("/?token=secret").text


def test_a_process_that_dies_changes_the_version_and_the_page(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    holder = subprocess.Popen(["sleep", "60"])
    (run / ".lock.json").write_text(json.dumps({"host": socket.gethostname(), "pid": holder.pid}))
    before = client.get("/version?token=secret").json()
    assert ">running<" in client.get("/?token=secret").text
    holder.kill()
    holder.wait()
    assert client.get("/version?token=secret").json() != before
    assert ">stopped<" in client.get("/?token=secret").text


def test_a_later_version_leaves_the_library_out(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    whole, part = client.get("/?token=secret").text, client.get("/?token=secret&part=1").text
    assert len(part) < len(whole) - 1_000_000 and 'data-digest="' in part
    assert version_of(run) == version_of(run)


def test_a_run_that_is_renamed_is_named(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    run.rename(run.with_name("elsewhere"))
    for path in ("/", "/version"):
        answer = client.get(f"{path}?token=secret")
        assert answer.status_code == 503 and answer.json()["detail"].startswith(f"{run}: the run is no longer here")


def test_no_run_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2 and main([]) == 2
    assert "expected a run directory" in capsys.readouterr().err


def test_the_page_follows_within_five_seconds(run, chromium):
    addresses = []
    thread = threading.Thread(target=lambda: serve(make_app(run, "secret"), "secret", 0, addresses.append), daemon=True)
    thread.start()
    while not addresses:
        time.sleep(0.05)
    page = chromium.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(addresses[0])
    steps = page.locator(".steps").first
    assert steps.inner_text() == f"9 of {TOTAL} steps"
    page.wait_for_timeout(2000)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.0, "st')  # a line that is being written
    advance(run, 12)
    wait_until(page, f"document.querySelector('.steps').innerText === '12 of {TOTAL} steps'", 5.0)
    page.locator(".canvas").first.scroll_into_view_if_needed()
    wait_until(page, "document.querySelector('.canvas').dataset.drawn === 'yes'")
    run.rename(run.with_name("elsewhere"))
    wait_until(page, "document.getElementById('live').innerText.includes('the run is no longer here')", 5.0)
    run.with_name("elsewhere").rename(run)
    wait_until(page, "document.getElementById('live').innerText === 'live'", 5.0)
    assert errors == []
    page.close()

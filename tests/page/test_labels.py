"""Labels: sides, files, undo, agreement, export; and the page on which people give them."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from fastapi.testclient import TestClient

from tests.helpers.browser import assert_accessible, wait_until
from tests.helpers.run_folder import make_run
from vargpt_rl.page.contents import read_run
from vargpt_rl.page.label import make_app
from vargpt_rl.page.labels import (
    Label,
    add_label,
    all_labels,
    export,
    is_flipped,
    krippendorff_alpha,
    labelled_pairs,
    labels_file,
    majority,
    margins_by_reward,
    read_labels,
    reward_agreement,
    self_agreement,
    summarise_labels,
    tasks_for,
    undo,
    votes,
    winner_of,
)
from vargpt_rl.page.serving import serve
from vargpt_rl.storage.images import margins_path

SERVER = (
    "import sys; from pathlib import Path; from vargpt_rl.page.label import label_pairs; label_pairs(Path(sys.argv[1]))"
)


@pytest.fixture
def run(tmp_path):
    """A run whose first iteration has twelve pairs with images."""
    return make_run(tmp_path / "run", pairs=12, done=14)


def label(pair_id, winner, rater="ada", again=False):
    return Label(pair_id=pair_id, stage="iter-00", winner=winner, rater=rater, seconds=1.0, flipped=False, again=again)


@given(strategies.text(min_size=1), strategies.text(min_size=1))
def test_the_winner_does_not_depend_on_the_side(rater, pair_id):
    flipped = is_flipped(rater, pair_id)
    better = "right" if flipped else "left"
    assert winner_of(better, flipped) == "chosen" == winner_of("left" if better == "right" else "right", not flipped)
    assert winner_of("alike", flipped) == "alike" and winner_of(None, flipped) is None


def test_sides_are_even_and_differ_between_raters():
    names = [f"pair{i}" for i in range(400)]
    flips = {rater: [is_flipped(rater, name) for name in names] for rater in ("ada", "bob")}
    assert 150 < sum(flips["ada"]) < 250 and flips["ada"] != flips["bob"]
    with pytest.raises(ValueError, match="expected left, right"):
        winner_of("up", False)


def test_every_tenth_pair_is_shown_again_turned_round(run):
    tasks = tasks_for(labelled_pairs(read_run(run)), "ada")
    assert len(tasks) == 13 and [task.again for task in tasks].index(True) == 10
    again = tasks[10]
    first = next(task for task in tasks if task.row == again.row)
    assert first.flipped != again.flipped


def test_a_label_survives_a_torn_line(run):
    add_label(run, label("pair0", "chosen"))
    with labels_file(run, "ada").open("a") as file:
        file.write('{"pair_id": "pa')
    add_label(run, label("pair1", "alike"))
    assert [each.pair_id for each in read_labels(labels_file(run, "ada"))] == ["pair0", "pair1"]


def test_undo_takes_back_one_label_and_changes_no_line(run):
    for name in ("pair0", "pair1"):
        add_label(run, label(name, "chosen"))
    before = labels_file(run, "ada").read_text()
    undo(run, "ada")
    assert labels_file(run, "ada").read_text().startswith(before)
    assert [each.pair_id for each in read_labels(labels_file(run, "ada"))] == ["pair0"]
    undo(run, "ada")
    undo(run, "ada")
    assert read_labels(labels_file(run, "ada")) == []


@pytest.mark.parametrize("rater", ["", "../x", "a/b", "é", "x" * 41])
def test_a_name_that_is_no_file_name_is_refused(run, rater):
    with pytest.raises(ValueError, match="rater"):
        labels_file(run, rater)


def test_alpha_is_that_of_the_literature():
    """Krippendorff (2011), example B: two observers, nominal data without missing ones."""
    known = [dict(enumerate("aabbdcccedda")), dict(enumerate("babbbccceddd"))]
    assert krippendorff_alpha(known) == pytest.approx(0.692, abs=0.001)
    same = [{"a": "chosen", "b": "alike"}] * 2
    assert krippendorff_alpha(same) == 1.0
    assert krippendorff_alpha([{"a": "chosen"}]) is None


def test_majority_needs_more_votes_than_any_other():
    raters = [{"a": "chosen", "b": "chosen"}, {"a": "chosen", "b": "rejected"}, {"a": "alike"}]
    assert majority(raters) == {"a": "chosen"}


def test_agreement_of_a_rater_and_of_the_reward(run):
    labels = [label("pair0", "chosen"), label("pair1", "rejected"), label("pair0", "rejected", again=True)]
    assert self_agreement(labels) == (0, 1) and votes(labels) == {"pair0": "chosen", "pair1": "rejected"}
    margins = margins_by_reward(read_run(run), labelled_pairs(read_run(run)))["reward"]
    assert reward_agreement(margins, votes(labels)) == (1.5, 2), "pair0 is ahead by 1, pair1 is a tie"


def test_each_automatic_reward_is_reported(run):
    add_label(run, label("pair0", "chosen"))
    add_label(run, label("pair1", "rejected"))
    stored = {"judge": {"pair0": -1.0, "pair1": -2.0}, "sharp": {"pair0": 1.0, "pair1": None}}
    margins_path(run / "preferences/iter-00.parquet").write_text(json.dumps(stored))
    assert [line.partition(":")[0] for line in summarise_labels(read_run(run))[-3:]] == [
        "the reward prefers the image that people prefer in 1.5 of 2 pairs",
        "the judge prefers the image that people prefer in 1 of 2 pairs",
        "the reward's term sharp prefers the image that people prefer in 1 of 1 pairs",
    ]


def test_labels_are_exported_as_pick_a_pic(run, tmp_path):
    for name, winner in (("pair0", "chosen"), ("pair1", "rejected"), ("pair2", "alike"), ("pair3", "bad")):
        add_label(run, label(name, winner))
    assert export(read_run(run), tmp_path / "out.parquet") == 3
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["label_0"] for row in rows] == [1.0, 0.0, 0.5] and rows[0]["jpg_0"][8:12] == b"WEBP"
    assert "ada: 4 of 12 pairs: 1 chosen, 1 rejected, 1 alike, 1 bad" in summarise_labels(read_run(run))[0]


def test_nothing_to_export_is_an_error(run, tmp_path):
    with pytest.raises(ValueError, match="label some first"):
        export(read_run(run), tmp_path / "out.parquet")


def test_origins_are_hidden_and_strangers_refused(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    shown = client.get("/next?token=secret&rater=ada").json()
    assert set(shown) == {"position", "total", "finished", "prompt", "left", "right"}
    assert client.get("/next?rater=ada").status_code == 403
    assert client.post("/label?token=wrong", json={}).status_code == 403
    assert client.get("/next?token=secret&rater=../x").status_code == 422


def test_an_answer_to_another_pair_is_not_taken(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    answer = {"rater": "ada", "position": 0, "side": "left", "seconds": 1.0}
    assert client.post("/label?token=secret", json=answer).json()["position"] == 1
    assert client.post("/label?token=secret", json=answer).json()["position"] == 1, "a second tab"
    assert client.post("/label?token=secret", json=answer | {"position": 1, "side": "up"}).status_code == 422
    assert len(read_labels(labels_file(run, "ada"))) == 1


def label_all(client, rater="ada"):
    """Give an answer to every pair that is left; return what is shown then."""
    while not (shown := client.get(f"/next?token=secret&rater={rater}").json())["finished"]:
        answer = {"rater": rater, "position": shown["position"], "side": "alike", "seconds": 1}
        assert client.post("/label?token=secret", json=answer).status_code == 200
    return shown


def test_pairs_of_a_later_iteration_appear(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    assert label_all(client)["total"] == 13
    make_run(run, pairs=12)
    shown = client.get("/next?token=secret&rater=ada").json()
    assert (shown["position"], shown["total"], shown["finished"]) == (13, 26, False)


def test_an_answer_that_cannot_be_saved_is_told_in_one_line(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    (run / "labels").rmdir()
    (run / "labels").touch()  # as root, no folder is read-only
    answer = client.post("/label?token=secret", json={"rater": "ada", "position": 0, "side": "left", "seconds": 1})
    assert answer.status_code == 503 and str(run / "labels") in answer.json()["detail"]
    with pytest.raises(OSError, match="labels"):
        make_app(run, "secret")


@pytest.mark.parametrize("damage", [b'{"x": 1}', b"[]", b'{"pair', b"\xff", b'{"pair_id": "a", "winner": []}'])
def test_a_damaged_file_of_another_rater_is_left_out_and_named(run, damage):
    add_label(run, label("pair0", "chosen", rater="bob"))
    path = labels_file(run, "bob")
    path.write_bytes(path.read_bytes() + damage + b"\n")
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    told = label_all(client)["summary"]
    assert told[0].startswith(f"left out: {path} is damaged in line 2: ") and told[1].startswith("ada: 12 of 12 pairs")
    own = client.get("/next?token=secret&rater=bob")
    assert own.status_code == 503 and own.json()["detail"] == told[0].removeprefix("left out: ")


def test_a_run_without_images_of_pairs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is nothing to label"):
        make_app(make_run(tmp_path / "run", done=3), "secret")


def start(run):
    """Start the server in a process; return it and its address."""
    server = subprocess.Popen([sys.executable, "-u", "-c", SERVER, str(run)], stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().split()[-1]


def test_twelve_pairs_are_labelled_by_keys_across_reload_and_kill(run, chromium):
    keys = itertools.cycle("1234")
    context = chromium.new_context()
    page = context.new_page()
    server, address = start(run)

    def wait_for(count):
        wait_until(page, f"document.getElementById('count').textContent.includes(': {count} of 13')")

    def press(key, count):
        page.keyboard.press(key)
        wait_for(count)

    try:
        page.goto(address)
        assert_accessible(page)
        page.get_by_label("Your name").fill("ada")
        page.keyboard.press("Enter")
        wait_for(0)
        assert_accessible(page)
        for count in range(1, 7):
            press(next(keys), count)
        page.reload()
        wait_for(6)
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        press("u", 5)
        press("s", 6)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        page.keyboard.press("1")
        wait_until(page, "document.getElementById('trouble').textContent.includes('Not saved')")
        server, address = start(run)
        page.goto(address)  # another port, so another origin: the name is asked again
        page.get_by_label("Your name").fill("ada")
        page.keyboard.press("Enter")
        wait_for(6)
        for count in range(7, 14):
            press(next(keys), count)
        wait_until(page, "!document.getElementById('done').hidden")
        assert "ada: 11 of 12 pairs" in page.locator("#summary").inner_text()
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        make_run(run, pairs=12)
        wait_until(page, "document.getElementById('count').textContent.includes(': 13 of 26')")
    finally:
        server.kill()
        server.wait()
        context.close()
    labels = all_labels(run)["ada"]
    assert len(labels) == 13 and {each.winner for each in labels} == {"chosen", "rejected", "alike", "bad", None}
    assert all(json.loads(line) for line in labels_file(run, "ada").read_text().splitlines())


def test_a_rater_reads_what_was_saved_and_what_was_not(run, chromium, monkeypatch):
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device", "labels/ada.jsonl"))
    damaged = Mock(side_effect=ValueError("iter-00.parquet: damaged"))
    addresses = []
    app = make_app(run, "secret")
    threading.Thread(target=lambda: serve(app, "secret", 0, addresses.append), daemon=True).start()
    page = chromium.new_page()
    while not addresses:
        page.wait_for_timeout(50)
    page.goto(addresses[0])
    page.get_by_label("Your name").fill("ada")
    page.keyboard.press("Enter")
    wait_until(page, "document.getElementById('count').textContent.includes(': 0 of 13')")
    for name, double, told in (
        ("add_label", full, "Not saved: [Errno 28] No space left on device: 'labels/ada.jsonl'. What"),
        ("show_task", damaged, "Saved, but the next pair cannot be shown: iter-00.parquet: damaged. What"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"vargpt_rl.page.label.{name}", double)
            page.keyboard.press("1")
            wait_until(page, f"document.getElementById('trouble').textContent.startsWith({json.dumps(told)})")
    assert len(all_labels(run)["ada"]) == 1
    page.keyboard.press("1")
    wait_until(page, "document.getElementById('count').textContent.includes(': 1 of 13')")
    assert len(all_labels(run)["ada"]) == 1, "the pair that is shown again has an answer"
    page.close()


def test_two_raters_label_at_the_same_time(run):
    client = TestClient(make_app(run, "secret"), base_url="http://127.0.0.1")
    for position in range(3):
        for rater in ("ada", "bob"):
            client.post(
                "/label?token=secret", json={"rater": rater, "position": position, "side": "alike", "seconds": 1}
            )
    assert {name: len(labels) for name, labels in all_labels(run).items()} == {"ada": 3, "bob": 3}

"""A run that asks people, from its samples to DPO on their labels; then another run on the exported labels alone.

Without a cluster (see ``tests.helpers.one_process``), with a real browser.
"""

import json
import os

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from tests.driver.test_faults import SMALL
from tests.helpers.browser import wait_until
from tests.helpers.forks import run_loop
from tests.helpers.tiny import tiny_checkpoint
from tests.page.test_labels import start
from vargpt_rl.data.preferences import read_table
from vargpt_rl.driver.report import show
from vargpt_rl.page.contents import read_run
from vargpt_rl.page.labels import all_labels, export
from vargpt_rl.page.render import render

REWARD = "reward.path=rewards.shapes:shapes_reward"
ASKING = [
    "preference.builder=rewards.preferences:human",
    "preference.samples=2",
    "preference.count=12",
    "dpo.control=false",
]


def go(folder, name, *settings):
    """Start a run; return its exit code."""
    arguments = [
        f"runs={folder}",
        f"checkpoint={folder}/model",
        f"name={name}",
        *SMALL.split(),
        REWARD,
        "evaluation.diversity=0",
        *settings,
    ]
    log = folder / f"{name}.log"
    ((_, code, *_),) = run_loop(arguments, "end", faults=folder / "faults", log=log)
    assert code in (0, os.EX_TEMPFAIL), log.read_text()[-3000:]
    return code


def label_by_keys(run, chromium, keys):
    """Label a run's pairs on its page, with one key for each pair that is shown."""
    server, address = start(run)
    context = chromium.new_context()
    page = context.new_page()
    try:
        page.goto(address)
        page.get_by_label("Your name").fill("ada")
        page.keyboard.press("Enter")
        for count, key in enumerate(keys):
            wait_until(page, f"document.getElementById('count').textContent.includes(': {count} of {len(keys)}')")
            assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
            page.keyboard.press(key)
        wait_until(page, "!document.getElementById('done').hidden")
        return page.locator("#summary").inner_text()
    finally:
        server.kill()
        server.wait()
        context.close()


@pytest.mark.timeout(900)
def test_a_run_asks_people_and_trains_on_their_labels(tmp_path, chromium, capsys):
    tiny_checkpoint(tmp_path / "model")
    run = tmp_path / "asked"
    assert go(tmp_path, "asked", *ASKING) == os.EX_TEMPFAIL
    told = label_by_keys(run, chromium, "1121213121121")
    assert "ada: 12 of 12 pairs" in told and f"vargpt-rl resume {run}" in told
    assert go(tmp_path, "asked", *ASKING) == 0
    (iteration,) = json.loads((run / "summary.json").read_text())["iterations"]
    pairs = iteration["pairs"]
    assert (pairs["built"], pairs["dropped_by_reason"]) == (11, {"people: alike": 2})
    assert pairs["people"]["reward"]["n"] == 11 and iteration["dpo"]["step0_max_abs_logratio"] <= 1e-4
    wanted = {label.pair_id: label.winner for label in all_labels(run)["ada"] if not label.again}
    proposed = read_table(run / "preferences/iter-00-candidates.parquet").set_index("pair_id")
    for row in read_table(run / "preferences/iter-00.parquet").itertuples():
        assert row.chosen_seed == proposed.loc[row.pair_id, f"{wanted[row.pair_id]}_seed"]
    assert "reward agrees with people" in render([read_run(run)])

    assert export(read_run(run), tmp_path / "labelled.parquet") == 12
    given = f"preference.pairs={tmp_path}/labelled.parquet"
    assert go(tmp_path, "given", given) == 0
    summary = json.loads((tmp_path / "given/summary.json").read_text())
    (iteration,) = summary["iterations"]
    held_out = read_table(tmp_path / "given/preferences/iter-00-held-out.parquet")
    left_out = iteration["pairs"]["dropped_by_reason"]
    assert iteration["pairs"]["built"] + len(held_out) + sum(left_out.values()) == 12 and left_out["tie"] == 1
    steps = json.loads((tmp_path / "given/state.json").read_text())["steps"]
    assert "iter-00/encode" in steps and "iter-00/sample" not in steps and iteration["rollout"] == {}
    assert "accuracy" in iteration["eval"]["after_dpo"] and "overall" in iteration["eval"]["after_dpo"]
    show(summary, tmp_path / "given")
    assert "pairs judged by people; left out: 1 tie" in capsys.readouterr().out
    assert "agrees with people" in render([read_run(tmp_path / "given")])

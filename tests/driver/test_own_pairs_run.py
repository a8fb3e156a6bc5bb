"""A whole run on pairs that came from files and on no other data, killed between encoding and training, and resumed."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from tests.driver.test_faults import SMALL
from tests.driver.test_interrupted import go
from tests.driver.test_interrupted_parts import work_done
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl import loop
from vargpt_rl.data.preferences import read_table
from vargpt_rl.driver.report import closing_table

ALONE = ("data=pairs", "evaluation.diversity=0", "stages=[align]", "align.sft=false", "data.held_out_fraction=0.3")

REWARD = "reward.path=rewards.shapes:shapes_reward"


@pytest.fixture
def folder(tmp_path):
    """Ten pairs of noise and plain images at 48 px."""
    tiny_checkpoint(tmp_path / "model")
    (tmp_path / "images").mkdir()
    rows = []
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(tmp_path / f"images/noise-{i}.png")
        Image.new("RGB", (48, 48), tuple(rng.integers(0, 255, 3).tolist())).save(tmp_path / f"images/plain-{i}.png")
        rows.append({"prompt": f"thing {i}", "chosen": f"plain-{i}.png", "rejected": f"noise-{i}.png"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.timeout(600)
def test_pairs_alone_align_a_model(folder):
    given = (f"preference.pairs={folder}/pairs.jsonl", f"preference.pair_images={folder}/images")
    points = ["parts/iter-00/images/8", "iter-00/encode"]
    settings = (*ALONE, *given, "rollout.keep_every=4")
    ends = go(folder, "alone", *points, "end", settings=settings)
    assert [end[1] for end in ends] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    go(folder, "undisturbed", "end", settings=settings)
    assert work_done(folder, "alone") == work_done(folder, "undisturbed"), "each image once, over all starts"
    run = folder / "alone"
    summary = json.loads((run / "summary.json").read_text())
    (iteration,) = summary["iterations"]
    pairs, held_out = iteration["pairs"], read_table(run / "preferences/iter-00-held-out.parquet")
    assert pairs["built"] + pairs["dropped"] + len(held_out) == 10 and 5 <= pairs["built"] <= 7 and len(held_out) <= 3
    assert iteration["dpo"]["step0_max_abs_logratio"] <= 1e-4 and iteration["dpo"]["steps"] == 3
    assert {"after_sft", "after_dpo", "sft_on_winners"} == iteration["eval"].keys()
    assert closing_table(summary).row_count == 3
    assert {path.name for path in (run / "samples").glob("*.png")} == {"iter-00.png"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("data=pairs",), "preference.pairs is not set: data=pairs needs it"),
        (("preference.pairs=NONE.jsonl",), "NONE.jsonl: no such file or folder"),
        (("preference.pairs=PAIRS",), "image plain-0.png: no such file"),
        (("preference.pairs=PAIRS", "preference.pair_images=NONE"), "no such folder of images"),
        (("preference.pairs=PAIRS", "dpo.min_pairs=4", "dpo.recipe.batch=4"), "dpo.min_pairs=4 with preference.pairs"),
        (("preference.pairs=PAIRS", "preference.builder=rewards.preferences:human"), "which has no samples"),
        (
            ("preference.pairs=PAIRS", "align.methods=[grpo]", REWARD),
            "expected dpo",
        ),
        (("preference.pairs=PAIRS", "+at.32.preference.pairs=PAIRS"), "a run has one set of pairs"),
        (("align.sft=false",), "expected align.sft=true or preference.pairs=..."),
        (("preference.builder=rewards.preferences:human",), "expected at least 2, or +preference.options.against"),
        (
            ("preference.builder=rewards.preferences:human", "preference.samples=2", "+preference.options.share=2"),
            "share=2: expected a share above 0, at most 1",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(folder, settings, told, capsys):
    words = [word.replace("PAIRS", f"{folder}/pairs.jsonl") for word in settings]
    small = [f"runs={folder}", f"checkpoint={folder}/model", "name=bad", *SMALL.split()]
    assert loop.main([*small, *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and told in errors[0]
    assert not os.path.exists(folder / "bad/state.json")

"""The whole loop with a v1 model: a command, real Ray and DeepSpeed, fresh weights, a few steps a stage."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from configs.load import load_config
from vargpt_rl import loop
from vargpt_rl.memory.plan import model_config, plan
from vargpt_rl.model.bits import unpack
from vargpt_rl.model.families import load_config as load_model_config
from vargpt_rl.model.families import load_model, markup_for
from vargpt_rl.model.v1.modeling import VargptV1
from vargpt_rl.release.tiny_v1 import fresh_v1_config, make_fresh_v1

ROOT = Path(__file__).parents[1]
SMALL = """
model=tiny_v1 resolutions=[32] tokenizer.steps=4 tokenizer.batch=2 tokenizer.images=8
pretrain.records=8 pretrain.recipe.steps=2 pretrain.recipe.batch=4 pretrain.recipe.micro_batch=2
understanding.records=8 understanding.questions=16 understanding.recipe.steps=2 understanding.recipe.batch=8
understanding.recipe.micro_batch=4 sft.records=16 sft.recipe.steps=4 sft.recipe.batch=4 sft.recipe.micro_batch=2
dpo.recipe.steps=3 dpo.recipe.batch=4 dpo.recipe.micro_batch=2 preference.count=8
evaluation.prompts=8 evaluation.questions=4 evaluation.grid=2 tracking.wandb=disabled rollout.workers=1 name=test
"""


@pytest.mark.timeout(600)
def test_a_run_goes_through_every_stage_and_its_model_loads(tmp_path):
    command = [sys.executable, "-m", "vargpt_rl.loop", f"runs={tmp_path}", *SMALL.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "real_accelerator" not in done.stdout + done.stderr, "DeepSpeed is quiet in the driver too"
    folder = tmp_path / "test"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert set(summary["stages"]) == {"tokenizer", "pretrain", "understanding"}
    (iteration,) = summary["iterations"]
    assert iteration["resolution"] == 32 and iteration["pairs"]["built"] + iteration["pairs"]["dropped"] == 8
    assert iteration["dpo"]["step0_max_abs_logratio"] <= 1e-4
    assert iteration["dpo"]["loss_first"] == pytest.approx(0.6931, abs=1e-3)
    assert iteration["swap"]["verified"] and iteration["swap"]["bytes"] > 0
    assert summary["understanding"]["after"]["n"] == 4

    log = (folder / "run.log").read_text()
    assert "tokenizer 32 px: 4 steps of 2 = 2 (micro) x 1 (accumulation) x 1 (ranks)" in log
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("index_accuracy" in line for line in metrics if line["stage"] == "sft")
    assert not any("bit_accuracy" in line for line in metrics)
    table = pd.read_parquet(folder / "preferences/iter-00.parquet")
    for packed in (*table.chosen_bits, *table.rejected_bits):
        assert unpack(packed, 5, 1, 1024).max() < 1024

    model = load_model(folder / "model", "auto")
    start = load_model(folder / "start", "auto").state_dict()
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])
    }
    assert changed == {"image_tokenizer", "projector_in", "projector_out", "image_decoder", "model", "lm_head"}
    assert markup_for(folder / "model", model.config).question("a star")


def test_another_size_than_the_models_own_is_refused_before_anything_starts(tmp_path, capsys):
    make_fresh_v1(tmp_path / "model", 48, seed=0)
    assert loop.main([f"runs={tmp_path}", *SMALL.split(), f"checkpoint={tmp_path / 'model'}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: resolutions=[32]: resolution 32x32: this model draws 48x48 pixels only"
    )


def test_fresh_weights_follow_from_the_seed_and_what_is_there_stays(tmp_path):
    first, same, other = (make_fresh_v1(tmp_path / name, 32, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    models = [load_model(folder, "auto").state_dict() for folder in (first, same, other)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert not torch.equal(models[0]["lm_head.weight"], models[2]["lm_head.weight"])
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"):
        assert (first / name).read_bytes() == (same / name).read_bytes()
    config = load_model_config(first)
    markup = markup_for(first, config)
    for name in ("start", "end", "pad"):
        token = getattr(config, f"image_gen_{name}_token_id")
        assert markup.tokenizer.convert_tokens_to_ids(f"<|image_gen_{name}|>") == token
    assert markup.tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    assert markup.question("a star")[0] == config.text_config.bos_token_id
    before = (first / "model.safetensors").stat()
    assert make_fresh_v1(tmp_path / "a", 32, seed=5) == first
    assert (first / "model.safetensors").stat() == before


def test_presets_leave_other_settings_to_be_chosen():
    config = load_config(["model=tiny_v1"])
    assert (config.checkpoint, config.resolutions) == ("tiny_v1", [64]) and config.sampling.cfg == 0
    assert load_config(["model=tiny_v1", "checkpoint=elsewhere"]).checkpoint == "elsewhere"
    paths = ["data.captions=a", "data.images=b", "preference.winners=c"]
    assert load_config(["model=tiny_v1", "data=captioned", *paths]).stages == ["tokenizer", "pretrain", "align"]
    assert load_config(["experiment=vargpt_v1"]).checkpoint == "release_v1"


@pytest.mark.parametrize("checkpoint", ["tiny_v1", "release_v1"])
def test_memory_is_planned_without_a_checkpoint(checkpoint):
    config = load_config(["experiment=vargpt_v1"] if checkpoint == "release_v1" else ["model=tiny_v1"])
    found = plan(config, model_config(checkpoint, config.resolutions[0]), on_gpu=True)
    assert {training.stage for training in found.training} == {"pretrain", "understanding", "sft", "dpo"}
    weights = found.rollouts[0].weights
    if checkpoint == "tiny_v1":
        with torch.device("meta"):
            model = VargptV1(fresh_v1_config(64))
        assert weights == 4 * sum(parameter.numel() for parameter in model.parameters())
    else:
        # 9.28e9 elements of the released list, less its buffers and unread rows, in bf16
        assert weights == pytest.approx(2 * 9.215e9, rel=1e-3)

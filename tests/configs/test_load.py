"""Settings: unknown keys and bad values are errors of one line that name them; ``at`` changes them by resolution."""

import pytest

from configs.load import load_config
from learners.config import Recipe


def test_the_default_is_the_demo():
    config = load_config([])
    assert config.resolutions == [128, 256] and config.iterations == 2
    assert str(config.directory) == "runs/shapes-128-256"


def test_the_users_command():
    config = load_config(["iterations=2", "resolutions=[256,512]"])
    assert str(config.directory) == "runs/shapes-256-512"


def test_captioned_data_needs_its_three_paths():
    with pytest.raises(ValueError, match="preference.winners is not set"):
        load_config(["data=captioned", "data.captions=a", "data.images=b"])
    config = load_config(["data=captioned", "data.captions=a", "data.images=b", "preference.winners=c"])
    assert config.stages == ["tokenizer", "pretrain", "align"]
    for stage in ("understanding", "edit"):
        with pytest.raises(ValueError, match=f"stages: {stage} needs .* which data=captioned has not; leave it out"):
            load_config(
                ["data=captioned", "data.captions=a", "data.images=b", "preference.winners=c", f"stages=[{stage}]"]
            )


# Table 1 of the VARGPT-v1.1 paper: batch size, learning rate, steps, ZeRO stage, by stage and resolution.
TABLE_1 = {
    ("pretrain", 256): (1024, 1e-3, 2000, 3),
    ("understanding", 256): (256, 5e-5, 3100, 2),
    ("sft", 256): (1024, 5e-5, 40000, 3),
    ("dpo", 256): (384, 1e-6, 5000, 3),
    ("sft", 512): (512, 5e-5, 30000, 3),
    ("dpo", 512): (384, 1e-6, 3000, 3),
    ("edit", 512): (512, 5e-5, 2000, 3),
}


def test_the_papers_experiment_is_its_table():
    config = load_config(["experiment=vargpt_v1_1", "checkpoint=x"])
    assert config.stages == ["pretrain", "understanding", "align", "edit"] and config.resolutions == [256, 512]
    for (stage, resolution), row in TABLE_1.items():
        recipe = getattr(config.at_resolution(resolution), stage).recipe
        assert (recipe.batch, recipe.lr, recipe.steps, recipe.zero) == row, (stage, resolution)
        assert (recipe.schedule, recipe.warmup_ratio, recipe.weight_decay) == ("cosine", 0.1, 0.0)
    # Sampling of section 5; records and prompts of section 4, at both resolutions.
    for resolution in config.resolutions:
        at = config.at_resolution(resolution)
        assert (at.sampling.cfg, at.sampling.top_k, at.sampling.top_p) == (1.5, 900, 0.95)
        assert (at.sft.records, at.preference.count, at.preference.samples) == (8_300_000, 180_000, 1)
        assert (at.pretrain.records, at.understanding.records, at.edit.records) == (8_300_000, 50_000, 11_325)
        assert at.evaluation.prompts == 120, "nothing of the demo's is left"


def test_batches_are_told_in_words():
    recipe = Recipe(steps=100, batch=16, micro_batch=4)
    assert recipe.arithmetic(2) == "100 steps of 16 = 4 (micro) x 2 (accumulation) x 2 (ranks)"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("dpo.bta=1", "bta"),
        ("dpo.beta=high", "dpo.beta"),
        ("dpo.beta=0", "dpo.beta=0"),
        ("stages=[align,pretrain]", "in the order"),
        ("stages=[]", "stages="),
        ("iterations=1", "iterations=1"),
        ("stages=[edit,align]", "in the order"),
        ("edit.recipe.batch=7", "edit.recipe"),
        ("sft.frozen=[lm_head]", "sft.frozen=['lm_head']"),
        ("sft.frozen=[projector_in,projector_out,image_decoder]", "leaves nothing"),
        ("resolutions=[100,256]", "100"),
        ("sampling.tau=0", "sampling.tau"),
        ("rollout.workers=0", "rollout.workers"),
        ("data.kind=other", "data.kind=other"),
        ("name=../up", "name=../up"),
        ("tracking.wandb=on", "tracking.wandb=on"),
        ("dpo.loss_weights=[1.0,2.0]", "dpo.loss_weights"),
        ("sft.recipe.batch=7", "sft.recipe"),
        ("+at.512.foo=3", "at.512"),
        ("+at.big.sft.records=3", "at.big"),
        ("at.512.sft.recipe.batch=7", "sft.recipe"),
    ],
)
def test_bad_settings_are_named(override, named):
    with pytest.raises(ValueError) as error:
        load_config([override]).directory  # noqa: B018 (the name is checked when the folder is asked for)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_at_changes_settings_at_its_resolution_only():
    config = load_config(["at.512.sft.recipe.steps=7", "+at.64.dpo.beta=0.5"])
    assert config.at_resolution(512).sft.recipe.steps == 7
    assert config.at_resolution(64).dpo.beta == 0.5
    assert config.at_resolution(128).sft.recipe == config.sft.recipe

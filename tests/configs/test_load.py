"""Settings: unknown keys and bad values are errors of one line that name them; ``at`` changes them by resolution."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from configs.load import load_config
from learners.config import Recipe


def test_the_default_is_the_demo():
    config = load_config([])
    assert config.resolutions == [128, 256] and config.iterations == 2
    assert str(config.directory) == "runs/shapes-128-256"


def test_the_users_command():
    config = load_config(["iterations=2", "resolutions=[256,512]"])
    assert str(config.directory) == "runs/shapes-256-512"


@pytest.fixture
def saved(tmp_path):
    """A folder with the settings of a run, moved from where it was begun."""
    config = load_config(["dpo.beta=0.3", "at.512.dpo.beta=0.4", "name=before", "runs=elsewhere"])
    folder = tmp_path / "runs" / "moved"
    folder.mkdir(parents=True)
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    return folder


def test_settings_of_a_run_are_read_from_its_folder(saved):
    config = load_config([f"resume={saved}", "rollout.workers=3"])
    assert config.directory == saved
    assert config.dpo.beta == 0.3 and config.at["512"]["dpo"]["beta"] == 0.4
    assert config.rollout.workers == 3


def test_a_run_is_found_by_whatever_names_its_folder(saved, tmp_path, monkeypatch):
    link = tmp_path / "latest"
    link.symlink_to(saved)
    (saved / "model").mkdir()
    for here, name, found in (
        (saved, ".", saved),
        (saved / "model", "..", saved),
        (tmp_path, str(link), Path("runs/moved")),
        (tmp_path, "runs/moved/", Path("runs/moved")),
    ):
        monkeypatch.chdir(here)
        assert load_config([f"resume={name}"]).directory == found


def test_resuming_takes_settings_of_the_folder_alone(saved, tmp_path):
    with pytest.raises(ValueError, match="experiment=quick: expected no group of settings with resume="):
        load_config(["experiment=quick", f"resume={saved}"])
    with pytest.raises(ValueError, match=r"nowhere/config\.yaml: expected the settings of a run"):
        load_config([f"resume={tmp_path / 'nowhere'}"])
    (saved / "config.yaml").write_text("bogus: 1\n")
    with pytest.raises(ValueError, match=r"config\.yaml: there is no key bogus"):
        load_config([f"resume={saved}"])


def test_winners_are_needed_where_pairs_are_made_of_them():
    given = ["data=captioned", "data.captions=a", "data.images=b"]
    human, best = (f"preference.builder=rewards.preferences:{name}" for name in ("human", "best_of_n"))
    reward = "reward.path=rewards.shapes:shapes_reward"
    without = (
        ["align.methods=[grpo]", reward],
        [best, "preference.samples=2", reward],
        [human, "preference.samples=2"],
        ["stages=[pretrain]"],
    )
    for settings in without:
        assert not load_config([*given, *settings]).needs_winners
    for settings in ([], [reward], [human, "+preference.options.against=winners"]):
        with pytest.raises(ValueError, match="preference.winners is not set"):
            load_config([*given, *settings])


def test_captioned_data_needs_its_three_paths():
    with pytest.raises(ValueError, match="preference.winners is not set"):
        load_config(["data=captioned", "data.captions=a", "data.images=b"])
    config = load_config(["data=captioned", "data.captions=a", "data.images=b", "preference.winners=c"])
    assert config.stages == ["tokenizer", "pretrain", "align"]
    for stage in ("understanding", "edit"):
        with pytest.raises(ValueError, match=f"stages: {stage} needs .* which data=captioned lacks; leave it out"):
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


def test_the_grpo_experiment_has_nothing_of_the_demos():
    given = ["checkpoint=x", "reward.path=rewards.technical:sharpness"]
    config = load_config(["experiment=vargpt_v1_1_grpo", *given, "resolutions=[256,512]", "iterations=2"])
    for resolution in (256, 512):
        at = config.at_resolution(resolution)
        assert (at.rl.prompts, at.rl.group, at.rl.recipe.steps, at.rl.recipe.batch) == (16, 16, 1200, 256)
        assert (at.rl.recipe.lr, at.rl.credit_scales, at.rl.updates, at.evaluation.prompts) == (1e-5, 5, 1, 120)
    assert config.align.left_out == {"sft", "dpo", "sft_on_winners"}


def test_the_adapter_experiment_has_nothing_of_the_demos():
    given = ["checkpoint=x", "evaluation.reward.path=rewards.technical:sharpness", *RECORDS]
    given += ["resolutions=[256,512]", "iterations=2", "+data.sources.drawings.files=[x.jsonl]"]
    config = load_config(["experiment=vargpt_v1_1_lora_1gpu", *given])
    assert config.adapter.is_on and config.placement.is_colocated
    for resolution, batches in ((256, (8, 4, 8)), (512, (2, 1, 4))):
        at = config.at_resolution(resolution)
        assert tuple(getattr(at, block).recipe.micro_batch for block in ("sft", "dpo", "rl")) == batches
        assert (at.sft.recipe.steps, at.dpo.recipe.steps, at.rl.recipe.steps) == (1000, 250, 200)
        assert (at.rl.credit_scales, at.rl.updates) == (5, 1)
        assert (at.preference.count, at.evaluation.prompts) == (8000, 120)


def test_the_smallest_experiment_is_the_other_in_4_bits():
    given = ["checkpoint=x", "evaluation.reward.path=rewards.technical:sharpness", *RECORDS]
    given += ["resolutions=[256,512]", "iterations=2", "+data.sources.drawings.files=[x.jsonl]"]
    small, large = (load_config([f"experiment=vargpt_v1_1_lora_{name}", *given]) for name in ("24gb", "1gpu"))
    assert small.adapter.four_bit == ["language_model", "vision_tower", "image_decoder"]
    for resolution, batches in ((256, (4, 2, 8)), (512, (1, 1, 4))):
        at, other = small.at_resolution(resolution), large.at_resolution(resolution)
        for block, micro in zip(("sft", "dpo", "rl"), batches, strict=True):
            recipe = getattr(at, block).recipe
            assert recipe.micro_batch == micro and getattr(other, block).recipe.micro_batch >= micro
            assert (recipe.lr, recipe.batch) == (getattr(other, block).recipe.lr, getattr(other, block).recipe.batch)


def test_an_adapter_is_a_group_of_settings():
    assert load_config([]).adapter.kind == "none"
    config = load_config(["adapter=lora", "adapter.rank=4", "adapter.targets=[self_attention.qkv]"])
    assert (config.adapter.kind, config.adapter.rank, config.adapter.targets) == ("lora", 4, ["self_attention.qkv"])


def test_every_stage_of_the_papers_experiment_can_learn_from_records():
    given = [*RECORDS, "+data.sources.drawings.files=[x.jsonl]", "+data.sources.edits={files:[y.jsonl],layout:editing}"]
    config = load_config(["experiment=vargpt_v1_1", "checkpoint=x", *given])
    assert config.stages == ["pretrain", "understanding", "align", "edit"] and list(config.data.records())


def test_batches_are_told_in_words():
    recipe = Recipe(steps=100, batch=16, micro_batch=4)
    assert recipe.arithmetic(2) == "100 steps of 16 = 4 (micro) x 2 (accumulation) x 2 (ranks)"


def test_held_out_images_are_judged_by_another_reward_than_the_one_that_trains():
    path, same = "rewards.technical:sharpness", "rewards.technical:sharpness: that is the training reward"
    with pytest.raises(ValueError, match=same):
        load_config([f"reward.path={path}", f"evaluation.reward.path={path}"])
    config = load_config([f"reward.path={path}", "evaluation.reward.path=rewards.technical:block_free"])
    assert config.evaluation.reward.path == "rewards.technical:block_free" and config.reward.path == path
    alone = load_config(["reward.path=null", "align.methods=[dpo]", f"evaluation.reward.path={path}"])
    assert alone.evaluation.reward.path == path


RECORDS = ["data=records", "preference.prompts=p.jsonl", "preference.winners=w"]


def test_sources_of_records_are_named_in_the_settings():
    given = ["+data.sources.a.files=[x.jsonl]", "+data.sources.b={files:[y.tar],format:webdataset,weight:2}"]
    config = load_config([*RECORDS, *given])
    sources = config.data.records()
    assert (sources["a"].files, sources["a"].format) == (["x.jsonl"], "jsonl")
    assert (sources["b"].format, sources["b"].weight) == ("webdataset", 2.0)
    assert config.stages == ["pretrain", "understanding", "align"]
    assert config.at_resolution(256).data == config.data


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], "data.sources: none given"),
        (["+data.sources.a.fles=[x]"], "there is no key fles, did you mean files?"),
        (["+data.sources.a={files:[x],format:xml}"], "data.sources.a: format=xml"),
        (["+data.sources.a={files:[x],weight:heavy}"], "data.sources.a: Value 'heavy'"),
        (["+data.sources.a.files=[x]", "stages=[tokenizer,align]"], "stages: tokenizer needs"),
        (["+data.sources.a.files=[x]", "preference.winners=null"], "preference.winners is not set"),
        (["+data.sources.a.files=[x]", "preference.prompts=null"], "preference.prompts is not set"),
        (["+data.sources.a.files=[x]", "data.max_tokens=521", "resolutions=[256]"], "data.max_tokens=521: an image"),
        (["data.workers=-1"], "data.workers=-1"),
        (["data.held_out_fraction=1"], "data.held_out_fraction=1"),
        (["data.kind=shapes", "data.encoded=x"], "data.encoded are for data=records"),
    ],
)
def test_what_is_wrong_with_records_is_named(overrides, named):
    with pytest.raises(ValueError) as error:
        load_config([*RECORDS, *overrides])
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("dpo.bta=1", "bta"),
        ("evaluation.reward.pth=a:b", "pth"),
        ("dpo.beta=high", "dpo.beta"),
        ("dpo.beta=0", "dpo.beta=0"),
        ("dpo.min_pairs=15", "dpo.min_pairs=15"),
        ("stages=[align,pretrain]", "in the order"),
        ("stages=[]", "stages="),
        ("iterations=1", "iterations=1"),
        ("stages=[edit,align]", "in the order"),
        ("pretrain.recipe.batch=7", "pretrain.recipe"),
        ("sft.frozen=[lm_head]", "sft.frozen=['lm_head']"),
        ("sft.frozen=[projector_in,projector_out,image_decoder]", "leaves nothing"),
        ("dpo.frozen=[vision]", "dpo.frozen=['vision']"),
        ("rl.frozen=[vision]", "rl.frozen=['vision']"),
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
        ("at.256.sft.recipe.batch=7", "sft.recipe"),
        ("tracking.best=overall", "tracking.best=overall"),
        ("tracking.best=after_dpo.", "tracking.best=after_dpo."),
        ("tracking.table_rows=-1", "tracking.table_rows=-1"),
        ("sft.checkpoints=[0.5,1.5]", "sft.checkpoints=[0.5, 1.5]"),
        ("sft.shares=[0.5,0.5]", "one for each of sft.checkpoints=[0.5]"),
        ("sft.shares=[1.2]", "sft.shares=[1.2]: 1.2: expected 0 to 1"),
        ("sft.shares=[-0.2]", "sft.shares=[-0.2]"),
        ("at.512.sft.shares=[2.0]", "sft.shares=[2.0]"),
    ],
)
def test_bad_settings_are_named(override, named):
    with pytest.raises(ValueError) as error:
        load_config([override]).directory  # noqa: B018 (the name is checked when the folder is asked for)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_what_shares_gpus_does_not_overlap():
    assert load_config(["dpo.min_pairs=16", "placement=split"]).dpo.min_pairs == 16
    with pytest.raises(ValueError, match="dpo.min_pairs is for placement=split"):
        load_config(["dpo.min_pairs=16", "placement=colocated"])


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ([], {50: 0.5, 100: 0.5}),
        (["sft.checkpoints=[0.75,0.25]"], {25: 1 / 3, 75: 1 / 3, 100: 1 / 3}),
        (["sft.checkpoints=[0.75,0.25]", "sft.shares=[0.5,0.2]"], {25: 0.2, 75: 0.5, 100: 0.3}),
        (["sft.checkpoints=[0.1,0.1001,0.9999]", "sft.shares=[0.5,0.2,0.1]"], {10: 0.7, 100: 0.3}),
        (["sft.checkpoints=[0.001,0.5]", "sft.shares=[0.9,0.1]"], {1: 0.9, 50: 0.1, 100: 0.0}),
        (["sft.checkpoints=[]"], {100: 1.0}),
    ],
)
def test_checkpoints_have_shares_of_the_samples(settings, shares):
    samplers = load_config(["sft.recipe.steps=100", *settings]).sft.samplers()
    assert list(samplers) == list(shares) and samplers == pytest.approx(shares)


def test_at_changes_settings_at_its_resolution_only():
    config = load_config(["at.512.sft.recipe.steps=7", "+at.64.dpo.beta=0.5"])
    assert config.at_resolution(512).sft.recipe.steps == 7
    assert config.at_resolution(64).dpo.beta == 0.5
    assert config.at_resolution(64).sft.recipe == config.sft.recipe


@pytest.mark.parametrize(
    ("given", "steps", "batch"),
    [
        ([], 28, 16),
        (["sft.recipe.steps=250"], 250, 16),
        (["sft.recipe={steps:250,batch:32}"], 250, 32),
        (["sft.recipe.steps=250", "at.256.sft.recipe.steps=7"], 7, 16),
        (["at.256.sft.recipe.steps=7", "sft.recipe.steps=250"], 7, 16),
        (["experiment=quick", "sft.recipe.steps=250"], 250, 16),
        (["~at", "sft.recipe.steps=250"], 250, 32),
    ],
)
def test_what_a_command_gives_wins_over_a_files_value_for_one_resolution(given, steps, batch):
    recipe = load_config(given).at_resolution(256).sft.recipe
    assert (recipe.steps, recipe.batch) == (steps, batch)

"""Settings that cannot be right are refused with key, value and what is expected; others are taken as written."""

import re

import pytest

from configs.consistency import check_devices
from configs.load import load_config
from configs.schema import ONCE, LoopConfig
from learners.config import LOSS_TYPES, OPTIMIZERS, SCHEDULES
from vargpt_rl.common.settings import dotted, expectations, kind_at
from vargpt_rl.driver import start
from vargpt_rl.driver.run import SUMMARY
from vargpt_rl.loop import main

RL = ["align.methods=[grpo]", "reward.path=rewards.technical:sharpness", "evaluation.reward.path=rewards.shapes:Shapes"]
CAPTIONED = ["data=captioned", "data.images=/tmp", "preference.winners=/tmp"]


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    """Fail where the inputs of accepted settings would be read."""

    def gather(config):
        raise AssertionError("accepted")

    monkeypatch.setattr(start, "gather", gather)


VALID_ONCE = {"runs": "x", "name": "x", "checkpoint": "x", "dtype": "bf16", "stages": "[align]", "resolutions": "[256]",
              "data": "{block: 5}", "placement": "{kind: split}", "learner": "{ranks: 1}",
              "rollout.transport": "auto", "rollout.text_engine": "auto",
              "reward": "{path: x}", "evaluation.reward": "{path: x}"}  # fmt: skip
COUNTS = [
    "iterations",
    "preference.count",
    "preference.samples",
    "evaluation.prompts",
    "evaluation.grid",
    "sft.recipe.batch",
    "sft.recipe.steps",
    "sft.recipe.micro_batch",
    "sft.records",
    "tokenizer.steps",
    "tokenizer.batch",
    "tokenizer.images",
    "pretrain.records",
    "data.block",
    "data.seen_side",
    "data.seen_pixels",
    "data.max_tokens",
    "rollout.workers",
    "rollout.batch_size",
    "rollout.reply_tokens",
    "learner.ranks",
    "learner.save_every",
    "learner.keep_last",
    "learner.keep_every",
    "adapter.rank",
    "dpo.min_pairs",
    "dpo.credit_scales",
    "rl.prompts",
    "rl.group",
    "rl.updates",
    "rl.credit_scales",
    "sampling.top_k",
    "edit.recipe.steps",
    "at.256.sft.records",
    "at.512.preference.count",
]
FROM_ZERO = [
    "seed",
    "evaluation.questions",
    "evaluation.edits",
    "tracking.table_rows",
    "data.workers",
    "rollout.max_restarts",
    "learner.max_restarts",
    "understanding.questions",
    "rl.refills",
]
ABOVE_ZERO = [
    "adapter.alpha",
    "sft.recipe.lr",
    "tokenizer.lr",
    "dpo.beta",
    "sampling.tau",
    "rollout.call_timeout_s",
    "learner.start_timeout_s",
    "rollout.gpus_per_worker",
    "learner.gpus_per_rank",
    "sft.recipe.max_grad_norm",
    "sampling.top_p",
    "at.256.dpo.recipe.lr",
]
NOT_NEGATIVE = [
    "sft.recipe.weight_decay",
    "sampling.cfg",
    "dpo.credit_alpha",
    "rl.credit_alpha",
    "rl.kl",
    "learned_reward.center",
    "rollout.text_gpus",
]
SHARES = [
    "sft.recipe.warmup_ratio",
    "understanding.drawing_share",
    "data.max_bad_fraction",
    "data.held_out_fraction",
    "sampling.top_p",
    "dpo.label_smoothing",
    "rl.clip",
    "learned_reward.held_out",
]
WORDS = {
    "sft.recipe.schedule": "cosin",
    "dpo.loss_type": "[sigmiod]",
    "dpo.logp_norm": "sums",
    "stages": "[pretrian,align]",
    "align.methods": "[gpro]",
    "learned_reward.trains": "[head]",
    "sft.frozen": "[projector]",
    "tracking.wandb": "on",
    "tracking.best": "after_sft",
    "rollout.transport": "fast",
    "rollout.reply": "none",
    "rollout.text_engine": "vlm",
    "placement.strategy": "pack",
    "placement.kind": "shared",
    "data.kind": "photos",
    "sft.recipe.zero": "5",
    "rl.staleness": "2",
    "resolutions": "[100,256]",
    "name": "..",
    "sft.recipe.gradient_checkpointing": "-1",
    "dtype": "half",
    "sft.recipe.steps": "many",
    "rollout.workers": "1.5",
    "seed": "1,2",
    "sft.checkpoints": "[1.5]",
    "sft.shares": "[-0.5]",
    "dpo.loss_weights": "[nan]",
    "adapter.kind": "dora",
    "adapter.dropout": "1",
    "adapter.full": "[language]",
    "adapter.targets": "[image_tokenizer]",
    "at.256.adapter.rank": "4",
    "sft.recipe.weight_decay": "2",
    "dpo.control": "2",
    "sft.recipe": "{offload: 2}",
    "at.256.dpo.control": "-1",
}
LINES = [
    "runs",
    "data.captions",
    "data.id_field",
    "preference.winners",
    "preference.pairs",
    "preference.prompts",
    "preference.builder",
    "reward.path",
    "evaluation.reward.path",
    "learned_reward.table",
    "tracking.project",
    "tracking.best",
]
ABSURD = [
    *((key, "1" + "0" * 30) for key in (*COUNTS, *FROM_ZERO)),
    *((key, value) for key in (*ABOVE_ZERO, *NOT_NEGATIVE) for value in ("1e308", "1e-320")),
    *((f"{block}.lr", "5e6") for block in ("tokenizer", "sft.recipe", "rl.recipe", "at.256.dpo.recipe")),
    *((f"at.256.{key}", VALID_ONCE.get(key, "1")) for key in ONCE),
]
BAD = [
    *((key, value) for key in COUNTS for value in ("0", "-1")),
    *((key, "-1") for key in FROM_ZERO),
    *((key, value) for key in ABOVE_ZERO for value in ("0", "-1", "nan", "inf")),
    *((key, value) for key in NOT_NEGATIVE for value in ("-1", "nan", "inf")),
    *((key, value) for key in SHARES for value in ("-1", "2", "nan", "inf")),
    *WORDS.items(),
    *(("name", value) for value in (".", "a/b", "/tmp/x", "../up", "", "a\nb", "x" * 300)),
    *((key, value) for key in LINES for value in ("", "  ", "a\nb", "\0", "x" * 5000)),
    *ABSURD,
    ("dpo.loss_weights", "[0]"),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_impossible_values_are_one_line_with_key(key, value, capsys):
    assert main([f"{key}={value}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert key.rpartition(".")[2] in message and "Traceback" not in message
    assert "expected" in message or "could not be converted" in message or "not a valid bool" in message


def test_every_number_and_text_of_a_run_has_a_range():
    for key in dotted(LoopConfig):
        kind = kind_at(LoopConfig, key.split("."))
        ranged = any(name in str(kind) for name in ("int", "float", "str")) and "dict" not in str(kind)
        assert not ranged or expectations(kind), f"{key} takes anything"


@pytest.mark.parametrize("name", ["/tmp/x", "a/b", "a\\b", " a", "x" * 300])
def test_a_source_is_named_as_a_folder_can_be(name, capsys):
    assert main(["data=records", f"data.sources.{name}.files=[x]", "preference.prompts=p", "preference.winners=w"]) == 2
    message = capsys.readouterr().err
    assert f"data.sources.{name}: expected a plain folder name" in message and message.count("\n") == 1


@pytest.mark.parametrize("resolution", ["0256", "100", "0", "256px", "\uff12\uff15\uff16", "+256", "1" * 5000, "-16"])
def test_what_is_no_resolution_is_refused(resolution, capsys):
    assert main([f"at.{resolution}.sft.records=4"]) == 2
    message = capsys.readouterr().err
    assert "expected a resolution in pixels, a positive multiple of 16" in message and message.count("\n") == 1


def test_settings_of_one_resolution_that_differ_are_taken():
    given = [
        "rollout.batch_size=2",
        "align.methods=[dpo]",
        "tracking.images=3",
        "dpo.control=false",
        "sampling.top_p=0.5",
    ]
    config = load_config([f"at.256.{setting}" for setting in given])
    assert config.at_resolution(256).tracking.images == 3 and not config.at_resolution(256).dpo.control


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (["adapter.full=[projectors]"], "projectors is in adapter.targets too"),
        (["stages=[tokenizer,align]"], "tokenizer trains the image tokenizer, which takes no adapter"),
        (["align.methods=[reward,grpo]"], "a learned reward trains whole weights"),
        (
            ["adapter.four_bit=[language_model]", "adapter.serving=merged"],
            "nothing merges into 4 bits, expected applied",
        ),
        (["adapter.four_bit=[vision_tower]", "adapter.full=[vision_tower]"], "vision_tower is in adapter.four_bit too"),
        (["adapter.four_bit=[projectors]"], "projectors"),
        (["adapter.four_bit=[language_model]", "sft.recipe.zero=3"], "sft.recipe.zero=3, which splits the weights"),
        (["adapter.reference=learner", "dpo.recipe.zero=3"], "dpo.recipe.zero=3, which splits the weights"),
    ],
)
def test_what_an_adapter_cannot_do_is_one_line(others, told, capsys):
    assert main(["adapter=lora", *others]) == 2
    message = capsys.readouterr().err
    assert told in message and "expected" in message.replace("leave it out", "expected") and message.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["sft.recipe.offload=true", "sft.recipe.zero=1"], "sft.recipe: offload=true with zero=1: expected zero 2 or"),
        (["sft.recipe.offload=true", "sft.recipe.optimizer=adamw_8bit"], "which updates on the GPU: expected adamw"),
        (["dpo.recipe.ema=0.9", "dpo.recipe.zero=3"], "ema=0.9 with zero=3, which splits the weights: expected"),
        ([*RL, "rl.recipe.ema=0.9", "rl.guard.validate_every=1"], "rl.recipe.ema=0.9 with rl.guard.validate_every"),
        (["sft.recipe.optimizer=muon"], "sft.recipe.optimizer=muon: expected one of adamw, adamw_8bit"),
    ],
)
def test_options_of_a_recipe_that_exclude_each_other_are_one_line(settings, told, capsys):
    assert main(settings) == 2
    message = capsys.readouterr().err
    assert told in message and "expected" in message and message.count("\n") == 1


NEED_A_GPU = [
    *(
        ([f"{block}.recipe.optimizer={name}"], f"{block}.recipe.optimizer={name}")
        for block in ("pretrain", "understanding", "sft", "dpo", "learned_reward", "rl", "edit")
        for name in OPTIMIZERS
        if name != "adamw"
    ),
    *(
        (["adapter=lora", "align.methods=[dpo]", f"adapter.four_bit=[{part}]"], f"adapter.four_bit=['{part}']")
        for part in ("language_model", "vision_tower", "image_decoder")
    ),
    (["at.256.sft.recipe.optimizer=adamw_8bit"], "sft.recipe.optimizer=adamw_8bit"),
]
EVERY_STAGE = ["stages=[pretrain,understanding,align,edit]", *RL, "align.methods=[dpo,reward,grpo]"]


@pytest.fixture
def without_gpus(monkeypatch, tmp_path):
    """Settings of runs on a machine of its own, without GPUs."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return [f"runs={tmp_path}", "name=x", *EVERY_STAGE]


@pytest.mark.parametrize(("settings", "told"), NEED_A_GPU)
def test_what_needs_a_gpu_is_refused_before_anything_starts(settings, told, without_gpus, tmp_path, capsys):
    assert main([*without_gpus, *settings]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {told}: ") and message.count("\n") == 1
    assert "on GPUs, of which there are none; expected" in message
    assert not list(tmp_path.iterdir())


def test_gpus_of_a_cluster_are_asked_for_when_it_is_joined(without_gpus, monkeypatch):
    settings, _ = NEED_A_GPU[0]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(AssertionError, match="accepted"):
        main([*without_gpus, *settings])


def test_a_finished_run_is_shown_where_there_is_no_gpu(without_gpus, monkeypatch, tmp_path):
    settings, _ = NEED_A_GPU[0]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / SUMMARY).write_text("{}")
    with pytest.raises(AssertionError, match="accepted"):
        main([*without_gpus, *settings])


def test_what_needs_a_gpu_is_refused_without_one():
    config = load_config([*RL, "rl.recipe.optimizer=adamw_8bit", "dpo.recipe.optimizer=adamw_8bit"])
    with pytest.raises(ValueError, match=r"^rl\.recipe\.optimizer=adamw_8bit: .* GPUs.*; expected adamw$"):
        check_devices(config, on_gpu=False)
    quantised = load_config(["adapter=lora", "adapter.four_bit=[language_model]", "dtype=fp32"])
    with pytest.raises(ValueError, match=r"^adapter\.four_bit=\['language_model'\]: .*; expected \[\]$"):
        check_devices(quantised, on_gpu=False)
    others = load_config(["learned_reward.recipe.optimizer=adamw_8bit", "align.methods=[grpo]"])
    check_devices(others, on_gpu=False)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([], "BLOCK.stored_states=true with BLOCK.frozen=[]: expected language_inputs among the frozen parts"),
        (
            ["BLOCK.frozen=[language_inputs]", "adapter=lora"],
            "BLOCK.stored_states=true with an adapter: expected adapter=none",
        ),
    ],
)
@pytest.mark.parametrize("block", ["dpo", "rl"])
def test_states_are_stored_of_a_frozen_language_model_alone(block, others, told, capsys):
    settings = [f"{block}.stored_states=true", *(each.replace("BLOCK", block) for each in others)]
    assert main(settings) == 2
    assert told.replace("BLOCK", block) in capsys.readouterr().err


TYPOS = {
    "resolutoins=[128]": "resolutions",
    "sft.recpie.steps=4": "sft.recipe",
    "reward.pth=x": "reward.path",
    "learner.rank=1": "learner.ranks",
    "sft.foo.bar=2": "sft",
    "foo=1": "stages",
    "sft.recipe.step=10": "sft.recipe.steps",
    "lr=1e-4": "lr",
    "dpo.lr=1e-4": "dpo.recipe.lr",
    "at.64.sft.recpie.steps=1": "sft.recipe",
    "data.sources.a.fles=[x]": "files",
    "sft.recipe={step: 3}": "steps",
    "sft={recpie: {steps: 3}}": "recipe",
    "at.64={sft: {recpie: {steps: 3}}}": "sft.recipe",
    "hydra.run.dir=x": "name",
    "resolutions[0]=64": "resolutions",
}


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("typo", TYPOS)
def test_unknown_keys_are_refused_with_the_nearest(plus, typo, capsys):
    assert main([plus + typo]) == 2
    message = capsys.readouterr().err
    assert "there is no key" in message and TYPOS[typo] in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "argument",
    ["resolutions=[256,512", "sft.recipe={steps: 3", "=3", "seed", "--help=x", "~seed", "~seed=1", "+", "seed=", "at=[",
     "at.512=3", "sft=3", "resolutions=[[128]]", "name=???", "data=photos", "data={kind: shapes}", "experiment=vargpt",
     "data.sources.a=3", "sft.recipe.steps=${no.such}", "data.captions=${", "stages=[align", "data@x=captioned",
     "reward.options=3", "seed=choice(1,2)", "seed='1", "reward.options.a={b: [}", "sft.recipe.lr=1e", "at.512.at.64=1",
     "sft.recipe.lr=[1e-4]"],
)  # fmt: skip
def test_bad_syntax_is_one_line(argument, capsys):
    assert main([argument]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not re.search(r"antlr|Lexer|viable|hydra\.cc|Traceback|Config search path", message)


ODD = ["/home/李明/c.jsonl", "/runs/epoch=9-step=3/c.jsonl", "/set (v2)/c.jsonl", "/a,b/c.jsonl", "/it's/c.jsonl",
       "/a#b/c.jsonl", "/a[x]/c.jsonl", "~/c.jsonl", "C:\\data\\c.jsonl", "/a{b}/c", "/a:b/c", "/a b/c", '/a"b/c', 
       "/$a/c", "/100%/c", "null/c", "/a;b&c|d", "/😀/ü.jsonl", "[a]", "/a/*.jsonl", "/back\\", "true",
       "1e3"]  # fmt: skip


@pytest.mark.parametrize("path", ODD)
def test_paths_are_taken_as_written(path):
    config = load_config([*CAPTIONED, f"data.captions={path}", f"runs={path}", f"+reward.options.model={path}"])
    assert config.data.captions == path and config.runs == path
    if path not in ("[a]", "true", "1e3"):  # free values are read as numbers and lists where they look like them
        assert config.reward.options == {"model": path}


@pytest.mark.parametrize(
    "name", ["2024_01", "1.10", "1e3", "true", "0012", "1_000", "0x10", "None", "a,b", "a=b", "li's", "nan", "李", "#1"]
)
def test_names_are_taken_as_written(name):
    assert load_config([f"name={name}"]).directory.name == name


def test_lists_of_texts_are_taken_as_written():
    given = ["data=records", "preference.prompts=p", "preference.winners=w"]
    given += ["data.sources.2024_01.files=['/a,b/1.jsonl',/home/李明/2=3.jsonl, /it's/#4.jsonl]"]
    config = load_config([*given, "+data.sources.b={files:[0012.jsonl]}"])
    sources = config.data.records()
    assert sources["2024_01"].files == ["/a,b/1.jsonl", "/home/李明/2=3.jsonl", "/it's/#4.jsonl"]
    assert sources["b"].files == ["0012.jsonl"]


def test_null_and_quotes_are_as_in_hydra():
    config = load_config(["name=null", "reward.path='rewards.technical:sharpness'", "learner.save_every=null"])
    assert (config.name, config.reward.path, config.learner.save_every) == (None, "rewards.technical:sharpness", None)


def test_only_stages_that_run_are_compared():
    odd = ["learner.ranks=3", "sft.recipe.batch=48", "dpo.recipe.batch=48", "dpo.recipe.micro_batch=16"]
    small = [f"at.{pixels}.{stage}.recipe.{key}={value}" for pixels in (256,) for stage in ("sft", "dpo")
             for key, value in (("batch", 48), ("micro_batch", 16))]  # fmt: skip
    odd.append("align.methods=[dpo]")
    config = load_config(["stages=[align]", *odd, *small])
    assert config.learner.ranks == 3 and config.pretrain.recipe.batch == 16
    with pytest.raises(ValueError, match="pretrain.recipe: batch=16"):
        load_config(["stages=[pretrain,align]", *odd, *small])
    assert load_config(["at.512.sft.recipe.batch=7"]).resolutions == [128, 256]
    with pytest.raises(ValueError, match="at.256: sft.recipe: batch=7"):
        load_config(["at.256.sft.recipe.batch=7"])
    assert load_config(["stages=[pretrain]", "dpo.min_pairs=1"]).dpo.min_pairs == 1
    assert load_config(["align.methods=[dpo]", "rl.recipe.batch=1"]).rl.recipe.batch == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["align.methods=[ppo]"], "align.methods=['ppo']: ppo: expected one of dpo, "),
        (["align.methods=[grpo]", "reward.path=null"], "grpo needs reward.path=... or the method reward before it"),
        ([*RL, "rl.group=1"], "rl.group=1: expected 2 or more"),
        ([*RL, "rl.credit_scales=40"], "rl.credit_scales=40: expected 1 to "),
        (["dpo.credit_scales=40"], "dpo.credit_scales=40: expected 1 to "),
        ([*RL, "rl.credit_alpha=-0.1"], "rl.credit_alpha=-0.1: expected 0 or more"),
        ([*RL, "rl.staleness=1", "placement=colocated"], "rl.staleness=1 is for placement=split"),
        ([*RL, "rl.recipe.batch=7"], "rl.recipe: batch=7"),
        ([*RL, "rl.prompts=100"], "rl.recipe.batch=64: expected at least rl.prompts x rl.group = 800"),
        (["align.methods=[grpo,grpo]", *RL[1:]], "each at most once"),
        (["understanding.drawing_share=0.01"], "understanding.drawing_share=0.01: that is 0 of"),
        (["stages=[align,align]"], "each at most once"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, named, capsys):
    assert main(settings) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1


def test_words_are_those_of_the_libraries():
    from transformers import SchedulerType
    from trl import DPOConfig

    assert {scheduler.value for scheduler in SchedulerType} >= set(SCHEDULES)
    assert DPOConfig(loss_type=list(LOSS_TYPES), report_to=[], use_cpu=True, bf16=False).loss_type == list(LOSS_TYPES)

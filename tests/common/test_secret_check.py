"""A secret among the settings is refused by its key, and never repeated."""

import pytest
from omegaconf import OmegaConf

from configs.load import load_config
from vargpt_rl.common.command import load_command
from vargpt_rl.common.secret_check import check_secrets, check_shell
from vargpt_rl.launch import SlurmJob

SECRET = "open-sesame-4711"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("SERVICE_API_KEY", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "red")
    monkeypatch.setenv("SOME_FOLDER", "/data/folder")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+reward.options.api_key=abc", "reward.options.api_key"),
        ("+reward.options.HF_TOKEN=abc", "reward.options.HF_TOKEN"),
        ("+reward.options={headers:{Authorization:abc}}", "reward.options.headers.Authorization"),
        ("+preference.options={sources:[{password:abc}]}", "preference.options.sources.password"),
        ("+reward.options.url=https://me:abc@host/score", "reward.options.url"),
        (f"+reward.options.text=x{SECRET}", "reward.options.text"),
        ("+reward.options.text=${oc.env:SERVICE_API_KEY}", "reward.options.text"),
        (f"checkpoint={SECRET}", "checkpoint"),
        ("+reward.options.text=hf_" + "a" * 34, "reward.options.text"),
        ("reward.no_such.api_key=abc", "reward.no_such.api_key"),  # which Hydra would repeat
        (f"reward.no_such={SECRET}", "reward.no_such"),
        (f"reward.path={SECRET}}}{{", "reward.path"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(override, key):
    with pytest.raises(ValueError, match="expected it in the environment alone") as raised:
        load_config([override])
    assert str(raised.value).startswith(f"{key}: ")
    assert SECRET not in str(raised.value) and "abc" not in str(raised.value).replace(key, "")
    assert "a" * 34 not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("+reward.options.api_key_env=SERVICE_API_KEY", "reward.options.api_key_env", "SERVICE_API_KEY"),
        ("+reward.options.api_key=null", "reward.options.api_key", None),
        ("+reward.options.max_tokens=5", "reward.options.max_tokens", 5),
        ("+reward.options.text='a red circle'", "reward.options.text", "a red circle"),
        ("+reward.options.url=https://host:8000/score", "reward.options.url", "https://host:8000/score"),
        ("reward.path=my.token:Reward", "reward.path", "my.token:Reward"),
        (
            "data.captions='${oc.env:SOME_FOLDER}/token=1/password.jsonl'",
            "data.captions",
            "/data/folder/token=1/password.jsonl",
        ),
    ],
)
def test_other_settings_arrive(override, key, value):
    found = OmegaConf.structured(load_config([override]))
    assert OmegaConf.select(found, key) == value


@pytest.mark.parametrize("argument", ["python=" + SECRET, "api_key=abc", "no.password=abc"])
def test_the_small_programs_refuse_them_too(argument):
    with pytest.raises(ValueError, match="expected it in the environment alone") as raised:
        load_command(SlurmJob, [argument])
    assert SECRET not in str(raised.value) and "abc" not in str(raised.value)


def test_the_values_are_those_of_nested_lists_too():
    check_secrets({"a": [{"b": 1}, None, 2.0, "red"]}, "")
    with pytest.raises(ValueError, match=r"^a\.token: "):
        check_secrets({"a": [{"token": "x"}]}, "")


@pytest.mark.parametrize(
    "code", ["export HF_TOKEN=abc", 'WANDB_API_KEY="abc" x', f"echo {SECRET}", "--export=MY_SECRET=a"]
)
def test_a_jobs_shell_code_has_none(code):
    with pytest.raises(ValueError) as raised:
        SlurmJob(setup=code)
    assert "abc" not in str(raised.value) and SECRET not in str(raised.value)


def test_a_jobs_shell_code_may_name_where_they_are():
    for code in ("source ~/.tokens", 'export HF_TOKEN="$(cat ~/.hf)"', "export TMPDIR=/tmp", "export A_KEY=$B", ""):
        check_shell("setup", code)

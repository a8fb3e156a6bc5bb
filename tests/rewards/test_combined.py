"""Several rewards in one: the sum, the checks before anything starts, and the processes that may fail."""

import json
import os
import pickle
import signal
import sys
import time
import venv
from pathlib import Path

import pandas as pd
import psutil
import pytest
import ray
from PIL import Image
from ray.exceptions import RayActorError

import rewards.combined
from configs.load import load_config
from rewards.combined import KeptRewards, RewardsLostError, WeightedSum, scorers, weighted_sum
from rewards.preferences import reward_gated
from rewards.processes import MAX_RESTARTS, RewardTerm
from rewards.total import Total
from tests.helpers.driver import WorkersDouble, stage_context
from vargpt_rl.data.rollouts import Rollouts
from vargpt_rl.data.samples import Prompt, Sample, Winner
from vargpt_rl.driver.inputs import gather
from vargpt_rl.driver.judging import judge_rollouts
from vargpt_rl.driver.pairs import write_pairs

PLUGIN = """
import os
import time

def moody(images, prompts):
    prompt = prompts[0]
    if prompt == "hang":
        time.sleep(600)
    if prompt == "spin":
        while True:
            pass
    if prompt == "die":
        os._exit(1)
    if prompt == "raise":
        raise ValueError("a bad mood")
    return {"nan": [float("nan")], "none": [None], "long": [1.0, 2.0]}.get(prompt, [float(len(prompt))] * len(prompts))

def width(images, prompts):
    return [float(image.width) for image in images]

def pid(images, prompts):
    return [float(os.getpid())] * len(images)

class Fixed:
    def __init__(self, value):
        self.value = value

    def __call__(self, images, prompts):
        return [self.value] * len(images)

class Silent:
    pass

class Unloadable:
    def __init__(self):
        raise OSError("no weights here")

    def __call__(self, images, prompts):
        return [1.0] * len(images)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("plugin") / "mine.py"
    file.write_text(PLUGIN)
    return file


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def term(**settings) -> RewardTerm:
    return RewardTerm("m:f", **settings)


def images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (10 + i, 8)) for i in range(count)]


def test_the_sum_is_weighted_and_knows_its_terms():
    terms = {"a": term(weight=2.0), "b": term(weight=-0.5)}
    total = weighted_sum({"a": 1.5, "b": 4.0}, terms)
    assert total == 1.0 and total.terms == {"a": 1.5, "b": 4.0}
    again = pickle.loads(pickle.dumps(total))
    assert (again, again.terms) == (total, total.terms) and isinstance(again, Total)


def test_missing_terms_in_a_weighted_sum():
    terms = {"a": term(weight=1.0), "b": term(weight=3.0, required=False)}
    assert weighted_sum({"a": None, "b": 1.0}, terms) is None
    assert weighted_sum({"a": 0.5, "b": None}, terms) == 2.0  # the weight of all is 4
    assert weighted_sum({"b": None}, {"b": terms["b"]}) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": "FILE:twos"}, "has no 'twos'"),
        ({"path": "nowhere.py:f"}, "there is no file"),
        ({"path": "FILE:Silent"}, r"Silent cannot be called: give the class a method __call__"),
        ({"path": "FILE:Fixed"}, "missing a required argument: 'value'"),
        ({"path": "FILE:Fixed", "options": {"size": 1}}, "the options given are {'size': 1}"),
        ({"path": "FILE:width", "options": {"size": 1}}, "takes no options"),
        ({"path": "FILE:width", "wieght": 1}, "wieght"),
        ({"path": "FILE:width", "weight": "heavy"}, "heavy"),
        ({"path": "FILE:width", "weight": 0}, "weight=0"),
        ({"path": "FILE:width", "timeout_s": 0}, "timeout_s=0"),
        ({"path": "FILE:width", "python": "/no/python"}, "python=/no/python: there is no such file"),
        ({"path": "FILE:twos", "python": sys.executable}, "has no 'twos'"),
        ({"path": "FILE:width", "python": "/bin/false"}, "/bin/false: exit code 1"),
        ({"weight": 1}, "path"),
    ],
)
def test_a_bad_term_is_named_in_one_line(plugin, fields, said):
    fields = {key: v.replace("FILE", str(plugin)) if isinstance(v, str) else v for key, v in fields.items()}
    with pytest.raises(ValueError, match=said) as raised:
        WeightedSum({"good": {"path": f"{plugin}:width"}, "looks": fields})
    assert str(raised.value).startswith("reward.options.terms.looks: ")
    assert len(str(raised.value).splitlines()) == 1


def test_terms_are_checked_before_a_run(plugin, tmp_path):
    settings = [f"runs={tmp_path}", "reward.path=rewards.combined:WeightedSum"]
    good = [f"+reward.options.terms.fixed.path={plugin}:Fixed", "+reward.options.terms.fixed.options.value=2"]
    more = [f"+reward.options.terms.wide.path={plugin}:width", "+reward.options.terms.wide.required=false"]
    terms = gather(load_config([*settings, *good, *more])).reward.terms
    assert terms["fixed"].options == {"value": 2} and terms["fixed"].required and not terms["wide"].required
    for bad, said in {
        f"+reward.options.terms.fixed.path={plugin}:Fixed": "terms.fixed: Fixed.*missing a required argument: 'value'",
        "+reward.options.sum=3": "WeightedSum.*missing a required argument: 'terms'",
    }.items():
        with pytest.raises(ValueError, match=said):
            gather(load_config([*settings, bad]))


def test_no_terms_are_an_error():
    with pytest.raises(ValueError, match="terms is empty"):
        WeightedSum({})


def test_failures_are_counted_and_stay_separate(cluster, plugin):
    moods = ["fine", "raise", "hang", "nan", "none", "die", "long", "fine"]
    reward = WeightedSum(
        {
            "mood": {
                "path": f"{plugin}:moody",
                "required": False,
                "timeout_s": 4,
                "batch_size": 1,
                "retries": 0,
            },
            "width": {"path": f"{plugin}:width", "weight": 3.0, "batch_size": 3},
        }
    )
    with scorers(reward) as live:
        totals, report = live(images(8), moods), live.report()
    assert [t.terms for t in totals] == [
        {"width": 10.0 + i} | ({"mood": 4.0} if mood == "fine" else {}) for i, mood in enumerate(moods)
    ]
    assert totals[0] == 4.0 + 30.0 and totals[1] == 4 * 11.0
    assert report["width"]["scored"] == 8 and report["width"]["mean"] == 13.5 and not report["width"]["unscored"]
    mood = report["mood"]
    assert mood["unscored"] == {
        "raised ValueError": 1,
        "timeout": 1,
        "not finite": 1,
        "returned None": 1,
        "process died": 1,
        "wrong length": 1,
    }
    assert (mood["scored"], mood["mean"], mood["restarts"]) == (2, 4.0, 2)
    assert mood["errors"]["raised ValueError"] == "a bad mood"
    assert mood["errors"]["timeout"] == "no answer in 4 s"
    assert mood["errors"]["wrong length"] == "2 values for 1 images"
    json.dumps(report)


def test_a_hanging_reward_is_given_up(cluster, plugin):
    hanging = {"path": f"{plugin}:moody", "timeout_s": 1, "retries": 1, "batch_size": 2}
    reward = WeightedSum({"hangs": hanging, "width": {"path": f"{plugin}:width"}, "pid": {"path": f"{plugin}:pid"}})
    with scorers(reward) as live:
        assert live(images(6), ["spin"] * 6) == [None] * 6  # it is required
        report = live.report()
        assert live(images(6), ["spin"] * 6) == [None] * 6
        later = live.report()
        pid = int(report["pid"]["mean"])
    assert report["hangs"]["restarts"] == later["hangs"]["restarts"] == MAX_RESTARTS
    assert report["hangs"]["unscored"] == {"timeout": 4, f"given up after {MAX_RESTARTS} restarts": 2}
    assert later["hangs"]["seconds"] - report["hangs"]["seconds"] < 1
    assert report["width"]["seconds"] < report["hangs"]["seconds"] and report["width"]["scored"] == 6
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the process of a reward outlives its use"
        time.sleep(0.1)


def test_a_single_reward_has_its_own_process(cluster, plugin):
    def pids(images, prompts):
        return [float(os.getpid())] * len(images)

    with scorers(pids) as live:
        values = live(images(3), ["a", "b", "c"])
        assert live([], []) == []
    assert len(set(values)) == 1 and values[0] != os.getpid()

    with scorers(WeightedSum({"bad": {"path": f"{plugin}:Unloadable", "retries": 0}})) as live:
        assert live(images(2), ["a", "b"]) == [None, None]
        report = live.report()["bad"]
    assert report["unscored"] == {"did not start": 2}
    assert report["errors"] == {"did not start": "raised OSError: no weights here"}


def test_kept_rewards_stay_loaded_and_report_each_use(cluster, plugin):
    kept, reward = KeptRewards(), WeightedSum({"pid": {"path": f"{plugin}:pid"}})
    first, second = kept.use(reward), kept.use(reward)
    pids = first(images(3), ["a"] * 3)
    assert second(images(3), ["a"] * 3) == pids
    third = kept.use(reward)
    third(images(2), ["a"] * 2)
    assert [live.report()["pid"]["scored"] for live in (first, second, third)] == [8, 8, 2]
    ray.kill(first.server)
    with pytest.raises(RayActorError):
        ray.get([first.server.stats.remote() for _ in range(100)])  # the kill takes a moment
    again = kept.use(reward)
    assert again(images(3), ["a"] * 3) != pids and again.report()["pid"]["scored"] == 3
    ray.kill(again.server)


def test_a_reward_that_was_given_up_is_tried_at_its_next_use(cluster, plugin):
    kept = KeptRewards()
    reward = WeightedSum({"moody": {"path": f"{plugin}:moody", "timeout_s": 5, "retries": 0, "batch_size": 1}})
    live = kept.use(reward)
    assert live(images(6), ["die"] * 6) == [None] * 6
    assert live.report()["moody"]["unscored"] == {"process died": 4, f"given up after {MAX_RESTARTS} restarts": 2}
    live = kept.use(reward)
    assert live(images(2), ["fine"] * 2) == [4.0, 4.0]
    assert live.report()["moody"]["unscored"] == {} == live.report()["moody"]["errors"]
    ray.kill(live.server)


def test_a_reward_in_a_separate_environment(cluster, tmp_path):
    venv.create(tmp_path / "env", symlinks=True)
    packages = next((tmp_path / "env").glob("lib/python*/site-packages"))
    own = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in own))
    (packages / "only_here.py").write_text("VALUE = 7.0\n")
    (tmp_path / "mine.py").write_text(
        "import only_here\n\ndef seven(images, prompts):\n    return [only_here.VALUE] * len(images)\n"
    )
    fields = {"path": f"{tmp_path}/mine.py:seven"}
    with pytest.raises(ValueError, match=r"terms\.own: No module named 'only_here'"):
        WeightedSum({"own": fields})
    reward = WeightedSum({"own": fields | {"python": str(tmp_path / "env/bin/python")}})
    with scorers(reward) as live:
        assert live(images(2), ["a", "b"]) == [7.0, 7.0], live.report()


class ScoringPool(WorkersDouble):
    """Stands in for the workers: images are as wide as their bits say."""

    def reward(self, items, resolution, reward):
        return reward([Image.new("RGB", (bits[0], 8)) for _, bits in items], [prompt.text for prompt, _ in items])


def test_unscored_images_are_reported(cluster, plugin, tmp_path):
    context = stage_context(tmp_path, pool=ScoringPool())
    prompts = [Prompt("a", "raise"), Prompt("b", "fine")]
    samples = [Sample(prompt, bytes([8]), 32, seed, {}, 1, "c") for seed, prompt in enumerate(prompts)]
    rollouts = Rollouts(samples, {prompt.id: Winner(prompt, b"\x40", 32, "key") for prompt in prompts})
    mood = {"path": f"{plugin}:moody", "batch_size": 1, "retries": 0}
    reward = WeightedSum({"mood": mood, "width": {"path": f"{plugin}:width"}})
    rewards, report = judge_rollouts(context, rollouts, reward, "all")
    counts = write_pairs(context, context.table(), rollouts, reward_gated, rewards, 2)
    assert (counts["built"], counts["dropped_by_reason"]) == (1, {"reward not scored": 1})
    assert report["mood"]["unscored"] == {"raised ValueError": 2}
    assert report["width"] | {"seconds": 0} == {
        "scored": 4, "mean": 36.0, "seconds": 0, "restarts": 0, "unscored": {}, "errors": {}
    }  # fmt: skip
    assert pd.read_parquet(context.table()).chosen_reward.item() == 68.0
    lines = [json.loads(line) for line in (context.run.directory / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"]: line.get("unscored/raised ValueError") for line in lines} == {
        "reward/mood": 2,
        "reward/width": None,
    }
    with pytest.raises(ValueError, match="none of 1 images was scored by the reward.*a bad mood"):
        judge_rollouts(context, Rollouts(samples[:1], {}), reward, "first")


def test_a_stopped_server_is_noticed_and_started_again(cluster, plugin, monkeypatch):
    monkeypatch.setattr(rewards.combined, "ANSWER_S", 4.0)
    kept, reward = KeptRewards(), WeightedSum({"width": {"path": f"{plugin}:width"}})
    live = kept.use(reward)
    assert live(images(2), ["a", "b"]) == [10.0, 11.0]
    servers = [each for each in psutil.Process().children(recursive=True) if "RewardServer" in " ".join(each.cmdline())]
    server = max(servers, key=psutil.Process.create_time)
    server.send_signal(signal.SIGSTOP)
    for use in (live.renewed, lambda: live(images(1), ["a"])):
        with pytest.raises(RewardsLostError, match="the server of rewards did not answer in 4 s"):
            use()
    again = kept.use(reward)
    assert again(images(1), ["a"]) == [10.0] and again.report()["width"]["scored"] == 1
    psutil.wait_procs([server], timeout=20)
    assert not server.is_running()
    ray.kill(again.server)
    with pytest.raises(RewardsLostError, match="the server of rewards died"):
        again(images(1), ["a"])

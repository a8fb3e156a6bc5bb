"""The planned steps are those that a run takes."""

import pytest

from tests.helpers.driver import stage_context
from vargpt_rl import loop
from vargpt_rl.driver.plan import planned_steps
from vargpt_rl.driver.session import StageContext
from vargpt_rl.loop import execute

REWARD = "reward.path=rewards.shapes:shapes_reward"
RUNS = [
    [],
    ["stages=[pretrain,understanding,align,edit]", "resolutions=[32,48]", "iterations=3"],
    ["stages=[tokenizer,pretrain]"],
    ["dpo.control=false", "stages=[align]"],
    ["align.methods=[dpo,grpo]", REWARD],
    ["align.methods=[grpo]", "align.sft=false", REWARD],
    ["align.methods=[reward,grpo]"],
    ["align.methods=[dpo,reward]"],
    ["resolutions=[32,48]", "iterations=2", "at.48.dpo.control=false", "at.48.align.methods=[grpo]", REWARD],
]


@pytest.mark.parametrize("settings", RUNS, ids=" ".join)
def test_a_run_takes_the_planned_steps(settings, tmp_path, monkeypatch):
    taken = []

    def record(self, step, work, *args):
        taken.append("/".join(filter(None, [self.name, step])))
        return {"accuracy": 0.5}

    monkeypatch.setattr(StageContext, "step", record)
    monkeypatch.setattr(loop, "export_model", lambda *_: None)
    session = stage_context(tmp_path, *settings).session
    execute(session)
    weights = planned_steps(session.config)
    assert list(dict.fromkeys(taken)) == list(weights)
    assert all(weight >= 0 for weight in weights.values()) and sum(weights.values()) > 0

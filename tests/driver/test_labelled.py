"""Pairs that people label: proposed with their images, waited for, turned as people say, every sample accounted for."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pytest

from rewards.total import Total
from tests.helpers.driver import WorkersDouble, stage_context
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl import loop
from vargpt_rl.common.plugins import BUILDER, make_plugin
from vargpt_rl.data.preferences import read_table
from vargpt_rl.driver import labelled
from vargpt_rl.driver.judging import judge
from vargpt_rl.driver.labelled import LabelsNeeded, labels_missing, pair_labelled, propose
from vargpt_rl.driver.sampling import sample
from vargpt_rl.driver.session import StageContext, Step
from vargpt_rl.page.contents import read_run
from vargpt_rl.page.labels import Label, add_label, labelled_pairs, summarise_labels
from vargpt_rl.storage.checkpoint import Policy

HUMAN = "rewards.preferences:human"
POLICY = Policy("", (labelled.Path("run/sft/final"),))


class SeedWorkers(WorkersDouble):
    """Images are worth their first byte."""

    def reward(self, items, resolution, rewards):
        return [float(bits[0]) for _, bits in items]


@pytest.fixture
def context(tmp_path, monkeypatch):
    """Iteration 0 with four prompts of two samples each, sampled and judged."""
    monkeypatch.setattr(labelled, "describe_pairs", lambda context: None)
    monkeypatch.setattr(StageContext, "swap_to", lambda self, policy: {})
    settings = [f"preference.builder={HUMAN}", "preference.samples=2", "preference.count=4", "sft.recipe.steps=4"]
    made = stage_context(tmp_path, *settings, pool=SeedWorkers(), builder=make_plugin(HUMAN, {}, BUILDER))
    live = SimpleNamespace(report=dict)
    live.renewed = lambda: live
    made.session.rewards.use = lambda reward: live
    rewarded = replace(made.inputs, reward=lambda images, prompts: None)
    made = replace(made, session=replace(made.session, inputs=rewarded))
    made.step(Step.SAMPLE, sample, POLICY)
    made.step(Step.JUDGE, judge)
    return made


def answer(context, *winners, rater="ada"):
    for pair_id, winner in zip(read_table(context.table("candidates")).pair_id, winners, strict=False):
        add_label(
            context.run.directory,
            Label(
                pair_id=pair_id, stage=context.name, winner=winner, rater=rater, seconds=1, flipped=False, again=False
            ),
        )


def test_a_run_waits_until_people_have_answered(context):
    assert context.step(Step.PROPOSE, propose, POLICY) == {"proposed": 4}
    with pytest.raises(LabelsNeeded) as waiting:
        context.step(Step.PAIR, pair_labelled, POLICY, {})
    run = context.run.directory
    assert str(waiting.value) == (
        f"4 of 4 pairs of iter-00 wait for labels: vargpt-rl pairs {run}; then resume: vargpt-rl resume {run}"
    )
    assert not context.is_done(Step.PAIR) and labels_missing(run, "iter-00", 0.5).startswith("2 of 4")
    contents = read_run(run)
    assert contents.waits_for_labels and len(labelled_pairs(contents)) == 4
    assert all(contents.pair_images("iter-00", row.pair_id, "candidates")[0] for _, row in labelled_pairs(contents))
    assert summarise_labels(contents) == [f"when all are labelled, resume: vargpt-rl resume {run}"]
    answer(context, "chosen", None)
    assert labels_missing(run, "iter-00", 0.5) == "", "a skipped pair is answered"


def test_a_share_is_not_rounded_up_by_its_floats(monkeypatch):
    """0.1 x 30 is 3.0000000000000004 in floats."""
    answered = [SimpleNamespace(pair_id=str(i)) for i in range(3)]
    monkeypatch.setattr(labelled, "all_labels", lambda run: {"ada": answered})
    monkeypatch.setattr(labelled.pq, "read_table", lambda path, columns: pa.table({"pair_id": map(str, range(30))}))
    assert labels_missing(labelled.Path("run"), "iter-00", 0.1) == ""


def test_people_decide_which_image_is_chosen(context):
    context.step(Step.PROPOSE, propose, POLICY)
    proposed = read_table(context.table("candidates")).set_index("pair_id")
    answer(context, "chosen", "rejected", "alike", "bad")
    result = context.step(Step.PAIR, pair_labelled, POLICY, {"term": {}})
    built = read_table(context.table()).set_index("pair_id")
    first, second = proposed.index[:2]
    assert set(built.index) == {first, second}
    assert built.loc[first].chosen_seed == proposed.loc[first].chosen_seed
    assert built.loc[second].chosen_seed == proposed.loc[second].rejected_seed
    assert built.loc[second].chosen_reward == proposed.loc[second].rejected_reward
    assert result["dropped_by_reason"] == {"people: alike": 2, "people: both bad": 2}
    assert (result["built"], result["dropped"], result["raters"]) == (2, 4, 1) and result["rewards"] == {"term": {}}
    margins = built.chosen_reward - built.rejected_reward
    ahead = (margins > 0).sum() + 0.5 * (margins == 0).sum()
    assert result["people"]["reward"]["right"] == ahead and result["people"]["reward"]["n"] == 2
    contents = read_run(context.run.directory)
    assert not contents.waits_for_labels and "the reward prefers" in summarise_labels(contents)[-1]


def test_terms_and_judge_are_compared_with_people(context, monkeypatch):
    def reward(self, items, resolution, rewards):
        return [Total(float(bits[0]), {"sharp": -float(bits[0])}) for _, bits in items]

    monkeypatch.setattr(SeedWorkers, "reward", reward)
    judged = replace(context.inputs, judge=lambda images, prompts: None)
    context = replace(context, session=replace(context.session, inputs=judged))
    judge(context)
    context.step(Step.PROPOSE, propose, POLICY)
    answer(context, *["chosen"] * 4)
    people = context.step(Step.PAIR, pair_labelled, POLICY, {})["people"]
    assert set(people) == {"reward", "sharp", "judge"} and people["reward"]["right"] == people["judge"]["right"]
    told = [line for line in summarise_labels(read_run(context.run.directory)) if "prefers the image" in line]
    assert [line.split(" prefers")[0] for line in told] == ["the reward", "the reward's term sharp", "the judge"]
    for line, found in zip(told, (people[name] for name in ("reward", "sharp", "judge")), strict=True):
        assert f"in {found['right']:g} of {found['n']} pairs" in line


def test_people_without_any_preference_are_an_error(context):
    context.step(Step.PROPOSE, propose, POLICY)
    answer(context, *["alike"] * 4)
    with pytest.raises(ValueError, match="people prefer neither image of any of 4 pairs"):
        context.step(Step.PAIR, pair_labelled, POLICY, {})


def test_the_iteration_asks_between_judging_and_pairing(context, monkeypatch):
    asked = []
    monkeypatch.setattr(StageContext, "step", lambda self, step, work, *args: asked.append(step) or {})
    loop.align(context, Policy(""))
    assert asked[4:9] == ["sample", "judge", "propose", "pair", "dpo"]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Run the loop without a cluster, up to what ``execute`` does."""
    tiny_checkpoint(tmp_path / "model")
    settings = [f"runs={tmp_path}", "name=run", f"checkpoint={tmp_path}/model", "resolutions=[32]", "iterations=1"]
    settings += [f"preference.builder={HUMAN}", "preference.samples=2", "tracking.wandb=disabled", "stages=[align]"]
    for name in ("connect", "place", "open_session"):
        monkeypatch.setattr(loop, name, lambda *given: None)

    def start(execute):
        monkeypatch.setattr(loop, "execute", execute)
        return loop.start(settings)

    return start


def test_a_run_that_waits_ends_with_75_and_the_commands(started, capsys):
    def stop(session):
        raise LabelsNeeded("4 pairs wait for labels: vargpt-rl pairs RUN; then resume: vargpt-rl resume RUN")

    assert started(stop) == os.EX_TEMPFAIL
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "vargpt-rl pairs RUN" in line] and "Traceback" not in out


def test_a_resumed_run_that_still_waits_starts_no_cluster(started, monkeypatch, capsys):
    monkeypatch.setattr(loop, "connect", lambda: pytest.fail("a cluster was started"))
    monkeypatch.setattr(loop, "waits_for_labels", lambda config, run: "4 pairs wait for labels")
    assert started(None) == os.EX_TEMPFAIL and "wait for labels" in capsys.readouterr().out

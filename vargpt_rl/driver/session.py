"""A run under way, and one stage of it: what every function of the driver is given.

`Session` holds what lasts for the whole run: settings, inputs, the run directory, rollout workers, learner ranks.
`StageContext` is one stage or iteration: its name, its resolution and the settings in force there. Both are immutable;
what changes during a run is on disk (`vargpt_rl.driver.run`) or in the workers (`vargpt_rl.driver.weights`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from actors.pool import RolloutPool
from configs.schema import LoopConfig
from learners.checkpoints import prune
from learners.group import LearnerGroup
from learners.jobs import training_checkpoints
from rewards.combined import KeptRewards
from vargpt_rl.data.sources import Source
from vargpt_rl.driver.inputs import Inputs
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.weights import WeightSync
from vargpt_rl.storage.checkpoint import Policy


class Step(StrEnum):
    """Steps of an iteration, in order: their names in ``state.json``, in folders and in the summary.

    ENCODE, of pairs that came from files, replaces SAMPLE and JUDGE. PROPOSE asks people about pairs. An online method
    M (`learners.methods`) adds M, M_swap and after_M before the grid.
    """

    BEFORE = "before"
    SFT = "sft"
    SFT_SWAP = "sft_swap"
    ENCODE = "encode"
    AFTER_SFT = "after_sft"
    SAMPLE = "sample"
    JUDGE = "judge"
    PROPOSE = "propose"
    PAIR = "pair"
    DPO = "dpo"
    CONTROL = "control"
    CONTROL_SWAP = "control_swap"
    AFTER_CONTROL = "after_control"
    DPO_SWAP = "dpo_swap"
    AFTER_DPO = "after_dpo"
    REWARD = "reward"
    GRID = "grid"


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything a run works with. ``text`` answers in words instead of ``pool``, if there is one."""

    config: LoopConfig
    inputs: Inputs
    run: Run
    pool: RolloutPool
    text: RolloutPool | None
    weights: WeightSync
    learners: LearnerGroup
    rewards: KeptRewards = field(default_factory=KeptRewards)

    def iteration(self, index: int) -> "StageContext":
        """Enter an iteration; those beyond the last resolution repeat it."""
        return self._enter(f"iter-{index:02d}", self.config.resolution_of(index), index)

    def stage(self, name: str, resolution: int) -> "StageContext":
        """Enter a stage outside the iterations."""
        return self._enter(name, resolution, None)

    def _enter(self, name: str, resolution: int, iteration: int | None) -> "StageContext":
        config = self.config.at_resolution(resolution)
        self.pool.config = config.rollout  # the workers' batch size may depend on the resolution
        return StageContext(session=self, name=name, resolution=resolution, config=config, iteration=iteration)


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """One stage or iteration of a run.

    ``config`` holds the settings in force at ``resolution`` (pixels a side); ``iteration`` is None outside the
    iterations.
    """

    session: Session
    name: str
    resolution: int
    config: LoopConfig
    iteration: int | None

    @property
    def run(self) -> Run:
        """The run directory."""
        return self.session.run

    @property
    def inputs(self) -> Inputs:
        """The run's inputs."""
        return self.session.inputs

    @property
    def source(self) -> Source:
        """The run's data source."""
        return self.session.inputs.source

    @property
    def pool(self) -> RolloutPool:
        """The rollout workers."""
        return self.session.pool

    @property
    def writer(self) -> RolloutPool:
        """The workers that answer in words."""
        return self.session.text or self.session.pool

    @property
    def index(self) -> int:
        """The iteration's number; 0 outside the iterations."""
        return self.iteration or 0

    def step(self, step: str, work: Callable[..., dict], *args: Any) -> dict:
        """Return the result of ``work(self, *args)``: from the run's record if the step is done, else by doing it.

        A stage's own training is the step "".
        """
        name = "/".join(filter(None, [self.name, step]))
        return self.run.step(name, lambda: work(self, *args))

    def is_done(self, step: str) -> bool:
        """Tell whether a step of this stage is recorded."""
        return f"{self.name}/{step}" in self.run.state["steps"]

    def swap_to(self, policy: Policy) -> dict:
        """Load ``policy`` into the workers; return version, bytes, seconds."""
        return self.session.weights.swap_to(policy, self.log)

    def log(self, stage: str, step: int, metrics: Mapping[str, float | list[float] | None]) -> None:
        """Log metrics under this iteration and resolution."""
        self.run.log(stage, step, metrics, self.labels)

    @property
    def labels(self) -> dict[str, int | None]:
        """Iteration and resolution, which label metrics."""
        return {"iteration": self.iteration, "resolution": self.resolution}

    def checkpoint(self, step: str = "") -> Path:
        """Return the folder of a training step's weights; without a step, of the stage's own."""
        return self.run.directory / "checkpoints" / "-".join(filter(None, [self.name, step]))

    def adopt(self, policy: Policy, step: str = "") -> Policy:
        """Return ``policy`` with the final weights of a recorded training step applied."""
        self.drop_resume_state(step)
        return policy.plus(self.checkpoint(step) / "final")

    def drop_resume_state(self, step: str = "") -> None:
        """Delete the training checkpoints of a recorded step, except those that ``learner.keep_every`` keeps."""
        prune(training_checkpoints(self.checkpoint(step)), 0, self.config.learner.keep_every)

    def table(self, split: str = "") -> Path:
        """Return the path of this iteration's preference table; ``split`` "held-out" is for evaluation alone."""
        return self.run.directory / "preferences" / ("-".join(filter(None, [self.name, split])) + ".parquet")

    def scores(self, moment: str) -> Path:
        """Return the path of the held-out images' scores at a moment of this iteration."""
        return self.run.directory / "evaluations" / f"{self.name}-{moment}.jsonl"

    @property
    def states(self) -> Path | None:
        """The folder of the language model's states of this iteration's pairs; None if they are not stored."""
        return self.run.directory.resolve() / "states" / self.name if self.config.dpo.stored_states else None

    @property
    def rollouts(self) -> Path:
        """The folder of this iteration's samples, until its pairs are built."""
        return self.run.directory / "rollouts" / self.name

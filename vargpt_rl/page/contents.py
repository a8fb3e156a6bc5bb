"""Read a run directory for its page. What is missing or torn is left out; nothing is written."""

import base64
import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import yaml

from vargpt_rl.evaluate.paired import ScoredImage, read_scores
from vargpt_rl.page.plan import expected_steps, setting
from vargpt_rl.storage.images import CANDIDATES, PAIRS, images_folder, margins_path, pair_image
from vargpt_rl.storage.lock import HOLDER

CONFIG = "config.yaml"
DEFAULTS = "defaults.yaml"
"""Files of the settings of a run, and of the defaults of its version."""
QUIET_S = 600.0
"""Seconds without a new line of metrics after which a run on another machine counts as stopped."""
PAIR_COLUMNS = (
    "pair_id",
    "prompt",
    "chosen_source",
    "rejected_source",
    "chosen_reward",
    "rejected_reward",
    "reference_chosen_logp",
    "reference_rejected_logp",
)


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """One pair of an iteration's table whose images are kept."""

    pair_id: str
    prompt: str
    chosen_source: str
    rejected_source: str
    chosen_reward: float | None
    rejected_reward: float | None
    reference_chosen_logp: float
    reference_rejected_logp: float

    @property
    def reference_margin(self) -> float:
        """Reference log-probability of the chosen image less that of the rejected one, in nats."""
        return self.reference_chosen_logp - self.reference_rejected_logp

    @property
    def reward_margin(self) -> float | None:
        """Reward of the chosen image less that of the rejected one, if both have one."""
        if self.chosen_reward is None or self.rejected_reward is None:
            return None
        return self.chosen_reward - self.rejected_reward


def holder_lives(folder: Path) -> bool | None:
    """Tell whether the process that holds a run lives; None if it is on another machine, False if there is none."""
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return psutil.pid_exists(holder["pid"]) if holder["host"] == socket.gethostname() else None
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(kw_only=True)
class RunContents:
    """A run directory as read: settings, finished steps, events. Metrics and images are read when asked for."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    """The folder's name, if no other is given."""
    problems: list[str] = field(default_factory=list)
    """Files that could not be read or used, and why."""
    ended: bool = False
    """The process of the run says that it ends: what is not complete is stopped."""

    def __post_init__(self) -> None:
        self.name = self.name or self.folder.resolve().name

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics, which may be many: read when first asked for."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def steps(self) -> dict[str, dict]:
        """Results of the finished steps, in order."""
        return self.state.get("steps", {})

    @property
    def times(self) -> dict[str, list[float]]:
        """Begin and end of finished steps, in seconds since 1970, as far as recorded."""
        return self.state.get("times", {})

    def setting(self, key: str, kind: Any, missing: Any) -> Any:
        """Return the setting of a dotted key, or ``missing`` if it is not there, or of another type."""
        try:
            return setting(self.config, key, kind, missing)
        except ValueError as error:
            self._note(f"{self.folder / CONFIG}: {error}")
            return missing

    def setting_at(self, resolution: int | None, key: str, kind: Any, missing: Any) -> Any:
        """Return the setting of a dotted key that holds at a resolution: that of ``at``, else the general one."""
        return self.setting(f"at.{resolution}.{key}", kind, self.setting(key, kind, missing))

    @cached_property
    def planned(self) -> list[str] | None:
        """All steps of the run; None if the settings do not tell."""
        if self.state and not self.config:
            return None
        try:
            return expected_steps(self.config)
        except ValueError as error:
            self._note(f"{self.folder / CONFIG}: {error}")
            return None

    @cached_property
    def ahead(self) -> list[str]:
        """Steps that are still to be done, as far as the settings tell."""
        return [step for step in self.planned or [] if step not in self.steps]

    @cached_property
    def status(self) -> str:
        """complete, running, stopped or empty."""
        if self.summary:
            return "complete"
        if not self.state:
            return "empty"
        return "running" if not self.ended and self._is_held() else "stopped"

    def _is_held(self) -> bool:
        lives = holder_lives(self.folder)
        if lives is None:
            return bool(self.metrics) and time.time() - self.metrics[-1]["time"] < QUIET_S
        return lives

    @property
    def stages(self) -> list[str]:
        """Names of iterations and stages with finished steps, in order."""
        return list(dict.fromkeys(step.split("/")[0] for step in self.steps))

    def series(self, iteration: int | None, stage: str) -> list[dict[str, Any]]:
        """Return the metrics lines of a stage of an iteration; the last line of a step that was redone counts."""
        lines = [line for line in self.metrics if line.get("iteration") == iteration and line.get("stage") == stage]
        return list({line["step"]: line for line in lines}.values())

    def scores(self, stage: str, moment: str) -> list[ScoredImage]:
        """Return the scores of held-out images of a moment; empty if there are none, or they are damaged."""
        try:
            return read_scores(self.folder / "evaluations" / f"{stage}-{moment}.jsonl")
        except ValueError as error:
            self._note(str(error))
            return []

    def pairs(self, stage: str, limit: int, kind: str = PAIRS) -> list[PairRow]:
        """Return the pairs of an iteration whose images are kept, ``limit`` at most, else the first of its table.

        ``kind`` is `PAIRS`, or `CANDIDATES` for those that people are asked about.
        """
        path = self._table(stage, kind)
        if not path.exists():
            return []
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path, columns=list(PAIR_COLUMNS)).slice(0, limit).to_pylist()
        except (OSError, pa.ArrowException) as error:
            self._note(f"{path}: {error}")
            return []
        return [PairRow(**row) for row in rows]

    def _table(self, stage: str, kind: str) -> Path:
        return self.folder / "preferences" / (f"{stage}.parquet" if kind == PAIRS else f"{stage}-{kind}.parquet")

    def margins(self, stage: str, kind: str = PAIRS) -> dict[str, dict[str, float | None]]:
        """Return the margins of rewards on an iteration's pairs, by reward and pair id; older runs have none."""
        name = str(margins_path(self._table(stage, kind)).relative_to(self.folder))
        return _read(self, name, json.loads)

    def labelled_kind(self, stage: str) -> str:
        """Return which pairs of an iteration people label: those that it asks about, else those that it has."""
        return CANDIDATES if images_folder(self.folder, stage, CANDIDATES).is_dir() else PAIRS

    @property
    def waits_for_labels(self) -> bool:
        """Tell whether pairs are proposed to people and not yet built."""
        return any(f"{stage}/propose" in self.steps and f"{stage}/pair" not in self.steps for stage in self.stages)

    def pair_images(self, stage: str, pair_id: str, kind: str = PAIRS) -> tuple[str | None, str | None]:
        """Return the images of the chosen and the rejected side as data URIs; None where there is none."""
        folder = images_folder(Path(), stage, kind)
        chosen, rejected = (self.image(str(folder / pair_image(pair_id, side))) for side in ("chosen", "rejected"))
        return chosen, rejected

    def image(self, name: str | None) -> str | None:
        """Return an image file of the run as a data URI; None if there is none. Paths stay under the run directory."""
        if name is None:
            return None
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            return None
        kind = {".webp": "webp", ".png": "png"}[path.suffix]
        return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def read_run(folder: Path) -> RunContents:
    """Read a run directory. ValueError if it is no directory."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a run directory")
    run = RunContents(folder=folder)
    run.config = _read(run, CONFIG, _settings)
    run.defaults = _read(run, DEFAULTS, _settings)
    if lacking := [key for key in run.defaults if run.config and key not in run.config]:
        run.problems.append(f"{folder / CONFIG}: {', '.join(lacking)}: missing, but in {DEFAULTS}")
    run.state = _read(run, "state.json", json.loads)
    run.summary = _read(run, "summary.json", json.loads)
    return run


def read_runs(folders: Sequence[Path]) -> list[RunContents]:
    """Read run directories; names that are alike get as many parent folders as tell them apart.

    ValueError for one that is no directory, or is there twice.
    """
    runs = [read_run(folder) for folder in folders]
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{folders[0]}: expected different runs, this one is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    for run, path in zip(runs, paths, strict=True):
        run.name = "/".join(path.parts[-depth:])
    return runs


def _settings(text: str) -> Any:
    """Parse YAML; what JSON does not have becomes text."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


def _read(run: RunContents, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    path = run.folder / name
    if not path.is_file():
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"expected keys with values, found {type(found).__name__}")
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        run.problems.append(f"{path}: {' '.join(str(error).split())}")
        return {}
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl`` that are whole; a line that is being written, or was torn, is left out."""
    lines = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.split("\n"):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and {"time", "stage", "step"} <= found.keys():
            lines.append(found)
    return lines

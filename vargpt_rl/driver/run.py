"""A run's directory: settings, metrics, the steps that are done, and the summary at the end.

A step is a named piece of the loop whose result is a small JSON object; its files are in the run directory. A finished
step is never repeated: the same command resumes after the last one.
"""

import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, cast

import pandas as pd
import wandb
import yaml
from filelock import FileLock

from vargpt_rl.common.failpoints import point
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.lines import trim

CONFIG, STATE, METRICS, SUMMARY = "config.yaml", "state.json", "metrics.jsonl", "summary.json"
FREE = tuple(
    f"{key}: "
    for key in (
        *(f"rollout.{key}" for key in ("workers", "gpus_per_worker", "max_restarts", "call_timeout_s", "transport")),
        *(f"learner.{key}" for key in ("save_every", "keep_last", "keep_every", "max_restarts", "start_timeout_s")),
        *(f"tracking.{key}" for key in ("wandb", "project", "table_rows")),
        *(f"placement.{key}" for key in ("kind", "strategy")),
        "learner.gpus_per_rank",
    )
)
"""Settings that may change when a run is resumed: they say where and how it runs, not what comes out."""
LAYOUT = 3
"""Version of the run directory's steps and files. Directories of other versions are refused."""
NEW = {"layout": LAYOUT, "steps": {}, "served": {}, "events": [], "restarts": 0, "seconds": 0.0}


Labels = dict[str, int | None]
"""Iteration and resolution of metrics."""


def _check_layout(path: Path) -> None:
    """ValueError if the run of this state file was begun by a version with other steps or files."""
    layout = json.loads(path.read_text()).get("layout", 1)
    if layout != LAYOUT:
        raise ValueError(
            f"{path.parent} was begun by another version of vargpt_rl (run layout {layout}, expected {LAYOUT}): "
            f"finish it with that version, or give this run another name=..."
        )


def differences(old: object, new: object, prefix: str = "") -> list[str]:
    """Return ``key: old -> new`` for every setting that differs, by dotted name."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix}: {old} -> {new}"]
    lines = []
    for key in sorted(old.keys() | new.keys()):
        lines += differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
    return lines


class Run:
    """Opens a run directory, new or to be resumed.

    ValueError if it was begun with other settings, naming each that is not ``FREE``, or by an incompatible version.
    """

    def __init__(self, directory: Path, config: dict, lock: FileLock | None = None):
        self.directory = directory
        self.lock = lock  # held as long as this object is there
        saved = directory / CONFIG
        path = directory / STATE
        changed: list[str] = []
        if path.exists():
            _check_layout(path)
        if saved.exists():
            changed = differences(yaml.safe_load(saved.read_text()), config)
            if fixed := [line for line in changed if not line.startswith(FREE)]:
                raise ValueError(
                    f"{directory} was begun with other settings ({'; '.join(fixed)}): resume with those, "
                    f"or give this run another name=..."
                )
        directory.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, STATE, SUMMARY):
            for unfinished in directory.glob(f".{name}.*"):  # of a driver that was killed
                unfinished.unlink()
        write_atomically(saved, yaml.safe_dump(config, sort_keys=False).encode())
        self.state = copy.deepcopy(NEW) | (json.loads(path.read_text()) if path.exists() else {})
        self.began = time.time() - self.state["seconds"]
        trim(directory / METRICS)
        self.tracker = None
        self.served = self._recorded
        if changed:
            self.note(f"resuming with other settings: {'; '.join(changed)}")

    @property
    def _recorded(self) -> dict:
        """Weight sets in the workers after the last recorded step, and the version of the last one published."""
        return self.state["served"].get(next(reversed(self.state["steps"]), None), {"version": 0, "weights": []})

    @property
    def summary(self) -> dict | None:
        """The summary of a finished run."""
        path = self.directory / SUMMARY
        return json.loads(path.read_text()) if path.exists() else None

    def track(self, mode: str, project: str, config: dict) -> None:
        """Also send metrics to wandb. Its own files lie in the run directory; WANDB_DATA_DIR moves those of tables."""
        os.environ.setdefault("WANDB_DATA_DIR", str(self.directory.resolve() / "wandb"))
        self.tracker = wandb.init(
            mode=cast(Literal["offline", "online", "disabled"], mode),  # the settings allow no other
            project=project,
            name=self.directory.name,
            dir=self.directory,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def step(self, name: str, work: Callable[[], dict]) -> dict:
        """Return the result of a named step: from its record if it is done, else by doing and recording it."""
        if name not in self.state["steps"]:
            result = work()
            json.dumps(result)  # a result that cannot be recorded must fail here, not at the next start
            point(name)
            self.state["steps"][name], self.state["served"][name] = result, self.served
            self.save()
        return self.state["steps"][name]

    def rewind(self, name: str, why: str) -> None:
        """Forget a step whose files cannot be used, and all later steps: they will be redone."""
        steps = list(self.state["steps"])
        for step in steps[steps.index(name) :]:
            del self.state["steps"][step]
            self.state["served"].pop(step, None)
        self.served = self._recorded
        self.note(f"redoing {name}: {why}")

    def note(self, event: str, restart: bool = False) -> None:
        """Record an event, such as a fault that was handled, and whether processes were restarted for it."""
        print(f"note: {event}", flush=True)
        self.state["events"].append(event)
        self.state["restarts"] += restart
        self.save()

    def save(self) -> None:
        """Record the state."""
        self.state["seconds"] = self.seconds
        write_atomically(self.directory / STATE, json.dumps(self.state, indent=1).encode())

    @property
    def seconds(self) -> float:
        """Seconds spent on this run, without the time between an interruption and the next start."""
        return time.time() - self.began

    def log(self, stage: str, step: int, metrics: Mapping[str, float | list[float] | None], labels: Labels) -> None:
        """Append a line to ``metrics.jsonl``; send all but lists to wandb under ``stage/``."""
        line = {"time": time.time(), **labels, "stage": stage, "step": step, **metrics}
        with (self.directory / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.tracker is not None:
            numbers = {f"{stage}/{key}": value for key, value in metrics.items() if not isinstance(value, list)}
            self.tracker.log(numbers | labels)

    def log_images(self, path: Path) -> None:
        """Send an image file to wandb."""
        if self.tracker is not None:
            self.tracker.log({f"samples/{path.stem}": wandb.Image(str(path))})

    def log_table(self, name: str, table: pd.DataFrame, labels: Labels) -> None:
        """Send a table to wandb; paths in it are image files, which may be deleted afterwards."""
        if self.tracker is not None:
            cells = table.astype(object).where(table.notna(), None).values.tolist()
            rows = [[wandb.Image(str(cell)) if isinstance(cell, Path) else cell for cell in row] for row in cells]
            self.tracker.log({name: wandb.Table(columns=list(table.columns), data=rows)} | labels)

    def finish(self, summary: dict) -> None:
        """Write the summary; the run is then complete."""
        write_atomically(self.directory / SUMMARY, json.dumps(summary, indent=1).encode())

    def close(self, failed: bool) -> None:
        """Flush what is tracked, whether the run ``failed`` or not."""
        if self.tracker is not None:
            self.tracker.finish(exit_code=int(failed))

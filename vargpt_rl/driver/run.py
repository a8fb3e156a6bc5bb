"""A run's directory: settings, metrics, the steps that are done, and the summary at the end.

A step is a named piece of the loop whose result is a small JSON object; its files are in the run directory. A finished
step is never repeated: the same command resumes after the last one.
"""

import copy
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
import wandb
import yaml
from filelock import FileLock
from PIL import Image

from vargpt_rl.common.failpoints import point
from vargpt_rl.common.logs import RECORD
from vargpt_rl.driver.progress import RunProgress
from vargpt_rl.driver.state import BEGUN_IN, NEW, read_state, write_state
from vargpt_rl.page.contents import CONFIG
from vargpt_rl.storage.files import content_hash, write_atomically
from vargpt_rl.storage.lines import trim
from vargpt_rl.storage.manifest import Manifest

STATE, METRICS, SUMMARY = "state.json", "metrics.jsonl", "summary.json"
PARTS = "parts"
"""Folder of the finished parts of the step under way."""
PLACE = ("name: ", "runs: ")
"""Settings that only say where the run is: it may have been moved."""
FREE = tuple(
    f"{key}: "
    for key in (
        *(
            f"rollout.{key}"
            for key in ("workers", "gpus_per_worker", "max_restarts", "call_timeout_s", "transport", "keep_every")
        ),
        *(
            f"learner.{key}"
            for key in ("save_every", "keep_last", "keep_every", "max_restarts", "start_timeout_s", "stall_timeout_s")
        ),
        *(f"tracking.{key}" for key in ("wandb", "project", "table_rows", "images")),
        *(f"placement.{key}" for key in ("kind", "strategy")),
        "learner.gpus_per_rank",
        "preference.options.share",
        "name",
        "runs",
    )
)
"""Settings that may change when a run is resumed: they say where and how it runs, not what comes out."""
SHARED = re.compile(r"(learner\.ranks|[\w.]+\.recipe\.(micro_batch|zero)): ")
"""Settings of how ranks share a batch. They may change too, but the result is then not the same bit for bit."""
READ_BACK = (
    "preferences/*.parquet",
    "preferences/*.margins.json",
    "evaluations/*.jsonl",
    "rollouts/*/*",
    "samples/*/*",
    "checkpoints/*/final/COMPLETE",
    "checkpoints/*/final/reward.json",
    "checkpoints/*/step-*/COMPLETE",
    "best/*/*",
)
"""Files that later steps or starts read; weight sets are guarded by their markers."""
LOGS = (METRICS, "quarantine.jsonl")
"""Files that grow: what was in them when the state was saved must stay."""


Labels = dict[str, int | None]
"""Iteration and resolution of metrics."""


def _for_wandb(path: Path) -> wandb.Image:
    with Image.open(path) as image:
        return wandb.Image(image.convert("RGB"))


def differences(old: object, new: object, prefix: str = "") -> list[str]:
    """Return ``key: old -> new`` for every setting that differs, by dotted name."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix}: {old} -> {new}"]
    lines = []
    for key in sorted(old.keys() | new.keys()):
        lines += differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
    return lines


def _settings_in(path: Path, content: bytes) -> dict:
    """Return the settings that were written. ValueError naming the file if they cannot be read."""
    try:
        found = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: put back a copy of it, or give this run another name=...") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: expected settings, got {type(found).__name__}")
    return found


class Run:
    """Opens a run directory, new or to be resumed.

    ValueError if it was begun with other settings, naming each that is not ``FREE``, or by an incompatible version.
    """

    def __init__(self, directory: Path, config: dict, lock: FileLock | None = None):
        self.directory = directory
        self.lock = lock  # held as long as this object is there
        self.on_step: Callable[[], None] | None = None
        """Called after each recorded step."""
        self.tracker = None
        self.progress = RunProgress()
        self.current = ""
        """Name of the step under way."""
        for name in (CONFIG, STATE, SUMMARY, *LOGS):
            if (directory / name).exists() and not (directory / name).is_file():
                raise ValueError(f"{directory / name}: expected a file: move it away, or put back a copy of the file")
        directory.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, STATE, SUMMARY):
            for unfinished in directory.glob(f".{name}.*"):  # of a driver that was killed
                unfinished.unlink()
        self.state, damaged, events = self._open_state()
        self.state.setdefault(BEGUN_IN, os.getcwd())
        self.files = Manifest(directory, READ_BACK, self.state["files"])
        self.began = time.time() - self.state["seconds"]
        events += self._check_logs()
        events += self._open_settings(config)
        trim(directory / METRICS)
        self.served = self._recorded
        self.save()
        for event in events:
            self.note(event)
        if damaged:
            self.rewind(damaged, f"{directory / STATE}: its record of the step is damaged")

    def _open_state(self) -> tuple[dict[str, Any], str | None, list[str]]:
        """Return what `read_state` does. ValueError if the file is gone or cannot be used."""
        path = self.directory / STATE
        if path.exists():
            return read_state(path)
        if (self.directory / CONFIG).exists() or (self.directory / "checkpoints").exists():
            raise ValueError(
                f"{path} is gone: put back a copy of it, remove {self.directory}, or give this run another name=..."
            )
        return copy.deepcopy(NEW), None, []

    def _open_settings(self, config: dict) -> list[str]:
        """Write the settings; return what changed. ValueError if the run was begun with others."""
        path = self.directory / CONFIG
        written = yaml.safe_dump(config, sort_keys=False).encode()
        known, found = self.state["config"], path.read_bytes() if path.exists() else None
        told: list[str] = []
        if found is not None and known in (None, content_hash(found)):
            changed = differences(_settings_in(path, found), config)
            if fixed := [line for line in changed if not line.startswith(FREE) and not SHARED.match(line)]:
                raise ValueError(
                    f"{self.directory} was begun with other settings ({'; '.join(fixed)}): resume with those, "
                    f"or give this run another name=..."
                )
            other = [line for line in changed if not line.startswith(PLACE)]
            told = [f"resuming with other settings: {'; '.join(other)}"] if other else []
            if any(SHARED.match(line) for line in changed):
                told.append("training is rounded in another order from now on: not bit for bit the run that was begun")
        elif known is not None and self.state["steps"]:
            what = f"{path} is {'gone' if found is None else 'damaged'}"
            if content_hash(written) != known:
                raise ValueError(
                    f"{what}, and the run was begun with other settings than these: resume with those, put back a copy "
                    "of it, or give this run another name=..."
                )
            told = [f"{what}: written again, as the settings are the same"]
        self.state["config"] = content_hash(written)
        self.save()  # first: settings without a state are a state that is gone
        write_atomically(path, written)
        return told

    def _check_logs(self) -> list[str]:
        """Return which of the files that grow have lost or changed what was written before."""
        told = []
        for name, entry in self.state["logs"].items():
            path = self.directory / name
            whole = path.read_bytes()[: entry["bytes"]] if path.exists() else b""
            if content_hash(whole) != entry["blake2b"]:
                told.append(f"{path} is {'damaged' if path.exists() else 'gone'}: what it has now is kept as it is")
        return told

    @property
    def _recorded(self) -> dict:
        """Weight sets in the workers after the last recorded step, and the version of the last one published."""
        return self.state["served"].get(next(reversed(self.state["steps"]), None), {"version": 0, "weights": []})

    @property
    def summary(self) -> dict | None:
        """The summary of a finished run. One that is not as it was written is noted, and the run is not finished."""
        path, known = self.directory / SUMMARY, self.state["summary"]
        if known is None:
            return None
        found = path.read_bytes() if path.exists() else None
        if found is not None and content_hash(found) == known:
            return json.loads(found)
        self.state["summary"] = None
        self.note(f"{path} is {'gone' if found is None else 'damaged'}: written again")
        return None

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
        self.current = name
        if name not in self.state["steps"]:
            began = time.time()
            self.progress.enter(name)
            result = work()
            json.dumps(result)  # a result that cannot be recorded must fail here, not at the next start
            point(name)
            self.state["steps"][name], self.state["served"][name] = result, self.served
            self.state["times"][name] = [began, time.time()]
            self.files.record(name)
            self.save()
            self.progress.leave(name)
            if self.on_step:
                self.on_step()
        shutil.rmtree(self.parts, ignore_errors=True)
        return self.state["steps"][name]

    @property
    def parts(self) -> Path:
        """The folder of the parts of the step under way (`vargpt_rl.driver.parts`)."""
        return self.directory / PARTS / self.current.replace("/", "-")

    def rewind(self, name: str, why: str) -> None:
        """Forget a step whose files cannot be used, and all later steps: they will be redone."""
        steps = list(self.state["steps"])
        for step in steps[steps.index(name) :]:
            del self.state["steps"][step]
            self.state["served"].pop(step, None)
            self.state["times"].pop(step, None)
        self.served = self._recorded
        shutil.rmtree(self.directory / PARTS, ignore_errors=True)  # made with what is redone
        self.note(f"redoing {name}: {why}")

    def note(self, event: str, restart: bool = False) -> None:
        """Record an event, such as a fault that was handled, and whether processes were restarted for it."""
        print(f"note: {event}", flush=True)
        RECORD.info("note: %s", event)
        self.state["events"].append(event)
        self.state["restarts"] += restart
        self.save()

    def save(self) -> None:
        """Record the state."""
        self.state["seconds"] = self.seconds
        for name in LOGS:
            if (path := self.directory / name).exists():
                content = path.read_bytes()
                self.state["logs"][name] = {"bytes": len(content), "blake2b": content_hash(content)}
        write_state(self.directory / STATE, self.state)

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
        """Send a table to wandb; paths in it are image files."""
        if self.tracker is not None:
            cells = table.astype(object).where(table.notna(), None).values.tolist()
            rows = [[_for_wandb(cell) if isinstance(cell, Path) else cell for cell in row] for row in cells]
            self.tracker.log({name: wandb.Table(columns=list(table.columns), data=rows)} | labels)

    def finish(self, summary: dict) -> None:
        """Write the summary; the run is then complete."""
        content = json.dumps(summary, indent=1).encode()
        write_atomically(self.directory / SUMMARY, content)
        self.state["summary"] = content_hash(content)
        self.save()

    def close(self, failed: bool) -> None:
        """End the progress and flush what is tracked, whether the run ``failed`` or not."""
        self.progress.close()
        if self.tracker is not None:
            self.tracker.finish(exit_code=int(failed))

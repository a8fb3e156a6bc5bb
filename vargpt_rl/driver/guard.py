"""Guards of online training: stop when it diverges, keep the weights that score best on held-out prompts, warn.

Findings are kept in a file, so that a resumed run decides as one that was not interrupted.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from configs.stages import GuardConfig
from vargpt_rl.data.policy_batches import STOP
from vargpt_rl.storage.files import atomic_dir, write_atomically


def divergence(line: Mapping[str, float], first_entropy: float, limits: GuardConfig) -> str | None:
    """Return what is wrong with a step of the learner, given its metrics; None if nothing is."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(line[name]):
            return f"{name} is {line[name]}, expected a finite number"
    if (ratio := line.get("ratio/max", 1.0)) > limits.max_ratio:
        return f"a ratio of policy and sampler is {ratio:.3g}, expected at most rl.guard.max_ratio={limits.max_ratio:g}"
    if (kl := line.get("kl", 0.0)) > limits.max_kl:
        return f"the KL divergence is {kl:.3g} nats a symbol, expected at most rl.guard.max_kl={limits.max_kl:g}"
    if (entropy := line["entropy"]) < limits.min_entropy * first_entropy:
        return (
            f"the entropy fell from {first_entropy:.3g} to {entropy:.3g} nats a symbol, expected at least "
            f"rl.guard.min_entropy={limits.min_entropy:g} of the first"
        )
    return None


class Guard:
    """Watches one online job, whose batches are in ``folder`` and whose weights are saved in ``output``.

    ``note`` is told of each warning and stop.
    """

    def __init__(self, limits: GuardConfig, folder: Path, output: Path, note: Callable[[str], None]):
        self.limits = limits
        self.folder = folder
        self.output = output
        self.note = note
        path = folder / "guard.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        self.first: dict[str, float] = known.get("first", {})
        """First entropy and diversity."""
        self.scores: dict[int, float] = {int(step): score for step, score in known.get("scores", {}).items()}
        """Held-out score after each validated number of steps."""
        self.diverged: int | None = known.get("diverged")
        """Step that went wrong."""
        self.stopped: str | None = known.get("stopped")
        """Reason to stop."""
        self.warned: bool = known.get("warned", False)

    def _save(self) -> None:
        names = ("first", "scores", "diverged", "stopped", "warned")
        write_atomically(self.folder / "guard.json", json.dumps({name: getattr(self, name) for name in names}).encode())

    def watch(self, line: Mapping[str, float]) -> None:
        """Take a line of the learner's log; stop training if it shows a divergence."""
        if "entropy" not in line or self.stopped is not None:
            return
        if "entropy" not in self.first:
            self.first["entropy"] = line["entropy"]
            self._save()
        if reason := divergence(line, self.first["entropy"], self.limits):
            self.diverged = int(line["step"])
            self.stop(f"diverged at step {self.diverged}: {reason}")

    def stop(self, reason: str) -> None:
        """Let the learner end after the batches that are there."""
        self.stopped = reason
        self._save()
        self.note(f"{self.output.name} stops: {reason}")
        (self.folder / STOP).touch()

    def see_diversity(self, value: float) -> None:
        """Take the diversity of an update's images; warn, once, if it fell too far below the first update's."""
        self.first.setdefault("diversity", value)
        first, share = self.first["diversity"], self.limits.min_diversity
        if value < share * first and not self.warned:
            self.warned = True
            self.note(
                f"{self.output.name}: the diversity of a prompt's images fell from {first:.3g} to {value:.3g}, below "
                f"rl.guard.min_diversity={share:g} of the first: the policy may collapse to one image"
            )
        self._save()

    def see_score(self, step: int, value: float) -> None:
        """Take the held-out score of the weights after a number of steps."""
        self.scores[step] = value
        self._save()

    def is_due(self, number: int) -> bool:
        """Tell whether weights are validated before batch ``number``."""
        every = self.limits.validate_every
        return every is not None and number % every == 0

    @property
    def best(self) -> int | None:
        """Number of steps with the highest held-out score, the last of equals; None if none is known."""
        return max(sorted(self.scores), key=lambda step: (self.scores[step], step), default=None)

    def wanted(self, last: int) -> int:
        """Return the number of steps whose weights are to be kept, of those saved, after ``last`` were made."""
        if self.best is not None:
            return self.best
        if self.diverged is None:
            return last
        return max(step for step in saved_steps(self.output) if step < self.diverged)

    def keep_wanted(self, last: int) -> int:
        """Make ``final`` the weights that are to be kept; return their number of steps."""
        wanted = self.wanted(last)
        if wanted != last:
            with atomic_dir(self.output / "final") as folder:
                shutil.copytree(self.output / f"step-{wanted:06d}", folder, dirs_exist_ok=True)
            why = f"score {self.scores[wanted]:.3g} on held-out prompts" if self.scores else "the last before that"
            self.note(f"{self.output.name}: went back to the weights after {wanted} of {last} steps ({why})")
        return wanted

    def drop_weights(self, oldest: int) -> None:
        """Delete the weights saved after fewer than ``oldest`` steps, except the best."""
        for step in saved_steps(self.output):
            if step < oldest and step != self.best:
                shutil.rmtree(self.output / f"step-{step:06d}")


def saved_steps(output: Path) -> list[int]:
    """Return the numbers of steps after which weights were saved, in order."""
    return sorted(int(path.name.removeprefix("step-")) for path in output.glob("step-*"))

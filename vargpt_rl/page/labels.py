"""Labels of pairs by people: which pairs are shown, the files of labels, agreement, and export.

A rater's labels are lines of ``labels/RATER.jsonl`` in the run directory, appended and synced one at a time: {pair_id,
stage, winner, rater, seconds, flipped, again}. ``winner`` is chosen, rejected, alike, bad (both are) or null (skipped).
The line {undo: true} takes back the last label before it. No line is ever changed, so nothing is lost.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from vargpt_rl.common.averages import wilson
from vargpt_rl.common.usage import command_line
from vargpt_rl.evaluate.wording import agreement
from vargpt_rl.page.contents import PairRow, RunContents
from vargpt_rl.storage.files import sync
from vargpt_rl.storage.images import PAIRS, images_folder, pair_image
from vargpt_rl.storage.lines import read_records, trim

LABELS = "labels"
"""Folder of a run directory."""
WINNERS = ("chosen", "rejected", "alike", "bad")
REPEAT_EVERY = 10
"""After so many pairs an earlier one is shown again, turned round: agreement of a rater with themselves."""
RATER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Label:
    """One judgement: which side of a pair won, None if it was skipped."""

    pair_id: str
    stage: str
    winner: str | None
    rater: str
    seconds: float
    """Seconds from showing the pair to the answer."""
    flipped: bool
    """The chosen image was on the right."""
    again: bool
    """The pair was shown before, the other way round."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A pair to be shown to a rater."""

    stage: str
    row: PairRow
    flipped: bool
    again: bool


def labelled_pairs(run: RunContents) -> list[tuple[str, PairRow]]:
    """Return stage and row of every pair of a run whose images are kept, in the order of the tables."""
    found = []
    for stage in run.stages:
        kind = run.labelled_kind(stage)
        kept = {path.name for path in images_folder(run.folder, stage, kind).glob("*.webp")}
        if not kept:
            continue
        rows = run.pairs(stage, len(kept), kind)
        found += [(stage, row) for row in rows if pair_image(row.pair_id, "chosen") in kept]
    return found


def tasks_for(pairs: Sequence[tuple[str, PairRow]], rater: str) -> list[Task]:
    """Return what a rater is shown, in order: sides depend on rater and pair alone, and are even on average."""
    tasks: list[Task] = []
    for number, (stage, row) in enumerate(pairs):
        tasks.append(Task(stage=stage, row=row, flipped=is_flipped(rater, row.pair_id), again=False))
        if number % REPEAT_EVERY == REPEAT_EVERY - 1:
            stage, row = pairs[number - REPEAT_EVERY // 2]
            tasks.append(Task(stage=stage, row=row, flipped=not is_flipped(rater, row.pair_id), again=True))
    return tasks


def is_flipped(rater: str, pair_id: str) -> bool:
    """Tell whether a rater sees the chosen image of a pair on the right."""
    return hashlib.blake2b(f"{rater}/{pair_id}".encode(), digest_size=1).digest()[0] % 2 == 1


def winner_of(side: str | None, flipped: bool) -> str | None:
    """Return the winner for an answer: left, right, alike, bad, or None. ValueError for another answer."""
    if side in ("left", "right"):
        return "chosen" if (side == "left") != flipped else "rejected"
    if side not in ("alike", "bad", None):
        raise ValueError(f"answer {side!r}: expected left, right, alike, bad or none")
    return side


def labels_file(run: Path, rater: str) -> Path:
    """Return the file of a rater's labels. ValueError for a name that is none."""
    if not RATER.fullmatch(rater):
        raise ValueError(f"rater {rater!r}: expected letters, digits, - and _, at most 40")
    return run / LABELS / f"{rater}.jsonl"


def check_writable(run: Path) -> None:
    """Make sure that labels can be written into a run directory. OSError if they cannot."""
    (run / LABELS).mkdir(exist_ok=True)
    with TemporaryFile(dir=run / LABELS):
        pass


def append(path: Path, record: dict) -> None:
    """Append a line and sync it; a line that was torn before is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    trim(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)


def add_label(run: Path, label: Label) -> None:
    """Record a label."""
    append(labels_file(run, label.rater), asdict(label))


def undo(run: Path, rater: str) -> None:
    """Take back a rater's last label, if there is one."""
    if read_labels(labels_file(run, rater)):
        append(labels_file(run, rater), {"undo": True})


def read_labels(path: Path) -> list[Label]:
    """Read the labels that stand, in order. ValueError naming file and line if it is damaged."""
    found: list[Label] = []
    for number, record in enumerate(read_records(path), 1):
        try:
            if record.get("undo"):
                found = found[:-1]
            else:
                found.append(_label(record))
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged in line {number}: no label of a pair: {error}") from error
    return found


def _label(record: dict[str, Any]) -> Label:
    label = Label(**record)
    if not isinstance(label.pair_id, str) or label.winner not in (*WINNERS, None):
        raise ValueError(f"pair {label.pair_id!r}, winner {label.winner!r}")
    return label


def all_labels(run: Path) -> dict[str, list[Label]]:
    """Return the labels of every rater by name. ValueError naming file and line if one is damaged."""
    return {path.stem: read_labels(path) for path in _label_files(run)}


def _label_files(run: Path) -> list[Path]:
    return sorted((run / LABELS).glob("*.jsonl"))


def votes(labels: Sequence[Label]) -> dict[str, str]:
    """Return the winner of each pair that was not skipped, repeats left out."""
    return {label.pair_id: label.winner for label in labels if label.winner and not label.again}


def self_agreement(labels: Sequence[Label]) -> tuple[int, int]:
    """Return how often a rater gave the same answer to a pair that was turned round, of how many."""
    first = votes(labels)
    again = [label for label in labels if label.again and label.winner and label.pair_id in first]
    return sum(first[label.pair_id] == label.winner for label in again), len(again)


def krippendorff_alpha(raters: Sequence[dict[str, str]]) -> float | None:
    """Return Krippendorff's alpha of nominal ratings: 1 is full agreement, 0 is chance (Krippendorff, 2011).

    ``raters`` map units to values. None if no unit has two ratings, or all values are the same.
    """
    units = [
        [rater[unit] for rater in raters if unit in rater] for unit in {unit for rater in raters for unit in rater}
    ]
    paired = [values for values in units if len(values) > 1]
    totals = Counter(value for values in paired for value in values)
    count = sum(totals.values())
    expected = count * count - sum(number * number for number in totals.values())
    if not expected:
        return None
    observed = sum(
        sum(2 for one, other in combinations(values, 2) if one != other) / (len(values) - 1) for values in paired
    )
    return 1 - (count - 1) * observed / expected


def majority(raters: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the winner of each pair with most votes; pairs without one are left out."""
    found = {}
    for unit in dict.fromkeys(unit for rater in raters for unit in rater):
        ranked = Counter(rater[unit] for rater in raters if unit in rater).most_common(2)
        if len(ranked) == 1 or ranked[0][1] > ranked[1][1]:
            found[unit] = ranked[0][0]
    return found


def margins_by_reward(run: RunContents, pairs: Sequence[tuple[str, PairRow]]) -> dict[str, dict[str, float | None]]:
    """Return the margins of each automatic reward by pair: the training reward, and those stored with its terms."""
    found = {"reward": {row.pair_id: row.reward_margin for _, row in pairs}}
    for stage in dict.fromkeys(stage for stage, _ in pairs):
        for name, by_pair in run.margins(stage, run.labelled_kind(stage)).items():
            found.setdefault(name, {}).update(by_pair)
    return found


def preferred_margins(margins: Mapping[str, float | None], winners: Mapping[str, str]) -> list[float]:
    """Return the margins of the side that people chose over the other; pairs without a winner or margin are left out.

    ``margins`` are those of the chosen over the rejected side by pair.
    """
    signs = {"chosen": 1.0, "rejected": -1.0}
    return [
        signs[winners[pair]] * margin
        for pair, margin in margins.items()
        if margin is not None and winners.get(pair) in signs
    ]


def wins(margins: Sequence[float]) -> float:
    """Count the margins above 0; ties count half."""
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)


def reward_agreement(margins: Mapping[str, float | None], winners: Mapping[str, str]) -> tuple[float, int]:
    """Return how often a reward prefers the side that people chose (ties count half), of how many pairs."""
    known = preferred_margins(margins, winners)
    return wins(known), len(known)


def summarise_labels(run: RunContents) -> list[str]:
    """Return what the labels of a run say, in lines; damaged files of raters are named and left out."""
    raters = {}
    lines = []
    for path in _label_files(run.folder):
        try:
            raters[path.stem] = read_labels(path)
        except (OSError, ValueError) as error:
            lines.append(f"left out: {error}")
    pairs = labelled_pairs(run)
    for name, labels in raters.items():
        counts = Counter(votes(labels).values())
        same, repeated = self_agreement(labels)
        told = ", ".join(f"{counts[winner]} {winner}" for winner in WINNERS)
        again = f"; the same answer to {same} of {repeated} pairs shown again" if repeated else ""
        lines.append(f"{name}: {sum(counts.values())} of {len(pairs)} pairs: {told}{again}")
    each = [votes(labels) for labels in raters.values()]
    if (alpha := krippendorff_alpha(each)) is not None:
        lines.append(f"agreement between raters (Krippendorff's alpha): {alpha:.2f}")
    winners = majority(each)
    ordered = {row.pair_id for stage, row in pairs if run.labelled_kind(stage) == PAIRS}  # else sides mean nothing
    decided = [winner for name, winner in winners.items() if winner in ("chosen", "rejected") and name in ordered]
    if decided:
        lines.append(_share("the chosen image is preferred", decided.count("chosen"), len(decided)))
    for name, margins in margins_by_reward(run, pairs).items():
        right, count = reward_agreement(margins, winners)
        if count:
            what = f"the {name}" if name in ("reward", "judge") else f"the reward's term {name}"
            lines.append(_share(f"{what} prefers the image that people prefer", right, count))
    if run.waits_for_labels:
        lines.append(f"when all are labelled, resume: {command_line('resume', run.folder)}")
    return lines or ["no labels yet"]


def _share(what: str, right: float, count: int) -> str:
    low, high = wilson(right, count)
    return f"{what} in {agreement({'right': right, 'n': count, 'low': low, 'high': high})}"


def export(run: RunContents, path: Path) -> int:
    """Write the pairs with a majority as Parquet with the columns of Pick-a-Pic; return how many.

    ``jpg_0`` and ``jpg_1`` hold the kept images (WebP), chosen first; ``label_0`` is 1 where people prefer the first,
    0.5 where they are alike. Pairs that are both bad are left out. ValueError if there are none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    winners = majority([votes(labels) for labels in all_labels(run.folder).values()])
    rows = []
    for stage, row in labelled_pairs(run):
        if (winner := winners.get(row.pair_id)) in (None, "bad"):
            continue
        folder = images_folder(run.folder, stage, run.labelled_kind(stage))
        first = {"chosen": 1.0, "rejected": 0.0}.get(str(winner), 0.5)
        rows.append(
            {
                "caption": row.prompt,
                "jpg_0": (folder / pair_image(row.pair_id, "chosen")).read_bytes(),
                "jpg_1": (folder / pair_image(row.pair_id, "rejected")).read_bytes(),
                "image_0_uid": f"{row.pair_id}-chosen",
                "image_1_uid": f"{row.pair_id}-rejected",
                "model_0": row.chosen_source,
                "model_1": row.rejected_source,
                "label_0": first,
                "label_1": 1.0 - first,
                "has_label": True,
            }
        )
    if not rows:
        raise ValueError(f"{run.folder}: no pair has a label that most raters share: label some first")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return len(rows)

"""Held-out images of a run by prompt and moment, verdicts in words, and results by skill."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vargpt_rl.common.averages import interval
from vargpt_rl.evaluate.paired import ScoredImage, compare
from vargpt_rl.evaluate.wording import MOMENTS, WITHOUT_SFT, gain_of, verdict
from vargpt_rl.page.contents import RunContents
from vargpt_rl.page.step_titles import step_title

BASELINES = ("after_sft", "control")
"""Moments that later ones are compared with."""
EVERY = "all"
"""Skill of the row of all images."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The held-out images of a run at one moment of an iteration."""

    run: RunContents
    stage: str
    resolution: int | None
    key: str
    title: str
    images: list[ScoredImage]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One image of the gallery; ``right`` is None where the score is no verdict."""

    src: str | None
    run: str
    """Name of the run, where there are two."""
    title: str
    score: str
    right: bool | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A prompt of the gallery with its image at each moment."""

    prompt: str
    seed: int
    skill: str
    cells: list[Cell]

    @property
    def changed(self) -> bool:
        """Tell whether the score is not the same at all moments."""
        return len({cell.score for cell in self.cells if cell.score}) > 1

    @property
    def by_run(self) -> dict[str, list[Cell]]:
        """The images that are there, by run."""
        return {cell.run: [each for each in self.cells if each.run == cell.run and each.src] for cell in self.cells}

    @property
    def wrong(self) -> bool:
        """Tell whether the last image is wrong."""
        return self.cells[-1].right is False


@dataclass(kw_only=True)
class Gallery:
    """The prompts of one iteration and resolution."""

    title: str
    rows: list[PromptRow] = field(default_factory=list)
    hidden: int = 0
    """Prompts that are scored but whose images are not kept."""

    @property
    def skills(self) -> list[str]:
        """Skills that occur."""
        return sorted({row.skill for row in self.rows if row.skill})


@dataclass(frozen=True, kw_only=True)
class SkillCell:
    """Mean of a skill at a moment with its 95 % interval, and the number of images."""

    mean: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True, kw_only=True)
class SkillTable:
    """Skills by moment of one iteration; rows of the judge and of the training reward have no skill."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[SkillCell | None]]]


def moments_of(run: RunContents, stage: str) -> list[Moment]:
    """Return the measured moments of an iteration in the order in which a run has them."""
    px = resolution(run, stage)
    methods = run.setting_at(px, "align.methods", list[str], ["dpo"])
    titles = MOMENTS if run.setting_at(px, "align.sft", bool, True) else WITHOUT_SFT
    keys = ["after_sft", "control", *(f"after_{method}" for method in methods)]
    found = []
    for key in dict.fromkeys(keys):
        if images := run.scores(stage, key):
            title = titles.get(key, key.removeprefix("after_"))
            found.append(Moment(run=run, stage=stage, resolution=px, key=key, title=title, images=images))
    return found


def resolution(run: RunContents, stage: str) -> int | None:
    """Return the resolution of an iteration, by the settings."""
    sizes = run.setting("resolutions", list[int], [])
    number = stage.rpartition("-")[2]
    return sizes[min(int(number), len(sizes) - 1)] if sizes and number.isdecimal() else None


def size(resolution: int | None) -> str:
    """Return a resolution in words; None is unknown."""
    return "unknown size" if resolution is None else f"{resolution} px"


def verdicts(runs: Sequence[RunContents]) -> dict[str, list[str]]:
    """Return what each iteration shows, in sentences by iteration; the last one is the one that counts.

    Each policy is compared with SFT (or the start, without SFT), DPO and later ones with the control too, and last the
    last policy with SFT. Of two runs, their last policies at the same resolution are compared with each other.
    """
    told: dict[str, list[str]] = {}
    for run in runs:
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        for stage in run.stages:
            found = moments_of(run, stage)
            place = f"{prefix}{step_title(stage)}, {size(resolution(run, stage))}"
            compared = [
                (later, earlier) for i, later in enumerate(found) for earlier in found[:i] if earlier.key in BASELINES
            ]
            compared.sort(key=lambda pair: (pair[0] is found[-1], pair[1].key == "after_sft"))
            if sentences := [text for later, earlier in compared if (text := _sentence(later, earlier))]:
                told[place] = sentences
    if len(runs) > 1:
        for stage in runs[0].stages:
            first, second = (moments_of(run, stage) for run in runs[:2])
            if not (first and second) or first[-1].resolution != second[-1].resolution or not first[-1].resolution:
                continue
            if sentence := _sentence(second[-1], first[-1], named=True):
                told[f"{runs[1].name} against {runs[0].name}, {step_title(stage)}, {size(first[-1].resolution)}"] = [
                    sentence
                ]
    return told


def _sentence(later: Moment, earlier: Moment, named: bool = False) -> str:
    comparison = compare(later.images, earlier.images)
    if comparison is None:
        return ""
    policy, baseline = (f"{each.run.name}'s {each.title}" if named else each.title for each in (later, earlier))
    gain = gain_of(comparison.as_metrics("gain"), "gain")
    return verdict(policy, baseline, gain) if gain else ""


def galleries(runs: Sequence[RunContents]) -> list[Gallery]:
    """Return the galleries of all iterations; two runs stand side by side where their resolutions agree."""
    groups: dict[tuple[str, int | str], list[Moment]] = {}
    for run in runs:
        for stage in run.stages:
            for moment in moments_of(run, stage):
                groups.setdefault((stage, moment.resolution or f"unknown, of {run.name}"), []).append(moment)
    named = len(runs) > 1
    return [
        _gallery(f"{step_title(stage)}, {size(moments[0].resolution)}", moments, named)
        for (stage, _), moments in groups.items()
    ]


def _gallery(title: str, moments: list[Moment], named: bool) -> Gallery:
    gallery = Gallery(title=title)
    by_key = [{image.key: image for image in moment.images} for moment in moments]
    keys = dict.fromkeys(key for images in by_key for key in images)
    for key in keys:
        cells = []
        for moment, images in zip(moments, by_key, strict=True):
            cells.append(_cell(moment, images.get(key), moment.run.name if named else ""))
        known = next(images[key] for images in by_key if key in images)
        row = PromptRow(prompt=known.prompt, seed=known.seed, skill=known.skill or "", cells=cells)
        if any(cell.src for cell in cells):
            gallery.rows.append(row)
        else:
            gallery.hidden += 1
    return gallery


def _cell(moment: Moment, image: ScoredImage | None, run: str) -> Cell:
    if image is None:
        return Cell(src=None, run=run, title=moment.title, score="", right=None, reason="")
    exact = image.score in (0.0, 1.0)
    return Cell(
        src=moment.run.image(image.image),
        run=run,
        title=moment.title,
        score="" if image.score is None else f"{image.score:.3g}",
        right=bool(image.score) if exact else None,
        reason=image.reason or "",
    )


def skill_tables(runs: Sequence[RunContents]) -> list[SkillTable]:
    """Return a table of skills by moment for each iteration of each run."""
    tables = []
    for run in runs:
        for stage in run.stages:
            if moments := moments_of(run, stage):
                prefix = f"{run.name}, " if len(runs) > 1 else ""
                tables.append(_skills(f"{prefix}{step_title(stage)}, {size(moments[0].resolution)}", moments))
    return tables


def _skills(title: str, moments: list[Moment]) -> SkillTable:
    skills = sorted({image.skill for moment in moments for image in moment.images if image.skill})
    rows: list[tuple[str, list[SkillCell | None]]] = [
        (
            skill.replace("_", " "),
            [
                mean_of([image for image in moment.images if skill in (EVERY, image.skill)], "score")
                for moment in moments
            ],
        )
        for skill in (EVERY, *skills)
    ]
    for name, title_of in (("reward", "training reward"), ("judge", "judge")):
        values = [mean_of(moment.images, name) for moment in moments]
        if values == rows[0][1]:  # the score is this very reward
            rows[0] = (f"{rows[0][0]} (= {title_of})", values)
        elif any(values):
            rows.append((title_of, values))
    return SkillTable(title=title, columns=[moment.title for moment in moments], rows=rows)


def mean_of(images: Sequence[ScoredImage], name: str) -> SkillCell | None:
    """Return the mean of the scores called ``name`` with its interval; None if nothing is scored."""
    scored = [image for image in images if getattr(image, name) is not None]
    if not scored:
        return None
    values = [getattr(image, name) for image in scored]
    low, high = interval(values, [image.prompt for image in scored]) or (None, None)
    return SkillCell(mean=sum(values) / len(values), low=low, high=high, n=len(values))

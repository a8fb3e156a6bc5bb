"""The shapes world as a benchmark: held-out drawings, edits and questions, all judged by a program, exactly.

A drawing or an edit is right or wrong (`vargpt_rl.data.shapes_check`), a question is answered in exactly the right word
or not. Drawings, edits and questions are those of the held-out captions, which no stage is trained on, and follow from
the seed. The JSON file also has the edits by kind.
"""

from collections import defaultdict
from collections.abc import Sequence

from vargpt_rl.common.averages import mean_and_error
from vargpt_rl.data.config import DataConfig
from vargpt_rl.data.images import read_image
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.shapes import TASKS, parse
from vargpt_rl.data.shapes_check import check
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.evaluate.report import Column, Scores
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.evaluate.subject import EvaluatedModel, ImageRequest, QuestionRequest

COUNT = 300
"""Captions, edits and questions, each, unless ``limit`` says otherwise."""
LEAST_SIDE = 64  # of images that the checker can read
ANSWER_TOKENS = 8
EDITS, DRAWINGS = 1, 0  # tell the seeds of an edit and of a drawing with the same number apart


class Shapes:
    """Drawings, edits and questions of the held-out captions."""

    def __init__(self, config: EvaluateConfig):
        height, width = config.size
        if height != width or height < LEAST_SIDE:
            raise ValueError(f"benchmark=shapes needs square images of {LEAST_SIDE} px or more, not {width}x{height}")
        count = config.limit or COUNT
        self.source = ShapesSource(ShapesConfig())
        self.captions = [prompt.text for prompt in self.source.prompts("held_out", count, config.seed)]
        self.edits = self.source.edits(count, config.seed, "held_out")
        self.questions = self.source.questions(count, config.seed, "held_out")
        self.drawings = [
            ImageRequest(f"drawings/{i:05d}.png", text, i, DRAWINGS) for i, text in enumerate(self.captions)
        ]
        self.edited = [
            ImageRequest(f"edits/{i:05d}.png", instruction, i, EDITS, before)
            for i, (before, instruction, _) in enumerate(self.edits)
        ]

    @property
    def columns(self) -> list[Column]:
        names = ("overall", *TASKS, "edits", "questions")
        return [Column(name, name.replace("_", " "), 3) for name in names]

    def make(self, subject: EvaluatedModel) -> None:
        subject.draw(self.drawings)
        subject.draw(self.edited, self._look, "images-edits")
        self._answers(subject)

    def _look(self, key: str):
        return self.source.load(key, DataConfig.seen_side)

    def _answers(self, subject: EvaluatedModel) -> list[str]:
        asked = [QuestionRequest(f"question {i}", question, key) for i, (key, question, _) in enumerate(self.questions)]
        return list(subject.answer(asked, self._look, ANSWER_TOKENS).values())

    def score(self, subject: EvaluatedModel) -> Scores:
        images = [read_image(path) for path in subject.paths(self.drawings)]
        drawn = [float(check(image, caption).correct) for image, caption in zip(images, self.captions, strict=True)]
        groups = {"overall": drawn, **by_task(self.captions, drawn)}
        edit_check = self.source.edit_check()
        asked = [Prompt(after, text, shown=before) for before, text, after in self.edits]
        verdicts = edit_check([read_image(path) for path in subject.paths(self.edited)], asked)
        groups["edits"] = [float(verdict.correct) for verdict in verdicts]
        answers = self._answers(subject)
        groups["questions"] = [
            float(said == truth) for said, (_, _, truth) in zip(answers, self.questions, strict=True)
        ]
        results = {name: mean_and_error(values) for name, values in groups.items()}
        return Scores(
            {name: mean for name, (mean, _) in results.items()},
            {name: error for name, (_, error) in results.items()},
            {name: len(values) for name, values in groups.items()},
            {"edits": edit_check.scores(asked, verdicts)},
            notes=["Shares of what is right, with their standard error, which does not cover the spread of seeds."],
        )


def by_task(captions: Sequence[str], correct: Sequence[float]) -> dict[str, list[float]]:
    """The values by task, in the order of the tasks."""
    groups = defaultdict(list)
    for caption, value in zip(captions, correct, strict=True):
        groups[parse(caption).task].append(value)
    return {task: groups[task] for task in TASKS if task in groups}

"""The shapes world as a benchmark: images, edits and questions of held-out captions, all scored by an exact checker.

Images and edits are right or wrong (`vargpt_rl.data.shapes_check`), and answers must match exactly. No stage trains on
the held-out captions. The seed determines all prompts. The JSON file also has edit accuracy by kind of edit.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from vargpt_rl.data.config import DataConfig
from vargpt_rl.data.images import read_image
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.shapes import TASKS, parse
from vargpt_rl.data.shapes_check import check
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.evaluate.evaluated_model import EvaluatedModel, ImageRequest, QuestionRequest
from vargpt_rl.evaluate.report import Column, Scores, summarise
from vargpt_rl.evaluate.settings import EvaluateConfig

Value = TypeVar("Value")
NOTE = (
    "Accuracies with their 95 % interval (Wilson); images of one caption count as dependent. It does not include the "
    "variance over seeds."
)
COUNT = 300
"""Number of captions, of edits and of questions, unless ``limit`` is set."""
LEAST_SIDE = 64  # pixels; the checker needs as much
ANSWER_TOKENS = 8
# Second number of an image's seed: an edit and an image of the same index get different seeds.
DRAWINGS = 0
EDITS = 1


class Shapes:
    """The benchmark."""

    def __init__(self, config: EvaluateConfig):
        height, width = config.size
        if height != width or height < LEAST_SIDE:
            raise ValueError(f"benchmark=shapes needs square images of {LEAST_SIDE} px or more, got {width}x{height}")
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

    def make(self, model: EvaluatedModel) -> None:
        model.draw(self.drawings)
        model.draw(self.edited, self._look, "images-edits")
        self._answers(model)

    def _look(self, key: str):
        return self.source.load(key, DataConfig.seen_side)

    def _answers(self, model: EvaluatedModel) -> list[str]:
        requests = [
            QuestionRequest(f"question {i}", question, key) for i, (key, question, _) in enumerate(self.questions)
        ]
        return list(model.answer(requests, self._look, ANSWER_TOKENS).values())

    def score(self, model: EvaluatedModel) -> Scores:
        images = [read_image(path) for path in model.paths(self.drawings)]
        drawn = [float(check(image, caption).correct) for image, caption in zip(images, self.captions, strict=True)]
        groups = {"overall": drawn, **by_task(self.captions, drawn)}
        edit_check = self.source.edit_check()
        prompts = [Prompt(after, text, shown=before) for before, text, after in self.edits]
        verdicts = edit_check([read_image(path) for path in model.paths(self.edited)], prompts)
        groups["edits"] = [float(verdict.correct) for verdict in verdicts]
        answers = self._answers(model)
        groups["questions"] = [
            float(answer == truth) for answer, (_, _, truth) in zip(answers, self.questions, strict=True)
        ]
        return Scores(
            *summarise(groups, {"overall": self.captions, **by_task(self.captions, self.captions)}),
            {name: len(values) for name, values in groups.items()},
            {"edits": edit_check.scores(prompts, verdicts)},
            notes=[NOTE],
        )


def by_task(captions: Sequence[str], values: Sequence[Value]) -> dict[str, list[Value]]:
    """Group the values of captions by task, in the order of the tasks."""
    groups = defaultdict(list)
    for caption, value in zip(captions, values, strict=True):
        groups[parse(caption).task].append(value)
    return {task: groups[task] for task in TASKS if task in groups}

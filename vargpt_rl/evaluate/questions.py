"""Your own questions about images: exact-match accuracy, yes/no accuracy, and MME's paired score.

``questions`` is a JSON lines file, ``images`` the folder with its images:

    {"image": "a/1.png", "question": "Is there a dog? Answer yes or no.", "answer": "yes", "category": "existence"}

"answer" may be a list of accepted answers; "category" is optional. Answers are compared ignoring case, punctuation and
extra whitespace. If the right answer is yes or no, only the first word of the model's answer counts.

MME (Fu et al., 2023) asks two yes/no questions about each image. A category's score is 100 x (accuracy + share of
images with both answers right); the total is the sum over categories. Images with any other number of yes/no questions
in a category are excluded and counted.
"""

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

from PIL import Image

from vargpt_rl.data.images import read_image
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.evaluate.evaluated_model import EvaluatedModel, QuestionRequest
from vargpt_rl.evaluate.report import Column, Scores, summarise
from vargpt_rl.evaluate.rows import quarantine_of, read_rows, text
from vargpt_rl.evaluate.settings import EvaluateConfig

YES_OR_NO = ({"yes"}, {"no"})
PAIR = 2


class QuestionFile:
    """The benchmark: questions from a file, answered greedily."""

    columns = [Column("accuracy", "accuracy", 3), Column("yes_no_accuracy", "yes/no", 3), Column("mme", "MME score", 1)]

    def __init__(self, config: EvaluateConfig):
        self.config = config
        assert config.images is not None  # `EvaluateConfig` requires it for this benchmark
        self.folder = Path(config.images)
        if not self.folder.is_dir():
            raise ValueError(f"images={config.images}: expected a folder of images")
        self.rows, self.bad = read_rows(config, "questions", self._check)
        self.quarantine = quarantine_of(config)
        self.requests = [
            QuestionRequest(f"line {number + 1}", row["question"], row["image"]) for number, row in self.rows
        ]

    def _check(self, row: dict) -> None:
        path = PurePosixPath(text(row, "image"))
        if path.is_absolute() or ".." in path.parts:
            raise BadRecord('"image" is outside the image folder')
        if not (self.folder / path).is_file():
            raise BadRecord("image not found")
        text(row, "question")
        right_answers(row)
        if not isinstance(row.get("category", ""), str):
            raise BadRecord('"category" is not text')

    def make(self, model: EvaluatedModel) -> None:
        self._answers(model)

    def _look(self, name: str) -> Image.Image:
        return read_image(self.folder / name)

    def _answers(self, model: EvaluatedModel) -> dict[str, str]:
        return model.answer(self.requests, self._look, self.config.max_tokens, self.quarantine)

    def score(self, model: EvaluatedModel) -> Scores:
        answers = self._answers(model)
        answered = [
            (row, answers[request.key])
            for request, (_, row) in zip(self.requests, self.rows, strict=True)
            if request.key in answers
        ]
        lost = len(self.requests) - len(answered)
        self.quarantine.check(len(self.requests), self.config.max_bad_fraction, lost)
        scores = score_answers(answered)
        scores.counts |= {"unanswered": lost, "bad_questions": self.bad}
        return scores


def plain(text: str) -> str:
    """Strip case, punctuation and extra whitespace."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def right_answers(row: dict) -> set[str]:
    """Return the accepted answers, as plain text. BadRecord if there is none."""
    given = row.get("answer")
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not given or not all(isinstance(each, str) and plain(each) for each in given):
        raise BadRecord('"answer" is not text or a list of texts')
    return {plain(each) for each in given}


def is_right(row: dict, answer: str) -> bool:
    """Tell whether an answer is accepted; of a yes/no question only its first word counts."""
    right = right_answers(row)
    text = plain(answer)
    return (text.partition(" ")[0] if right in YES_OR_NO else text) in right


def score_answers(answered: list[tuple[dict, str]]) -> Scores:
    """Compute accuracy over all and over yes/no questions, and MME's score if yes/no questions come in pairs."""
    results = [(row, is_right(row, answer)) for row, answer in answered]
    yes_no = [(row, correct) for row, correct in results if right_answers(row) in YES_OR_NO]
    groups = {"accuracy": [float(correct) for _, correct in results]}
    if yes_no:
        groups["yes_no_accuracy"] = [float(correct) for _, correct in yes_no]
    means, intervals = summarise(groups)
    categories = defaultdict(list)
    for row, correct in results:
        categories[row.get("category", "")].append(float(correct))
    paired, unpaired = mme_scores(yes_no)
    return Scores(
        means | ({"mme": sum(paired.values())} if paired else {}),
        intervals,
        {"questions": len(results), "yes_no_questions": len(yes_no), "unpaired_images": unpaired},
        {"by_category": {name: sum(own) / len(own) for name, own in categories.items()}, "mme_by_category": paired},
    )


def mme_scores(yes_no: list[tuple[dict, bool]]) -> tuple[dict[str, float], int]:
    """Return MME's score (0 to 200) per category, and the number of images without a pair of questions."""
    images = defaultdict(list)
    for row, correct in yes_no:
        images[row.get("category", ""), row["image"]].append(correct)
    pairs = defaultdict(list)
    for (category, _), answers in images.items():
        if len(answers) == PAIR:
            pairs[category].append(answers)
    scores = {
        category: 100 * (sum(sum(pair) / PAIR for pair in own) + sum(all(pair) for pair in own)) / len(own)
        for category, own in pairs.items()
    }
    return scores, len(images) - sum(len(own) for own in pairs.values())

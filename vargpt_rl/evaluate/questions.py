"""Questions of one's own about images, with answers: exact matches, yes and no, and MME's paired score.

``questions`` is a JSON lines file, ``images`` the folder of its images:

    {"image": "a/1.png", "question": "Is there a dog? Answer yes or no.", "answer": "yes", "category": "existence"}

"answer" may be a list of answers that are all right; "category" may be missing. Answers are compared without case,
punctuation and surplus blanks. A question whose right answer is yes or no is answered by the first word said.

MME (Fu et al., 2023) asks two such questions about each image. A category scores the share of right answers plus the
share of images with both answers right, each times a hundred; the score is the sum over categories. Images with
another number of yes-no questions in a category are left out of it and counted.
"""

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

from PIL import Image

from vargpt_rl.common.averages import mean_and_error
from vargpt_rl.data.images import read_image
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.evaluate.report import Column, Scores
from vargpt_rl.evaluate.rows import quarantine_of, read_rows, text
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.evaluate.subject import EvaluatedModel, QuestionRequest

YES_OR_NO = ({"yes"}, {"no"})
PAIR = 2


class QuestionFile:
    """A file of questions, answered greedily."""

    columns = [Column("accuracy", "accuracy", 3), Column("yes_no_accuracy", "yes/no", 3), Column("mme", "MME score", 1)]

    def __init__(self, config: EvaluateConfig):
        self.config, self.folder = config, Path(config.images)
        if not self.folder.is_dir():
            raise ValueError(f"images={config.images}: no such folder of images")
        self.rows, self.bad = read_rows(config, "questions", self._check)
        self.quarantine = quarantine_of(config)
        self.asked = [QuestionRequest(f"line {number + 1}", row["question"], row["image"]) for number, row in self.rows]

    def _check(self, row: dict) -> None:
        path = PurePosixPath(text(row, "image"))
        if path.is_absolute() or ".." in path.parts:
            raise BadRecord('"image" leaves the image folder')
        if not (self.folder / path).is_file():
            raise BadRecord("there is no such image")
        text(row, "question")
        right_answers(row)
        if not isinstance(row.get("category", ""), str):
            raise BadRecord('"category" is no text')

    def make(self, subject: EvaluatedModel) -> None:
        self._answers(subject)

    def _look(self, name: str) -> Image.Image:
        return read_image(self.folder / name)

    def _answers(self, subject: EvaluatedModel) -> dict[str, str]:
        return subject.answer(self.asked, self._look, self.config.max_tokens, self.quarantine)

    def score(self, subject: EvaluatedModel) -> Scores:
        answers = self._answers(subject)
        answered = [
            (row, answers[asked.key])
            for asked, (_, row) in zip(self.asked, self.rows, strict=True)
            if asked.key in answers
        ]
        lost = len(self.asked) - len(answered)
        self.quarantine.check(len(self.asked), self.config.max_bad_fraction, lost)
        scores = score_answers(answered)
        scores.counts |= {"unanswered": lost, "bad_questions": self.bad}
        return scores


def plain(words: str) -> str:
    """Without case, punctuation and surplus blanks."""
    return " ".join(re.sub(r"[^\w\s]", "", words.lower()).split())


def right_answers(row: dict) -> set[str]:
    """The plain answers that are right. BadRecord where there is none."""
    given = row.get("answer")
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not given or not all(isinstance(each, str) and plain(each) for each in given):
        raise BadRecord('"answer" is neither words nor a list of words')
    return {plain(each) for each in given}


def is_right(row: dict, said: str) -> bool:
    """Whether an answer is one of the right ones; to a yes-no question, whether its first word is."""
    right, words = right_answers(row), plain(said)
    return (words.partition(" ")[0] if right in YES_OR_NO else words) in right


def score_answers(answered: list[tuple[dict, str]]) -> Scores:
    """Shares of right answers over all and over yes-no questions, and MME's score where there are pairs of those."""
    results = [(row, is_right(row, said)) for row, said in answered]
    yes_no = [(row, correct) for row, correct in results if right_answers(row) in YES_OR_NO]
    groups = {"accuracy": [float(correct) for _, correct in results]}
    if yes_no:
        groups["yes_no_accuracy"] = [float(correct) for _, correct in yes_no]
    means = {name: mean_and_error(values) for name, values in groups.items()}
    categories = defaultdict(list)
    for row, correct in results:
        categories[row.get("category", "")].append(float(correct))
    paired, unpaired = mme_scores(yes_no)
    return Scores(
        {name: mean for name, (mean, _) in means.items()} | ({"mme": sum(paired.values())} if paired else {}),
        {name: error for name, (_, error) in means.items()},
        {"questions": len(results), "yes_no_questions": len(yes_no), "unpaired_images": unpaired},
        {"by_category": {name: sum(own) / len(own) for name, own in categories.items()}, "mme_by_category": paired},
    )


def mme_scores(yes_no: list[tuple[dict, bool]]) -> tuple[dict[str, float], int]:
    """MME's score, 0 to 200, of each category, and how many images have no pair of questions in theirs."""
    images = defaultdict(list)
    for row, correct in yes_no:
        images[row.get("category", ""), row["image"]].append(correct)
    pairs = defaultdict(list)
    for (category, _), correct in images.items():
        if len(correct) == PAIR:
            pairs[category].append(correct)
    scores = {
        category: 100 * (sum(sum(pair) / PAIR for pair in own) + sum(all(pair) for pair in own)) / len(own)
        for category, own in pairs.items()
    }
    return scores, len(images) - sum(len(own) for own in pairs.values())

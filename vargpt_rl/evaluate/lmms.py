"""The model for lmms-eval, the harness that the papers measured understanding with: ``lmms-eval --model vargpt``.

Arguments (``--model_args``): ``checkpoint``, a directory or hub name; ``device`` and ``dtype``, both "auto"; and
``answers``, a file in which answers are kept as they come, so that an interrupted run need not ask again. Answers are
greedy; images come before the words, as in training. The module needs lmms-eval, torch and transformers only:
lmms-eval cannot be installed beside this package's other dependencies (it wants another antlr4 than Hydra), so it has
an environment of its own. There, this package is installed without dependencies.

``python -m vargpt_rl.evaluate.lmms JSON`` is what `understanding` runs in that environment; see `LmmsTasks`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from vargpt_rl.data.images import as_rgb
from vargpt_rl.inference.answer import answer
from vargpt_rl.inference.conversation import load
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.lines import as_lines, read_records

MAX_TOKENS = 128
"""Of an answer, where a task does not say."""


def manifest():
    """What lmms-eval's registry is told through the entry point ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest  # being imported itself when it asks

    return ModelManifest(model_id="vargpt", simple_class_path=f"{__name__}.VargptLmms")


class VargptLmms(lmms):
    """Answers lmms-eval's requests. ``weights`` goes into the record of answers, to tell models apart."""

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        answers: str | None = None,
        weights: str = "",
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self._loaded = load(checkpoint, device, dtype)  # in a tuple: lmms-eval deletes models after the first task
        self.batch_size = int(batch_size)
        self.answers, self.weights = answers and Path(answers), weights or str(checkpoint)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """RuntimeError: the papers' benchmarks have the model answer."""
        raise RuntimeError("vargpt answers questions; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """RuntimeError: the papers' benchmarks ask once."""
        raise RuntimeError("vargpt answers single questions; tasks of several rounds are not supported")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, in order."""
        known = {line["key"]: line["answer"] for line in read_records(self.answers)} if self.answers else {}
        asked = [LmmsRequest(self, request) for request in requests]
        missing = [request for request in asked if request.key not in known]
        missing.sort(key=lambda request: request.max_tokens)  # of a batch, all have the same limit
        if missing and self.answers:
            self.answers.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.answers, as_lines(read_records(self.answers)).encode())
        bar = tqdm(total=len(missing), unit="question")
        while missing:
            alike = [r for r in missing[: self.batch_size] if r.max_tokens == missing[0].max_tokens]
            missing = missing[len(alike) :]
            said = answer(*self._loaded, [request.question() for request in alike], alike[0].max_tokens)
            new = {request.key: request.cut(words) for request, words in zip(alike, said, strict=True)}
            known |= new
            if self.answers:
                with self.answers.open("a", encoding="utf-8") as file:
                    file.write(as_lines([{"key": key, "answer": words} for key, words in new.items()]))
            bar.update(len(alike))
        return [known[request.key] for request in asked]


class LmmsRequest:
    """One question of a task. ValueError where it asks for something else than the likeliest words."""

    def __init__(self, model: VargptLmms, instance: Instance):
        self.text, options, self.visual, self.doc, task, split = instance.args
        self.docs = model.task_dict[task][split]
        if options.get("do_sample") or options.get("temperature") or options.get("num_beams", 1) != 1:
            raise ValueError(f"{task}: answers are greedy, but the task asks for {options}")
        until = options.get("until") or []
        self.until = [until] if isinstance(until, str) else list(until)
        self.max_tokens = int(options.get("max_new_tokens", MAX_TOKENS))
        asked = json.dumps([model.weights, task, split, self.doc, self.text, self.until, self.max_tokens])
        self.key = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()

    def question(self) -> tuple[str, Sequence[Image.Image]]:
        """Words and images. ValueError where there is something else to see."""
        shown = (self.visual(self.docs[self.doc]) if self.visual else None) or []
        if not all(isinstance(image, Image.Image) for image in shown):
            raise ValueError(f"expected images, not {[type(image).__name__ for image in shown]}")
        return self.text.replace("<image>", "").strip(), [as_rgb(image) for image in shown]

    def cut(self, words: str) -> str:
        """An answer up to the first of the task's stop words."""
        return words[: min((words.find(stop) for stop in self.until if stop in words), default=None)].strip()


@dataclass(frozen=True)
class LmmsTasks:
    """Tasks to run: each one's results go to ``out``/<task>.json as it ends, with what ``about`` says of the task."""

    checkpoint: str
    device: str
    dtype: str
    batch_size: int
    limit: int | None
    tasks: list[str]
    include: str | None
    out: str
    weights: str
    about: dict[str, dict]


def run(job: LmmsTasks) -> None:
    """Run a job in this process."""
    from lmms_eval.evaluator import simple_evaluate  # slow, and not needed by lmms-eval's own command
    from lmms_eval.tasks import TaskManager

    out = Path(job.out)
    model = VargptLmms(job.checkpoint, job.device, job.dtype, job.batch_size, f"{out}/answers.jsonl", job.weights)
    tasks = TaskManager("INFO", include_path=job.include)
    for task in job.tasks:
        found = simple_evaluate(
            model,
            tasks=[task],
            limit=job.limit,
            log_samples=False,
            task_manager=tasks,
            # What tasks look up: where to write files for judges, and how to name them.
            cli_args=argparse.Namespace(
                output_path=job.out, process_with_media=False, log_samples_suffix="", model="vargpt", tasks=task
            ),
        )
        kept = {"about": job.about[task], "results": found["results"], "n-samples": found.get("n-samples", {})}
        write_atomically(out / f"{task}.json", json.dumps(kept, indent=2, default=str).encode())


if __name__ == "__main__":
    run(LmmsTasks(**json.loads(sys.argv[1])))

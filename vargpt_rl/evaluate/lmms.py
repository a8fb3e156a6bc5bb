"""The model for lmms-eval, the harness that the papers used for understanding: ``lmms-eval --model vargpt``.

Arguments (``--model_args``): ``checkpoint``, a directory or hub name; ``device`` and ``dtype``, both "auto" by default;
and ``answers``, a file to which each answer is appended, so that an interrupted run resumes. Answers are greedy; images
come before the text, as in training. This module needs only lmms-eval, torch and transformers: lmms-eval conflicts with
this package's other dependencies (it needs a different antlr4 than Hydra), so it has its own environment, in which this
package is installed without dependencies.

`understanding` runs ``python -m vargpt_rl.evaluate.lmms JSON`` in that environment; see `LmmsTasks`.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from vargpt_rl.common.bars import progress_bar
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.data.images import as_rgb
from vargpt_rl.inference.conversation import load
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.lines import as_lines, read_records
from vargpt_rl.text.engine import TextRequest, answers
from vargpt_rl.text.transformers_engine import TransformersEngine

MAX_TOKENS = 128
"""Longest answer, unless the task sets a limit."""


def manifest():
    """Register the model with lmms-eval, through the entry point ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest  # lmms-eval is still importing itself here

    return ModelManifest(model_id="vargpt", simple_class_path=f"{__name__}.VargptLmms")


class VargptLmms(lmms):
    """Answers lmms-eval's requests. ``weights`` is recorded with the answers, to tell models apart."""

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
        # Not in an attribute of its own: lmms-eval deletes models after the first task.
        self._engine = TransformersEngine(*load(checkpoint, device, dtype))
        self.batch_size = int(batch_size)
        self.answers = answers and Path(answers)
        self.weights = weights or str(checkpoint)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raise RuntimeError: the papers' benchmarks only need answers."""
        raise RuntimeError("vargpt only answers questions: tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise RuntimeError: the papers' benchmarks have a single round."""
        raise RuntimeError("vargpt answers single questions: tasks of several rounds are not supported")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request, in order."""
        known = {line["key"]: line["answer"] for line in read_records(self.answers)} if self.answers else {}
        questions = [LmmsRequest(self, request) for request in requests]
        missing = [request for request in questions if request.key not in known]
        missing.sort(key=lambda request: request.max_tokens)  # all of a batch have the same limit
        if missing and self.answers:
            self.answers.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.answers, as_lines(read_records(self.answers)).encode())
        bar = progress_bar(name="answer", total=len(missing), unit="question")
        while missing:
            batch = [r for r in missing[: self.batch_size] if r.max_tokens == missing[0].max_tokens]
            missing = missing[len(batch) :]
            texts = answers(self._engine, [request.question() for request in batch], batch[0].max_tokens)
            new = {request.key: request.cut(text) for request, text in zip(batch, texts, strict=True)}
            known |= new
            if self.answers:
                with self.answers.open("a", encoding="utf-8") as file:
                    file.write(as_lines([{"key": key, "answer": text} for key, text in new.items()]))
            bar.update(len(batch))
        return [known[request.key] for request in questions]


class LmmsRequest:
    """One question of a task. ValueError if the task needs anything but greedy decoding."""

    def __init__(self, model: VargptLmms, instance: Instance):
        self.text, options, self.visual, self.doc, task, split = instance.args
        self.docs = model.task_dict[task][split]
        if options.get("do_sample") or options.get("temperature") or options.get("num_beams", 1) != 1:
            raise ValueError(f"{task}: expected greedy decoding, got {options}")
        until = options.get("until") or []
        self.until = [until] if isinstance(until, str) else list(until)
        self.max_tokens = int(options.get("max_new_tokens", MAX_TOKENS))
        identity = json.dumps([model.weights, task, split, self.doc, self.text, self.until, self.max_tokens])
        self.key = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def question(self) -> TextRequest:
        """Return text and images. ValueError for visual input that is not an image."""
        shown = (self.visual(self.docs[self.doc]) if self.visual else None) or []
        if not all(isinstance(image, Image.Image) for image in shown):
            raise ValueError(f"expected images, got {[type(image).__name__ for image in shown]}")
        return TextRequest(self.text.replace("<image>", "").strip(), [as_rgb(image) for image in shown])

    def cut(self, text: str) -> str:
        """Cut an answer at the first of the task's stop strings."""
        return text[: min((text.find(stop) for stop in self.until if stop in text), default=None)].strip()


@dataclass(frozen=True)
class LmmsTasks:
    """Tasks to run. The results of each go to ``out``/<task>.json when it ends, with the task's entry in ``about``."""

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
    """Run the tasks in this process."""
    from lmms_eval.evaluator import simple_evaluate  # slow to import, and not needed by the lmms-eval command
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
            # Tasks read these to write and name the files for judges.
            cli_args=argparse.Namespace(
                output_path=job.out, process_with_media=False, log_samples_suffix="", model="vargpt", tasks=task
            ),
        )
        kept = {"about": job.about[task], "results": found["results"], "n-samples": found.get("n-samples", {})}
        write_atomically(out / f"{task}.json", json.dumps(kept, indent=2, default=str).encode())


if __name__ == "__main__":
    make_outputs_lasting()
    run(LmmsTasks(**json.loads(sys.argv[1])))

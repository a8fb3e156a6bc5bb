"""The rollout side of an iteration: encode images, serve weights, draw, build and score pairs, evaluate.

Everything here is done by the pool's workers; this module says what and keeps the books.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file

from actors.pool import RolloutPool
from actors.weights import SwapReport
from actors.worker import BaseWorker, Failure, PromptedBits, Worker
from rewards.combined import scorers
from rewards.preferences import check_books
from vargpt_rl.common.averages import mean_and_error
from vargpt_rl.data.preferences import read_table, write_table
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.samples import Probe, Prompt, Record, Sample, Winner
from vargpt_rl.data.sources import ImageCheck, Source
from vargpt_rl.driver.run import Run
from vargpt_rl.evaluate.held_out import Fidelity, preference_scores
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.storage.checkpoint import WEIGHTS, check_checkpoint
from vargpt_rl.storage.files import sync, write_atomically

PROMPTS = "prompts.jsonl"
"""The file of a corpus that is written last."""
PROBE_TOLERANCE = 1e-3
"""Nats by which learner and worker may differ on one image in fp32: the order of additions, over all its bits."""


def seeds_for(count: int, *purpose: int) -> list[int]:
    """Seeds that depend on what they are for and on nothing else."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


def apportion(count: int, shares: list[float], seed: int) -> np.ndarray:
    """Which share each of ``count`` items belongs to, int64: as many of each as it says, in random order."""
    ends = np.rint(np.cumsum(shares) / sum(shares) * count).astype(int)
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(shares)), np.diff(ends, prepend=0)))


def _owners(weights: Sequence[Path]) -> dict[str, Path]:
    """Which of these weight sets each tensor is from: the last that has it. ValueError for a damaged set."""
    owners: dict[str, Path] = {}
    for directory in weights:
        with safe_open(check_checkpoint(directory), framework="np") as file:
            owners |= dict.fromkeys(file.keys(), directory)
    return owners


class Rollouts:
    """What a run asks of its workers. ``serve`` decides which weights they hold; everything else uses those.

    ``text`` writes in the place of ``pool``, where there is one.
    """

    def __init__(
        self,
        pool: RolloutPool,
        source: Source,
        run: Run,
        quarantine: Quarantine,
        sampling: SamplingConfig,
        text: RolloutPool | None = None,
    ):
        self.pool, self.source, self.run, self.quarantine, self.sampling = pool, source, run, quarantine, sampling
        self.text = text
        self.owners: dict[str, Path] = {}  # which weight set each tensor in the workers is from

    # Weights

    def serve(self, weights: tuple[Path, ...]) -> dict:
        """Swap the workers to the model that these weight sets add up to; what it took. Only what differs travels.

        The workers of a run that goes on are first given what the last ones held, under the same versions: a step then
        has the same versions whether or not the run was cut off before it.
        """
        version, paths = self.run.served["version"], self.run.served["weights"]
        held = [Path(os.path.normpath(self.run.directory / path)) for path in paths]
        if held and not self.owners:
            self._swap(held, version - len(set(_owners(held).values())))
        return self._swap(weights, self.run.served["version"])

    def _swap(self, weights: Sequence[Path], version: int) -> dict:
        """``serve``, with the versions after ``version``, or after the pool's, where another run has used it before."""
        wanted = _owners(weights)
        if stale := self.owners.keys() - wanted.keys():
            raise RuntimeError(f"workers hold {len(stale)} tensors that {weights} do not set, among them {min(stale)}")
        swap = {"version": version, "bytes": 0, "seconds": 0.0, "verified": True}
        for directory in weights:
            if any(self.owners.get(name) != directory for name, owner in wanted.items() if owner == directory):
                version = max(version, self.pool.version) + 1
                report = self._publish(self.pool, directory / WEIGHTS, version)
                if self.text:
                    self._publish(self.text, directory / WEIGHTS, version, "swap/text")
                swap = {
                    "version": report.version,
                    "bytes": swap["bytes"] + report.bytes,
                    "seconds": swap["seconds"] + report.seconds,
                    "verified": True,
                }
        self.owners = wanted
        self.run.served = {
            "version": version,
            "weights": [os.path.relpath(directory, self.run.directory) for directory in weights],
        }
        return swap

    def _publish(self, pool: RolloutPool, path: Path, version: int, stage: str = "swap") -> SwapReport:
        report = pool.publish(path, version)
        if not report.verified:
            raise RuntimeError(f"{path}: workers report other weights than version {version}")
        self.run.log(stage, version, {key: v for key, v in asdict(report).items() if key != "checksum"})
        return report

    def agree(self, probe: Probe, learner: float) -> float:
        """The largest difference in nats between the learner's and the workers' score of the probe.

        RuntimeError when it is above the tolerance: the weights that serve are not those that were trained.
        """
        workers = self.pool.probe(probe.prompt, probe.bits, probe.resolution)
        worst = max(abs(value - learner) for value in workers)
        if not worst <= PROBE_TOLERANCE + 1e-6 * abs(learner):
            raise RuntimeError(f"after the swap workers score the probe {workers}, the learner {learner}")
        return worst

    # Images of the data source

    def encode_corpus(self, records: list[Record], resolution: int, folder: Path) -> tuple[dict, Probe]:
        """Encode training images into ``folder`` (see ``learners.sft.Drawings``); the first one is the probe.

        Images that prompts show stay keys, which the learners load; those that cannot be loaded are found out here.
        """
        if (folder / PROMPTS).exists():
            return self._encoded(records, resolution, folder)
        kept, features, probe = [], [], None
        results = self.pool.run(Worker.encode, [record.image for record in records], resolution)
        faults = self._faults([record.prompt for record in records])
        for record, encoded in zip(records, results, strict=True):
            result = faults.get(record.prompt.shown) or encoded
            if isinstance(result, Failure):
                self.quarantine.add(result.key, record.prompt.text, result.reason)
                continue
            kept.append(record)
            features.append(result.features)
            probe = probe or Probe(record.prompt, result.bits, resolution)
        if probe is None:
            raise ValueError(f"none of {len(records)} training images could be read; see {self.quarantine.path}")
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"features": np.stack(features)}, folder / "features.safetensors")
        sync(folder / "features.safetensors")
        lines = [json.dumps(asdict(record.prompt)) for record in kept]
        write_atomically(folder / PROMPTS, ("\n".join(lines) + "\n").encode())
        return {"images": len(kept), "failed": len(records) - len(kept)}, probe

    def _faults(self, prompts: list[Prompt]) -> dict[str, Failure]:
        """By key, the images shown by prompts that cannot be loaded."""
        shown = dict.fromkeys((p.shown, p.shown_side) for p in prompts if p.shown is not None)
        found = {}
        for side in {side for _, side in shown}:
            keys = [key for key, of_side in shown if of_side == side]
            found |= {
                fault.key: fault for fault in self.pool.run(Worker.find_unreadable, keys, side) if fault is not None
            }
        return found

    def _encoded(self, records: list[Record], resolution: int, folder: Path) -> tuple[dict, Probe]:
        """What `encode_corpus` returns, of a corpus that it finished before the run was cut off."""
        ids = [json.loads(line)["id"] for line in (folder / PROMPTS).read_text().splitlines()]
        first = next(record for record in records if record.prompt.id == ids[0])
        (result,) = self.pool.run(Worker.encode, [first.image], resolution)
        if isinstance(result, Failure):
            raise ValueError(f"{first.image}: could be read before, but not any more: {result.reason}")
        return {"images": len(ids), "failed": len(records) - len(ids)}, Probe(first.prompt, result.bits, resolution)

    def encode_winners(self, prompts: list[Prompt], resolution: int) -> dict[str, Winner]:
        """The stronger system's images as bits, by prompt id; a prompt without one, or unreadable, is left out."""
        keys = {prompt.id: key for prompt in prompts if (key := self.source.winner_key(prompt)) is not None}
        with_winner = [prompt for prompt in prompts if prompt.id in keys]
        results = self.pool.run(Worker.encode, [keys[prompt.id] for prompt in with_winner], resolution)
        winners = {}
        for prompt, result in zip(with_winner, results, strict=True):
            if isinstance(result, Failure):
                self.quarantine.add(result.key, prompt.text, result.reason)
            else:
                winners[prompt.id] = Winner(prompt, result.bits, resolution, keys[prompt.id])
        return winners

    # Drawing and pairs

    def draw(self, prompts: list[Prompt], seeds: list[int], resolution: int, name: str) -> tuple[list[Sample], float]:
        """Draw with the weights being served, called ``name`` in the samples; also the seconds it took.

        Where ``rollout.reply`` is generate, the model first says what it will before an image.
        """
        began = time.perf_counter()
        if self.pool.config.reply == "generate":
            prompts = self._with_own_replies(prompts)
        samples = self.pool.run(
            Worker.generate_images, list(zip(prompts, seeds, strict=True)), resolution, self.sampling, name
        )
        return samples, time.perf_counter() - began

    def _with_own_replies(self, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts with the model's own words; those where it begins no image are counted and stay as they are.

        So do edits, whose words are not asked for: an instruction without its image means little.
        """
        plain = [prompt for prompt in prompts if prompt.shown is None]
        if not plain:
            return prompts
        texts = list(dict.fromkeys(prompt.text for prompt in plain))
        replies = self._writer.run(BaseWorker.reply, texts, self.pool.config.reply_tokens)
        said = dict(zip(texts, replies, strict=True))
        template = sum(said[prompt.text] is None for prompt in plain)
        self.run.log("reply", self.pool.version, {"generated": len(plain) - template, "template": template})
        return [p if p.shown is not None or said[p.text] is None else replace(p, reply=said[p.text]) for p in prompts]

    @property
    def _writer(self) -> RolloutPool:
        return self.text or self.pool

    def write_pairs(
        self,
        path: Path,
        samples: list[Sample],
        builder: Callable,
        reward: Callable | None,
        micro_batch: int,
        part: bool = False,
    ) -> dict:
        """Build pairs of samples and winners, score both sides with the weights being served, and write the table.

        Rows are written in a random order and scored in the very micro-batches that the learner trains on first, so
        that at step 0 both sides run the same kernels on the same shapes and agree to the last bit, or nearly. Without
        a pair it is a ValueError, unless this is ``part`` of a table only.
        """
        prompts = list({sample.prompt.id: sample.prompt for sample in samples}.values())
        winners = self.encode_winners(prompts, samples[0].resolution)
        rewards, report = self._rewards(samples, winners, reward)
        pairs, dropped = builder(samples, winners, *rewards)
        check_books(samples, pairs, dropped)
        if not (pairs or part):
            raise ValueError(f"no pair could be built of {len(samples)} samples; dropped: {dict(dropped)}")
        resolution = samples[0].resolution
        pairs = [pairs[i] for i in np.random.default_rng(seeds_for(1, len(pairs))[0]).permutation(len(pairs))]
        groups = [pairs[at : at + micro_batch] for at in range(0, len(pairs), micro_batch)]
        items = []
        for group in groups:  # ordered as the learner's batches are: [all chosen, all rejected]
            items += [(pair.prompt, pair.chosen.bits) for pair in group]
            items += [(pair.prompt, pair.rejected.bits) for pair in group]
        scores = iter(self.pool.run(Worker.score, items, resolution, batch_size=2 * micro_batch))
        rows = []
        for group in groups:
            chosen, rejected = ([next(scores) for _ in group] for _ in range(2))
            rows += [p.row(c, r, self.pool.version) for p, c, r in zip(group, chosen, rejected, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        origin = {
            "samples": len(samples),
            "prompts": len(prompts),
            "prompts_without_winner": len(prompts) - len(winners),
            "dropped_by_reason": dict(dropped),
        }
        write_table(path, rows, origin)
        counts = {"built": len(pairs), "dropped": sum(dropped.values()), **origin}
        return counts | ({"rewards": report} if report else {})

    def judging(self, reward: Callable | None) -> AbstractContextManager[Callable | None]:
        """The reward, whose processes then run for as long as the context does; None without a reward."""
        return nullcontext() if reward is None else scorers(reward)

    def _rewards(self, samples: list[Sample], winners: dict[str, Winner], reward: Callable | None) -> tuple:
        """The rewards of samples, and of winners by prompt id, with the report of `_judge`; None without a reward."""
        if reward is None:
            return (None, None), None
        items = [(drawn.prompt, drawn.bits) for drawn in (*samples, *winners.values())]
        values, report = self._judge(items, samples[0].resolution, reward)
        return (values[: len(samples)], dict(zip(winners, values[len(samples) :], strict=True))), report

    def _judge(self, items: list[PromptedBits], resolution: int, reward: Callable) -> tuple[list[float | None], dict]:
        """What the reward says of each image, and what became of them, by term.

        ValueError where no image at all is scored.
        """
        with scorers(reward) as live:
            values, report = self.pool.run(Worker.reward, items, resolution, live), live.report()
        for name, term in report.items():
            unscored = {f"unscored/{reason}": count for reason, count in term["unscored"].items()}
            numbers = {key: term[key] for key in ("scored", "mean", "seconds", "restarts") if term[key] is not None}
            self.run.log(f"reward/{name}", self.pool.version, numbers | unscored)
        if all(value is None for value in values):
            why = {name: term["errors"] or term["unscored"] for name, term in report.items()}
            raise ValueError(f"none of {len(values)} images was scored by the reward; see reward.path: {why}")
        return values, report

    # Evaluation

    def score_drawings(self, samples: list[Sample], reward: Callable | None, judge: Callable | None = None) -> dict:
        """Held-out score of drawn images: the source's exact check, if it has one, and what ``judge`` says beside it.

        Elsewhere it is the mean of ``judge``, or without one of the training reward, if there is that.
        """
        items: list[PromptedBits] = [(sample.prompt, sample.bits) for sample in samples]
        resolution = samples[0].resolution
        if check := self.source.image_check():
            scores = self._checked(items, resolution, check)
            if judge:
                scores["judge"], scores["judge_stderr"], scores["judge_n"] = self._mean(items, resolution, judge)
            return scores
        if not (judge or reward):
            return {"n": len(samples)}
        mean, error, count = self._mean(items, resolution, judge or reward)
        return {"overall": mean, "overall_stderr": error, "n": count, "unscored": len(samples) - count}

    def _mean(self, items: list[PromptedBits], resolution: int, reward: Callable) -> tuple[float, float, int]:
        """Mean of a reward over the images that it scores, its standard error, and how many these are."""
        values = [value for value in self._judge(items, resolution, reward)[0] if value is not None]
        return *mean_and_error(values), len(values)

    def reconstructions(self, prompts: list[Prompt], resolution: int) -> dict[str, float]:
        """What the image tokenizer keeps of the stronger system's images of held-out prompts.

        The scores of the source's exact check if it has one, else the peak signal-to-noise ratio in dB.
        """
        winners = self.encode_winners(prompts, resolution).values()
        if check := self.source.image_check():
            return self._checked([(winner.prompt, winner.bits) for winner in winners], resolution, check)
        items = [(Prompt(winner.source, winner.prompt.text), winner.bits) for winner in winners]
        ratio, error = mean_and_error(self.pool.run(Worker.check, items, resolution, Fidelity(self.source, resolution)))
        return {"psnr": ratio, "psnr_stderr": error, "n": len(items)}

    def score_edits(self, samples: list[Sample]) -> dict[str, float]:
        """The scores of the source's exact check of edits; empty if it has none."""
        check = self.source.edit_check()
        items = [(sample.prompt, sample.bits) for sample in samples]
        return self._checked(items, samples[0].resolution, check) if check else {}

    def _checked(self, items: list[PromptedBits], resolution: int, check: ImageCheck) -> dict[str, float]:
        """The scores of an exact check, which runs in the workers."""
        return check.scores([prompt for prompt, _ in items], self.pool.run(Worker.check, items, resolution, check))

    def prefer(self, table: Path, beta: float) -> dict[str, float]:
        """The weights being served on a table of held-out pairs, against the reference scores in it."""
        rows = read_table(table)
        resolution = int(rows.resolution[0])
        prompts = [Prompt(*row) for row in rows[["prompt_id", "prompt", "reply"]].itertuples(index=False)]
        scores = {}
        for side in ("chosen", "rejected"):
            items = list(zip(prompts, rows[f"{side}_bits"], strict=True))
            scores[side] = [score.total for score in self.pool.run(Worker.score, items, resolution)]
        references = rows.reference_chosen_logp, rows.reference_rejected_logp
        return preference_scores(scores["chosen"], scores["rejected"], *references, beta)

    def predict(self, prompts: list[Prompt], resolution: int) -> dict[str, float]:
        """The weights being served on the source's own images of these prompts, in nats a bit; chance is ln 2."""
        winners = list(self.encode_winners(prompts, resolution).values())
        scores = self.pool.run(Worker.score, [(winner.prompt, winner.bits) for winner in winners], resolution)
        each = [-score.total / (8 * len(winner.bits)) for winner, score in zip(winners, scores, strict=True)]
        mean, error = mean_and_error(each)
        return {"nats": mean, "nats_stderr": error, "n": len(each)}

    def answer_questions(self, count: int, side: int) -> dict[str, float]:
        """Share of held-out questions answered in exactly the right words; empty where the source has none."""
        rows = self.source.questions(count, 0, "held_out")
        if not rows:
            return {}
        answers = self._writer.run(BaseWorker.answer, [(key, question) for key, question, _ in rows], side)
        right = [float(answer == truth) for answer, (_, _, truth) in zip(answers, rows, strict=True)]
        accuracy, error = mean_and_error(right)
        return {"accuracy": accuracy, "accuracy_stderr": error, "n": len(right)}

    def track_pairs(self, pairs: pd.DataFrame, folder: Path) -> None:
        """Show rows of a preference table in wandb, with their images; ``folder`` has those for the moment."""
        if self.run.tracker is None or pairs.empty:
            return
        prompts = [Prompt(*row) for row in pairs[["prompt_id", "prompt", "reply"]].itertuples(index=False)]
        resolution, shown = int(pairs.resolution.iloc[0]), pairs[["prompt"]].copy()
        folder.mkdir(parents=True, exist_ok=True)
        for name, side in (("loser", "rejected"), ("winner", "chosen")):
            files = [f"{name}-{i:02d}.png" for i in range(len(pairs))]
            items = list(zip(prompts, pairs[f"{side}_bits"], strict=True))
            named = list(zip(items, files, strict=True))
            shown[name] = self.pool.run(Worker.write_images, named, resolution, str(folder))
            for what in ("reward", "source", "version"):
                shown[f"{name} {what}"] = pairs[f"{side}_{what}"]
            shown[f"{name} reference log-prob"] = pairs[f"reference_{side}_logp"]
        shown["reference version"] = pairs.reference_version
        self.run.log_table("pairs/table", shown)
        shutil.rmtree(folder)

    def draw_row(self, samples: list[Sample], folder: Path, name: str) -> list[Path]:
        """Write samples as ``folder/name-NN.png``, a row of the sample grid."""
        folder.mkdir(parents=True, exist_ok=True)
        items = [((sample.prompt, sample.bits), f"{name}-{i:02d}.png") for i, sample in enumerate(samples)]
        return self.pool.run(Worker.write_images, items, samples[0].resolution, str(folder))

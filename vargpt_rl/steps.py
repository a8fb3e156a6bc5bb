"""The steps of a run, one method each: what is trained, drawn, paired and measured, with which weights.

Each method returns a small JSON object for the run's record. ``weights`` is the policy so far: weight sets over the
starting model, in order. Ray and DeepSpeed are behind ``rollouts`` and ``learners``.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from actors.rollout import Rollouts, seeds_for
from configs.schema import LoopConfig
from learners.config import Recipe
from learners.jobs import DpoJob, QuestionSet, SftJob, Start, TokenizerJob, training_checkpoints
from rewards.preferences import external_winner
from vargpt_rl.data.preferences import read_table
from vargpt_rl.data.records.feed import Feed
from vargpt_rl.data.types import Probe, Prompt, Record
from vargpt_rl.evaluate.grid import sample_grid
from vargpt_rl.inputs import Inputs
from vargpt_rl.model.bits import pack
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.prompt import REPLY
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.run import Run

# What seeds are for, beside the run's seed and the iteration.
CORPUS, PROMPTS, LOSERS, HELD_OUT = range(4)


@dataclass
class Steps:
    """One run's state between steps. ``learners`` is a ``learners.group.LearnerGroup``."""

    settings: LoopConfig
    run: Run
    inputs: Inputs
    rollouts: Rollouts
    learners: object
    weights: tuple[Path, ...] = ()
    iteration: int = 0
    resolution: int = 0
    config: LoopConfig | None = None

    def begin(self, iteration: int | None, resolution: int) -> None:
        """Work at this resolution from now on, with the settings that are in force there."""
        self.iteration, self.resolution = iteration or 0, resolution
        self.config = self.settings.at_resolution(resolution)
        self.rollouts.pool.config = self.config.rollout
        self.run.where = {"iteration": iteration, "resolution": resolution}

    @property
    def name(self) -> str:
        return f"iter-{self.iteration:02d}"

    def checkpoint(self, key: str) -> Path:
        """Where a training step keeps its weights."""
        return self.run.directory / "checkpoints" / key

    def adopt(self, key: str) -> None:
        """Take the final weights of a training step, whose result is recorded, into the policy."""
        self.weights = (*self.weights, self.checkpoint(key) / "final")
        self.forget(key)

    def forget(self, key: str) -> None:
        """Remove what a training step whose result is recorded would have been resumed from."""
        shutil.rmtree(training_checkpoints(self.checkpoint(key)), ignore_errors=True)

    # Training

    def _follow(self, stage: str, steps: int) -> Callable[[dict], None]:
        bar = tqdm(total=steps, desc=f"{stage} {self.resolution or ''}".strip())

        def on_log(line: dict) -> None:
            step = line.pop("step")
            bar.update(step - bar.n)
            if "loss" in line:
                bar.set_postfix(loss=f"{line['loss']:.3f}")
                self.run.log(stage, step, {key: value for key, value in line.items() if key != "epoch"})
            if step == steps:
                bar.close()

        return on_log

    def tokenizer(self) -> dict:
        """Adapt the image tokenizer to the data source's pictures, winners included."""
        settings, source = self.config.tokenizer, self.inputs.source
        records = source.records(settings.pictures, self.config.seed)
        winners = [key for record in records if (key := source.winner_key(record.prompt))]
        keys = [*dict.fromkeys(record.picture for record in records), *dict.fromkeys(winners)]
        start, output = Start(self.inputs.model, self.weights), self.checkpoint("tokenizer")
        job = TokenizerJob(
            start, keys, source, self.resolution, settings.steps, settings.batch, settings.lr, output, self.config.seed
        )
        result = self.learners.tokenizer(job, self._follow("tokenizer", settings.steps))
        for key, reason in result.pop("failures"):
            self.inputs.quarantine.add(key, key, reason)
        return result

    def supervised(
        self,
        stage: str,
        key: str,
        records: list[Record] | Feed,
        recipe: Recipe,
        questions: QuestionSet | None = None,
        save_steps: tuple[int, ...] = (),
    ) -> dict:
        """Train a supervised stage from the policy so far, swap the result in, and check that workers agree."""
        self.rollouts.serve(self.weights)
        corpus, feed = self.run.directory / "data" / key, None
        if isinstance(records, Feed):
            feed, counts, probe = records, {}, self._probe()
        else:
            counts, probe = self.rollouts.encode_corpus(records, self.resolution, corpus)
            self.inputs.check_quarantine()
        start, seed = Start(self.inputs.model, self.weights), self.config.seed + self.iteration
        job = SftJob(stage, start, corpus, recipe, self.checkpoint(key), seed, probe, questions, save_steps, feed)
        result = self.learners.sft(job, self._follow(stage, recipe.steps))
        shutil.rmtree(corpus, ignore_errors=feed is not None)
        if feed is not None:
            counts = {"bad_records": self.inputs.quarantine.gather(feed.quarantine)}
        return result | {"corpus": counts, "swap": self._swap(key, probe, result.pop("probe"))}

    def _probe(self) -> Probe:
        """Random bits: a picture as good as any other to compare weights by."""
        tokens = token_count(schedule_for(self.resolution))
        depth = VargptConfig.from_pretrained(self.inputs.model).image_tokenizer_config.bits
        bits = np.random.default_rng(self.config.seed).integers(0, 2, (tokens, depth))
        return Probe(Prompt("probe", "a picture", REPLY), pack(bits), self.resolution)

    def _drawings(self, count: int, seed: int, share: float = 1.0) -> list[Record] | Feed:
        """What a stage learns to draw; a stream is endless, and has the questions too."""
        if self.inputs.feed is not None:
            return self.inputs.feed.at(self.resolution, share)
        return self.inputs.source.records(count, seed)

    def _swap(self, key: str, probe: Probe, learner: float) -> dict:
        swap = self.rollouts.serve((*self.weights, self.checkpoint(key) / "final"))
        return swap | {"probe_difference": self.rollouts.agree(probe, learner)}

    def pretrain(self) -> dict:
        records = self._drawings(self.config.pretrain.records, self.config.seed)
        return self.supervised("pretrain", "pretrain", records, self.config.pretrain.recipe)

    def understanding(self) -> dict:
        settings, source = self.config.understanding, self.inputs.source
        questions = None
        if self.inputs.feed is None:
            rows = source.questions(settings.questions, self.config.seed + 1, "train")
            questions = QuestionSet(rows, source, settings.drawing_share, self.config.data.seen_side)
        records = self._drawings(settings.records, self.config.seed + 1, settings.drawing_share)
        return self.supervised("understanding", "understanding", records, settings.recipe, questions)

    def sft(self) -> dict:
        settings = self.config.sft
        seed = seeds_for(1, self.config.seed, self.iteration, CORPUS)[0]
        records = self._drawings(settings.records, seed)
        return self.supervised("sft", f"{self.name}-sft", records, settings.recipe, save_steps=self._save_steps())

    def _save_steps(self) -> tuple[int, ...]:
        steps = self.config.sft.recipe.steps
        return tuple(sorted({max(1, round(fraction * steps)) for fraction in self.config.sft.checkpoints} - {steps}))

    def dpo(self) -> dict:
        """DPO on this iteration's pairs, from the final SFT weights, which are the reference."""
        settings, table, key = self.config.dpo, self.table(), f"{self.name}-dpo"
        row = read_table(table).iloc[0]
        probe = Probe(Prompt(row.prompt_id, row.prompt, row.reply), row.chosen_bits, self.resolution)
        start, seed = Start(self.inputs.model, self.weights), self.config.seed + self.iteration
        job = DpoJob(start, table, settings.recipe, settings, self.checkpoint(key), seed, probe)
        self.rollouts.serve(self.weights)
        result = self.learners.dpo(job, self._follow("dpo", settings.recipe.steps))
        return result | {"swap": self._swap(key, probe, result.pop("probe"))}

    def control(self) -> dict:
        """SFT on the winners of this iteration's pairs: same start, same winners, steps and learning rate as DPO."""
        rows = read_table(self.table()).drop_duplicates("prompt_id")
        prompts = [Prompt(*row) for row in rows[["prompt_id", "prompt", "reply"]].itertuples(index=False)]
        records = [Record(prompt.id, prompt, self.inputs.source.winner_key(prompt)) for prompt in prompts]
        key = f"{self.name}-control"
        result = self.supervised("sft_on_winners", key, records, self.config.dpo.recipe)
        return result | {"eval": self.evaluate("control", (*self.weights, self.checkpoint(key) / "final"))}

    # Drawing, pairs, measures

    def table(self, split: str = "") -> Path:
        """The preference table of this iteration; ``split`` "held-out" for the one that is only measured on."""
        return self.run.directory / "preferences" / ("-".join(filter(None, [self.name, split])) + ".parquet")

    def pairs(self) -> dict:
        """Draw losers from the SFT checkpoints, then build pairs and score them with the final SFT weights."""
        final = self.weights[-1]
        sources = [final.with_name(f"step-{step:06d}") for step in self._save_steps()] + [final]
        prompts = self.inputs.prompts or self.inputs.source.prompts(
            "train", self.config.preference.count, seeds_for(1, self.config.seed, self.iteration, PROMPTS)[0]
        )
        prompts = [p for p in prompts[: self.config.preference.count] for _ in range(self.config.preference.samples)]
        seeds = seeds_for(len(prompts), self.config.seed, self.iteration, LOSERS)
        samples, seconds = [], 0.0
        for i, directory in enumerate(sources):
            share = slice(i, None, len(sources))
            self.rollouts.serve((*self.weights[:-1], directory))
            name = f"{directory.parent.name}/{directory.name}"
            drawn, spent = self.rollouts.draw(prompts[share], seeds[share], self.resolution, name)
            samples, seconds = samples + drawn, seconds + spent
        self.rollouts.serve(self.weights)
        counts = self.rollouts.write_pairs(
            self.table(), samples, self.inputs.builder, self.inputs.reward, self.config.dpo.recipe.micro_batch
        )
        self.inputs.check_quarantine()
        if counts["built"] + counts["dropped"] != len(prompts):
            raise RuntimeError(f"{len(prompts)} prompts gave {counts}: each must be paired or dropped exactly once")
        rollout = {
            "images": len(samples),
            "seconds": seconds,
            "images_per_second": len(samples) / seconds,
            "checkpoints": sorted({sample.checkpoint for sample in samples}),
        }
        self.run.log("rollout", self.iteration, {k: v for k, v in rollout.items() if k != "checkpoints"})
        return {"rollout": rollout, "pairs": counts}

    def _held_out(self, count: int) -> tuple[list[Prompt], list[int]]:
        prompts = self.inputs.source.prompts("held_out", count, self.config.seed)
        return prompts, seeds_for(len(prompts), self.config.seed, HELD_OUT)

    def before(self) -> dict:
        """The first row of the sample grid: the policy that the iteration starts from."""
        self.rollouts.serve(self.weights)
        prompts, seeds = self._held_out(self.config.evaluation.grid)
        samples, _ = self.rollouts.draw(prompts, seeds, self.resolution, "before")
        self._row("before", samples)
        return {}

    def evaluate(self, moment: str, weights: tuple[Path, ...]) -> dict:
        """Draw held-out prompts, always with the same seeds, and measure; after SFT also fix the held-out pairs."""
        self.rollouts.serve(weights)
        prompts, seeds = self._held_out(self.config.evaluation.prompts)
        samples, _ = self.rollouts.draw(prompts, seeds, self.resolution, f"{self.name}-{moment}")
        result = self.rollouts.score_drawings(samples, self.inputs.reward)
        if moment == "after_sft":
            table, size = self.table("held-out"), self.config.rollout.batch_size
            result["pairs"] = self.rollouts.write_pairs(table, samples, external_winner, None, size)["built"]
        else:
            result |= self.rollouts.prefer(self.table("held-out"), self.config.dpo.beta)
        self._row(moment, samples[: self.config.evaluation.grid])
        self.run.log(f"evaluate/{moment}", self.iteration, {k: v for k, v in result.items() if v is not None})
        return result

    def _row(self, label: str, samples: list) -> None:
        self.rollouts.draw_row(samples, self.run.directory / "samples" / self.name, label)

    def sample_grid(self) -> dict:
        """Compose the iteration's grid: the rows drawn so far and the winners."""
        folder, size = self.run.directory / "samples" / self.name, self.config.evaluation.grid
        prompts, _ = self._held_out(size)
        rows = {}
        for label in ("before", "after_sft", "control", "after_dpo"):
            if pictures := sorted(folder.glob(f"{label}-*.png"))[:size]:
                rows[label.replace("_", " ")] = pictures
        winners = [key for prompt in prompts if (key := self.inputs.source.winner_key(prompt))]
        if len(winners) == len(prompts):
            rows["winner"] = []
            for i, key in enumerate(winners):
                rows["winner"].append(folder / f"winner-{i:02d}.png")
                self.inputs.source.load(key, self.resolution).save(rows["winner"][-1])
        path = folder.with_suffix(".png")
        sample_grid(rows, [prompt.text for prompt in prompts], path)
        self.run.log_pictures(path)
        shutil.rmtree(folder)
        return {"path": str(path.relative_to(self.run.directory))}

    def understands(self) -> dict:
        """Held-out questions, with the policy so far."""
        self.rollouts.serve(self.weights)
        return self.rollouts.answer_questions(self.config.evaluation.questions, self.config.data.seen_side)

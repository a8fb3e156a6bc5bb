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

from configs.schema import LoopConfig
from learners.checkpoints import prune
from learners.config import Recipe
from learners.jobs import DpoJob, QuestionSet, SftJob, TokenizerJob, training_checkpoints
from rewards.preferences import external_winner
from vargpt_rl.data.pair_statistics import statistics
from vargpt_rl.data.preferences import part_path, read_table
from vargpt_rl.data.records.loading import EDITS, RecordStream
from vargpt_rl.data.samples import Probe, Prompt, Record
from vargpt_rl.driver.inputs import Inputs
from vargpt_rl.driver.losers import Losers
from vargpt_rl.driver.rollout import PROMPTS as ENCODED
from vargpt_rl.driver.rollout import Rollouts, apportion, seeds_for
from vargpt_rl.driver.run import Run
from vargpt_rl.evaluate.grid import sample_grid
from vargpt_rl.evaluate.pair_plot import plot_pairs
from vargpt_rl.model.bits import pack
from vargpt_rl.model.families import load_config
from vargpt_rl.model.prompt import REPLY
from vargpt_rl.model.scales import token_count
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.export import keep_best
from vargpt_rl.storage.files import remove_dir

# What seeds are for, beside the run's seed and the iteration.
CORPUS, PROMPTS, LOSERS, HELD_OUT, SOURCES = range(5)


@dataclass
class Steps:
    """One run's state between steps. ``learners`` is a ``learners.group.LearnerGroup``, ``training`` its DPO where
    that has begun beside the making of its pairs."""

    settings: LoopConfig
    run: Run
    inputs: Inputs
    rollouts: Rollouts
    learners: object
    weights: tuple[Path, ...] = ()
    iteration: int = 0
    resolution: int = 0
    config: LoopConfig | None = None
    name: str = ""
    training: object | None = None

    def begin(self, iteration: int | None, resolution: int, name: str = "") -> None:
        """Work at this resolution from now on, with the settings that are in force there; ``name`` is a stage's."""
        self.iteration, self.resolution = iteration or 0, resolution
        self.name = name or f"iter-{self.iteration:02d}"
        self.config = self.settings.at_resolution(resolution)
        self.rollouts.pool.config = self.config.rollout
        self.run.where = {"iteration": iteration, "resolution": resolution}

    def checkpoint(self, key: str) -> Path:
        """Where a training step keeps its weights."""
        return self.run.directory / "checkpoints" / key

    def adopt(self, key: str) -> None:
        """Take the final weights of a training step, whose result is recorded, into the policy."""
        self.weights = (*self.weights, self.checkpoint(key) / "final")
        self.forget(key)

    def forget(self, key: str) -> None:
        """Remove what a training step whose result is recorded would have been resumed from, but what is to be kept."""
        prune(training_checkpoints(self.checkpoint(key)), 0, self.config.learner.keep_every)

    # Training

    def _follow(self, stage: str, recipe: Recipe, ranks: int) -> Callable[[dict], None]:
        print(f"{stage} {self.resolution} px: {recipe.arithmetic(ranks)}", flush=True)
        steps = recipe.steps
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
        """Adapt the image tokenizer to the data source's images, winners included."""
        settings, source = self.config.tokenizer, self.inputs.source
        records = source.records(settings.images, self.config.seed)
        winners = [key for record in records if (key := source.winner_key(record.prompt))]
        keys = [*dict.fromkeys(record.image for record in records), *dict.fromkeys(winners)]
        job = TokenizerJob(
            start=Policy(self.inputs.model, self.weights),
            keys=keys,
            source=source,
            side=self.resolution,
            steps=settings.steps,
            batch=settings.batch,
            lr=settings.lr,
            output=self.checkpoint("tokenizer"),
            seed=self.config.seed,
        )
        recipe = Recipe(steps=settings.steps, batch=settings.batch, micro_batch=settings.batch)
        result = self.learners.run(job, self._follow("tokenizer", recipe, ranks=1))
        for key, reason in result.pop("failures"):
            self.inputs.quarantine.add(key, key, reason)
        return result

    def supervised(
        self,
        stage: str,
        key: str,
        records: list[Record] | RecordStream,
        recipe: Recipe,
        questions: QuestionSet | None = None,
        save_steps: tuple[int, ...] = (),
        frozen: tuple[str, ...] = (),
    ) -> dict:
        """Train a supervised stage from the policy so far, swap the result in, and check that workers agree."""
        self.rollouts.serve(self.weights)
        corpus, feed = self.run.directory / "data" / key, None
        if isinstance(records, RecordStream):
            feed, counts, probe = records, {}, self._probe()
        else:
            counts, probe = self.rollouts.encode_corpus(records, self.resolution, corpus)
            self.inputs.check_quarantine()
        job = SftJob(
            stage=stage,
            start=Policy(self.inputs.model, self.weights),
            corpus=corpus,
            recipe=recipe,
            output=self.checkpoint(key),
            seed=self.config.seed + self.iteration,
            probe=probe,
            questions=questions,
            save_steps=save_steps,
            feed=feed,
            source=self.inputs.source,
            frozen=frozen,
        )
        try:
            result = self.learners.run(job, self._follow(stage, recipe, self.config.learner.ranks))
        finally:  # too many bad records end the stage, and then above all it is told which
            if feed is not None:
                counts["bad_records"] = self.inputs.quarantine.gather(feed.quarantine)
            self._log_quarantine()
        if feed is None:
            (corpus / ENCODED).unlink()  # first: without it, what is left of the rest does not count
            shutil.rmtree(corpus)
        return result | {"corpus": counts, "swap": self._swap(key, probe, result.pop("probe"))}

    def _log_quarantine(self) -> None:
        """All records that the run has set aside so far, by reason; ``lost`` are those that could not be used."""
        quarantine = self.inputs.quarantine
        if quarantine.counts:
            self.run.log("quarantine", self.iteration, {"lost": quarantine.lost, **quarantine.counts})

    def _probe(self) -> Probe:
        """Random tokens: an image as good as any other to compare weights by."""
        tokenizer = load_config(self.inputs.model).image_tokenizer_config
        tokens, (depth, values) = token_count(tokenizer.schedule_for(self.resolution)), tokenizer.symbols
        labels = np.random.default_rng(self.config.seed).integers(0, values, (tokens, depth))
        return Probe(Prompt("probe", "a picture", REPLY), pack(labels, values), self.resolution)

    def _drawings(self, count: int, seed: int, share: float = 1.0) -> list[Record] | RecordStream:
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
        kept, key = self._save_steps(), f"{self.name}-sft"
        return self.supervised("sft", key, records, settings.recipe, save_steps=kept, frozen=tuple(settings.frozen))

    def edit(self) -> dict:
        if self.inputs.feed is not None:
            records = self.inputs.feed.at(self.resolution, wanted=EDITS)
        else:
            records = self._edits("train", self.config.edit.records, self.config.seed + 2)
        return self.supervised("edit", "edit", records, self.config.edit.recipe)

    def _edits(self, split: str, count: int, seed: int) -> list[Record]:
        """Edits of the source: the prompt is the instruction and shows what is to be edited, its id is the target."""
        edits, side = self.inputs.source.edits(count, seed, split), self.config.data.seen_side
        return [Record(after, Prompt(after, text, REPLY, before, side), after) for before, text, after in edits]

    def _save_steps(self) -> tuple[int, ...]:
        return tuple(step for step in self.config.sft.sources() if step < self.config.sft.recipe.steps)

    def dpo(self) -> dict:
        """DPO on this iteration's pairs, from the final SFT weights, which are the reference."""
        self.rollouts.serve(self.weights)
        training, self.training = self.training or self._start_dpo(), None
        result = training.result()
        shutil.rmtree(part_path(self.table(), 0).parent, ignore_errors=True)
        return result | {"swap": self._swap(f"{self.name}-dpo", self._probe(), result.pop("probe"))}

    def _start_dpo(self, parts: int = 1) -> object:
        """Set the learners to DPO on the table, or on the parts that it is to have."""
        settings = self.config.dpo
        job = DpoJob(
            start=Policy(self.inputs.model, self.weights),
            table=self.table(),
            recipe=settings.recipe,
            dpo=settings,
            output=self.checkpoint(f"{self.name}-dpo"),
            seed=self.config.seed + self.iteration,
            probe=self._probe(),
            parts=parts,
        )
        return self.learners.start(job, self._follow("dpo", settings.recipe, self.config.learner.ranks))

    def control(self) -> dict:
        """SFT on the winners of this iteration's pairs: same start, same winners, steps and learning rate as DPO."""
        rows = read_table(self.table()).drop_duplicates("prompt_id")
        prompts = [Prompt(*row) for row in rows[["prompt_id", "prompt", "reply"]].itertuples(index=False)]
        keys = [(prompt, self.inputs.source.winner_key(prompt)) for prompt in prompts]
        records = [Record(prompt.id, prompt, key) for prompt, key in keys if key is not None]
        key = f"{self.name}-control"
        result = self.supervised("sft_on_winners", key, records, self.config.dpo.recipe)
        return result | {"eval": self.evaluate("control", (*self.weights, self.checkpoint(key) / "final"))}

    # Drawing, pairs, measures

    def table(self, split: str = "") -> Path:
        """The preference table of this iteration; ``split`` "held-out" for the one that is only measured on."""
        return self.run.directory / "preferences" / ("-".join(filter(None, [self.name, split])) + ".parquet")

    def pairs(self) -> dict:
        """Draw losers from the SFT checkpoints, then build pairs and score them with the final SFT weights.

        With ``dpo.min_pairs`` in rounds; DPO starts when so many pairs are there, beside the rest of the rounds.
        """
        losers, enough = self.losers(), self.config.dpo.min_pairs
        for built in losers.make(self.inputs.builder, self.inputs.reward, self.config.dpo.recipe.micro_batch):
            self.inputs.check_quarantine()
            if self.training:
                self.training.look()
            elif enough and built >= enough:
                self.training = self._start_dpo(len(losers.rounds))
        rollout = {
            "images": losers.drawn,
            "seconds": losers.seconds,
            "images_per_second": losers.drawn / losers.seconds if losers.drawn else None,
            "checkpoints": sorted({"/".join(losers.sources[i][-1].parts[-2:]) for i in losers.whose}),
        }
        self.run.log("rollout", self.iteration, {k: v for k, v in rollout.items() if k != "checkpoints"})
        self._show_pairs()
        return {"rollout": rollout, "pairs": losers.counts}

    def losers(self) -> Losers:
        """What is to be drawn: so many samples of each prompt, by the SFT checkpoints in their shares."""
        settings, earlier = self.config.preference, self.weights[:-1]
        steps = [self.weights[-1].with_name(f"step-{step:06d}") for step in self._save_steps()]
        prompts = self.inputs.prompts or self.inputs.source.prompts(
            "train", settings.count, seeds_for(1, self.config.seed, self.iteration, PROMPTS)[0]
        )
        prompts = [prompt for prompt in prompts[: settings.count] for _ in range(settings.samples)]
        shares, seed = list(self.config.sft.sources().values()), (self.config.seed, self.iteration)
        return Losers(
            rollouts=self.rollouts,
            table=self.table(),
            prompts=prompts,
            seeds=seeds_for(len(prompts), *seed, LOSERS),
            sources=[(*earlier, directory) for directory in (*steps, self.weights[-1])],
            whose=apportion(len(prompts), shares, seeds_for(1, *seed, SOURCES)[0]),
            resolution=self.resolution,
            size=(self.config.dpo.min_pairs or settings.count) * settings.samples,
        )

    def _show_pairs(self) -> None:
        """What this iteration's table has: as metrics, as an image beside the sample grid, some pairs in wandb."""
        table, path = read_table(self.table()), self.run.directory / "samples" / f"{self.name}-pairs.png"
        self.run.log("pairs", self.iteration, statistics(table))
        path.parent.mkdir(exist_ok=True)
        plot_pairs(table, path)
        self.run.log_images(path)
        self.rollouts.track_pairs(table.head(self.config.tracking.table_rows), path.with_suffix(""))

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
        result = self.rollouts.score_drawings(samples, self.inputs.reward, self.inputs.judge)
        if moment == "after_sft":
            table, size = self.table("held-out"), self.config.rollout.batch_size
            result["pairs"] = self.rollouts.write_pairs(table, samples, external_winner, None, size)["built"]
        else:
            result |= self.rollouts.prefer(self.table("held-out"), self.config.dpo.beta)
        self._row(moment, samples[: self.config.evaluation.grid])
        self._keep_best(moment, result, weights)
        self.run.log(f"evaluate/{moment}", self.iteration, {k: v for k, v in result.items() if v is not None})
        return result

    def _keep_best(self, moment: str, result: dict, weights: tuple[Path, ...]) -> None:
        wanted, _, metric = (self.settings.tracking.best or "").partition(".")
        if moment != wanted:
            return
        if metric not in result:
            self.run.note(f"{self.name}: no best/, {moment} has no {metric}; it has {list(result)}")
            return
        note = {"metric": f"{moment}.{metric}", "value": result[metric]}
        note |= {"iteration": self.iteration, "resolution": self.resolution}
        keep_best(self.inputs.model, weights, self.run.directory / "best", note)

    @property
    def _samples(self) -> Path:
        """Where the rows of the current grid are collected."""
        return self.run.directory / "samples" / self.name

    def _row(self, label: str, samples: list) -> None:
        self.rollouts.draw_row(samples, self._samples, label)

    def _source_row(self, label: str, keys: list[str]) -> None:
        self._samples.mkdir(parents=True, exist_ok=True)
        for i, key in enumerate(keys):
            self.inputs.source.load(key, self.resolution).save(self._samples / f"{label}-{i:02d}.png")

    def _grid(self, labels: tuple[str, ...], captions: list[str], sources: dict[str, list[str]]) -> dict:
        """Compose the rows that were collected under these labels, and those of the source's images."""
        path = self._samples.with_suffix(".png")
        result = {"path": str(path.relative_to(self.run.directory))}
        if not self._samples.exists():
            return result  # the run was cut off after composing it
        for label, keys in sources.items():
            self._source_row(label, keys)
        rows = {label.replace("_", " "): sorted(self._samples.glob(f"{label}-*.png")) for label in labels}
        sample_grid({label: images[: len(captions)] for label, images in rows.items() if images}, captions, path)
        self.run.log_images(path)
        remove_dir(self._samples)  # all rows at once
        return result

    def sample_grid(self) -> dict:
        """Compose the iteration's grid: the rows drawn so far and the winners."""
        prompts, _ = self._held_out(self.config.evaluation.grid)
        winners = [key for prompt in prompts if (key := self.inputs.source.winner_key(prompt))]
        labels = ("before", "after_sft", "control", "after_dpo", "winner")
        sources = {"winner": winners} if len(winners) == len(prompts) else {}
        return self._grid(labels, [prompt.text for prompt in prompts], sources)

    # What the policy so far can do, on held-out data

    def measure(self, stage: str) -> dict:
        """What a stage is for."""
        measures = {"tokenizer": self.reconstructs, "pretrain": self.draws, "understanding": self.understands}
        result = (measures | {"edit": self.edits})[stage]()
        self.run.log(f"evaluate/{stage}", self.iteration, result)
        return result

    def reconstructs(self) -> dict:
        """The image tokenizer on the stronger system's images of held-out prompts."""
        self.rollouts.serve(self.weights)
        return self.rollouts.reconstructions(self._held_out(self.config.evaluation.prompts)[0], self.resolution)

    def draws(self) -> dict:
        """Drawings of held-out prompts; empty where nothing can score them."""
        if not (self.inputs.source.image_check() or self.inputs.reward or self.inputs.judge):
            return {}
        self.rollouts.serve(self.weights)
        prompts, seeds = self._held_out(self.config.evaluation.prompts)
        samples, _ = self.rollouts.draw(prompts, seeds, self.resolution, self.name)
        return self.rollouts.score_drawings(samples, self.inputs.reward, self.inputs.judge)

    def predicts(self) -> dict:
        """How well the source's own images of held-out prompts are predicted, given what comes before each bit."""
        self.rollouts.serve(self.weights)
        return self.rollouts.predict(self._held_out(self.config.evaluation.prompts)[0], self.resolution)

    def understands(self) -> dict:
        """Answers to held-out questions."""
        self.rollouts.serve(self.weights)
        return self.rollouts.answer_questions(self.config.evaluation.questions, self.config.data.seen_side)

    def edits(self, moment: str = "after") -> dict:
        """Edits of held-out images, always the same with the same seeds; the first are a row of the grid.

        Empty where the source makes none.
        """
        prompts = self._held_out_edits(self.config.evaluation.edits)
        if not prompts:
            return {}
        self.rollouts.serve(self.weights)
        seeds = seeds_for(len(prompts), self.config.seed, HELD_OUT)
        samples, _ = self.rollouts.draw(prompts, seeds, self.resolution, f"{self.name}-{moment}")
        self._row(moment, samples[: self.config.evaluation.grid])
        return self.rollouts.score_edits(samples)

    def _held_out_edits(self, count: int) -> list[Prompt]:
        return [record.prompt for record in self._edits("held_out", count, self.config.seed)]

    def edit_grid(self) -> dict:
        """Compose the grid of edits: the images shown, what was drawn before and after the stage, and the targets."""
        prompts = self._held_out_edits(min(self.config.evaluation.grid, self.config.evaluation.edits))
        if not prompts:
            return {}
        sources = {"shown": [prompt.shown for prompt in prompts], "target": [prompt.id for prompt in prompts]}
        return self._grid(("shown", "before", "after", "target"), [prompt.text for prompt in prompts], sources)

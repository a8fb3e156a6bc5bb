"""Estimate a run's memory before it starts: every stage and every resolution, per learner rank and rollout worker.

`fit` compares the estimate with the devices; ``vargpt_rl.bench.memory`` compares it with measured peaks.

Not counted: fragmentation, host memory when training on GPUs, image-tokenizer training, a single small process, vLLM.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from configs.schema import LoopConfig
from configs.stages import DpoStage, SftStage
from learners.config import Recipe
from vargpt_rl.common.dtypes import chosen_dtype
from vargpt_rl.losses.supervised import Noise, sft_loss
from vargpt_rl.memory.inputs import TEXT_TOKENS, batch, policy_loss, preference_loss
from vargpt_rl.memory.rollout import RolloutMemory, rollout
from vargpt_rl.memory.tracker import META, meta_model
from vargpt_rl.memory.training import TrainingMemory, activations, parameter_sizes, states
from vargpt_rl.model.adapter import AdapterConfig, attach, base_linear, lora_layers
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.families import family_of, load_config
from vargpt_rl.model.four_bit import BYTES, four_bit_layers
from vargpt_rl.model.hub import TINY_V1
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import Unified
from vargpt_rl.model.v1.configuration import VargptV1Config
from vargpt_rl.release.tiny_v1 import fresh_v1_config
from vargpt_rl.stages import ALIGN, STAGES, Learns, Stage, stages_of

RELEASE = "release"
RELEASE_V1 = "release_v1"
SIZES: dict[str, Callable[[int], PreTrainedConfig]] = {
    RELEASE: lambda resolution: VargptConfig(),
    RELEASE_V1: lambda resolution: VargptV1Config(),
    TINY_V1: fresh_v1_config,
}
"""Names used instead of a checkpoint when only sizes matter: the released models, and one created for each run."""


def model_config(checkpoint: str, resolution: int = 256) -> PreTrainedConfig:
    """Load a model directory's configuration, or take that of ``SIZES`` for a run that starts at ``resolution``."""
    return SIZES[checkpoint](resolution) if checkpoint in SIZES else load_config(checkpoint)


LANGUAGE_PARTS = ("model.", "lm_head.")
"""Name prefixes of what a learner of stored states drops."""
RL = replace(STAGES["dpo"], name="rl")
"""Online methods: they train the parts that DPO trains."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of every stage and every resolution of a run."""

    training: list[TrainingMemory]
    rollouts: list[RolloutMemory]


@dataclass(frozen=True)
class _Case:
    """One stage at one resolution, with the settings in effect."""

    stage: Stage
    resolution: int
    settings: LoopConfig
    rows: int
    """Rows of a micro-batch."""
    images: int
    """Rows that generate an image."""
    edits: bool = False
    """True if these rows edit an image."""
    scales: int | None = None
    """Coarse scales that are trained, if not all."""

    @property
    def recipe(self) -> Recipe:
        return getattr(self.settings, self.stage.name).recipe

    @property
    def reads_states(self) -> bool:
        """Tell whether the rank reads stored states and holds no language model."""
        stored = {"dpo": self.settings.dpo.stored_states, "rl": self.settings.rl.stored_states}
        return stored.get(self.stage.name, False)

    @property
    def encodes(self) -> bool:
        """Tell whether the rank computes the images' features itself."""
        data = self.settings.data
        return data.kind == "records" and not data.encoded and self.images > 0 and self.stage.name not in ("dpo", "rl")

    def inputs(self, model: Unified) -> dict[str, torch.Tensor]:
        """Build a micro-batch. A streamed question may take ``data.max_tokens``, to which all rows are padded."""
        data = self.settings.data
        text = TEXT_TOKENS
        side = data.seen_side if data.kind != "records" else round(data.seen_pixels**0.5)
        if data.kind == "records" and self.rows > self.images:
            seen, schedule = model.blank_images(1, side)[1], model.image_tokenizer.schedule_for(self.resolution)
            longest = max(seen, token_count(schedule) if self.images else 0)
            text = max(text, data.max_tokens - longest)
        inputs = batch(
            model,
            self.rows,
            self.images,
            self.resolution,
            seen_side=side,
            text=text,
            edits=self.edits,
            scales=self.scales,
        )
        if self.reads_states:
            shape = *inputs["input_ids"].shape, model.config.text_config.hidden_size
            inputs["states"] = torch.zeros(shape, device=META, dtype=model.dtype)
        if self.encodes:
            pixels = torch.zeros(self.images, 3, self.resolution, self.resolution, device=META, dtype=model.dtype)
            with torch.no_grad():
                inputs["features"] = model.image_tokenizer.features(pixels)
        return inputs

    def loss(self, model: Unified) -> torch.Tensor:
        inputs = self.inputs(model)
        if self.stage.name == "rl":
            return policy_loss(model, inputs, self.resolution, self.scales)
        if self.stage.learns is Learns.PAIRS:
            return preference_loss(model, inputs, self.resolution)
        return sft_loss(model, inputs, self.stage.noise, self.stage.text_weight)[0]

    def need(self, whole: Unified, on_gpu: bool, kept: int, otherwise: int | None = None) -> TrainingMemory:
        """Estimate a rank's memory, given its activations."""
        ranks = self.settings.learner.ranks
        dtype = _dtype(self.settings, on_gpu)
        accumulates = self.recipe.accumulation(ranks) > 1
        adapter = self.settings.adapter
        left_out = LANGUAGE_PARTS if self.reads_states else ()
        sizes = parameter_sizes(whole, self.stage, adapter if adapter.is_on else None, left_out)
        held = states(
            sizes,
            dtype,
            self.recipe.zero,
            ranks,
            accumulates=accumulates,
            on_gpu=on_gpu,
            optimizer=self.recipe.optimizer,
            offload=self.recipe.offload,
        )
        if self.reads_states and not on_gpu:  # the rest is dropped before the model is moved to a GPU
            held["whole"] = sum(parameter.numel() for parameter in whole.parameters()) * dtype.itemsize
        if adapter.scores_in_learner and self.stage.name in ("dpo", "rl"):  # the trained tensors at the start
            held["buffers"] += sum(n for n, is_trained in sizes if is_trained) * dtype.itemsize
        if self.recipe.ema is not None:
            held["buffers"] += 4 * sum(n for n, is_trained in sizes if is_trained)
        saved, dequantised = four_bit_bytes(whole, adapter, dtype)
        held |= {"whole": held["whole"] - saved, "weights": held["weights"] - saved}
        held["buffers"] += dequantised
        if self.encodes:
            copied = sum(parameter.numel() for parameter in whole.image_tokenizer.parameters()) * dtype.itemsize
            held |= {"whole": held["whole"] + copied, "weights": held["weights"] + copied}
        if self.stage.text_weight > 0 and self.images and self.recipe.zero < 3:
            # The sum of each loss's gradients, partitioned over the ranks (learners.gradient_norms).
            trained = sum(n for n, is_trained in sizes if is_trained)
            held["buffers"] += 2 * -(-trained // ranks) * dtype.itemsize
        return TrainingMemory(
            stage=self.stage.name,
            resolution=self.resolution,
            recipe=self.recipe,
            **held,
            activations=kept,
            otherwise=otherwise,
        )


def four_bit_bytes(model: Unified, adapter: AdapterConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that parts in 4 bits save, and those of the largest weight while it is used."""
    if not adapter.is_on:
        return 0, 0
    sizes = [model.get_parameter(f"{name}.weight").numel() for name in four_bit_layers(model, adapter.four_bit)]
    return round(sum(sizes) * (dtype.itemsize - BYTES)), max(sizes, default=0) * dtype.itemsize


def _dtype(config: LoopConfig, on_gpu: bool) -> torch.dtype:
    return chosen_dtype(config.dtype, on_gpu)


def _cases(config: LoopConfig) -> Iterator[_Case]:
    """Yield all that DeepSpeed trains. SFT covers DPO's control, which trains the same on no more rows."""
    for name in config.stages:
        rows_of_stage = stages_of([name])
        stages = [
            stage
            for stage in rows_of_stage
            if stage.learns not in (Learns.IMAGES, Learns.WINNERS) and stage.name not in config.align.left_out
        ]
        for resolution in rows_of_stage[0].resolutions(config.resolutions):
            settings = config.at_resolution(resolution)
            for stage in stages:
                block = getattr(settings, stage.block)
                rows = block.recipe.micro_batch * (2 if stage.learns is Learns.PAIRS else 1)
                if isinstance(block, SftStage | DpoStage):
                    stage = stage.without(block.frozen)
                share = block.drawing_share if stage.learns is Learns.QUESTIONS else 1
                yield _Case(stage, resolution, settings, rows, round(share * rows), stage.learns is Learns.EDITS)
            if name == ALIGN and config.align.online:  # all online methods train the same on as many rows
                rows = settings.rl.recipe.micro_batch
                stage = RL.without(settings.rl.frozen)
                yield _Case(stage, resolution, settings, rows, rows, scales=settings.rl.credit_scales)


def trains(config: LoopConfig) -> bool:
    """Tell whether a run has a stage that can be planned."""
    return any(_cases(config))


def plan(config: LoopConfig, model: PreTrainedConfig, on_gpu: bool, compare: bool = False) -> MemoryPlan:
    """Estimate every stage and the workers; with ``compare`` also activations with the opposite checkpointing."""
    whole = _on_meta(model, _adapter(config))
    small = meta_model(model, _dtype(config, on_gpu), _adapter(config))
    cases = list(_cases(config))
    if not cases:
        raise ValueError(
            f"stages={config.stages}: expected at least one that DeepSpeed trains, since only those are planned"
        )
    training = []
    for case in cases:
        kept = case.recipe.gradient_checkpointing
        other = activations(small, case.stage, case.loss, int(not kept)) if compare else None
        training.append(case.need(whole, on_gpu, activations(small, case.stage, case.loss, kept), other))
    settings = {case.resolution: case.settings for case in cases}
    edited = {case.resolution: case.settings.data.seen_side for case in cases if case.edits}
    dequantised = four_bit_bytes(whole, config.adapter, _dtype(config, on_gpu))[1]
    worker = training[0].whole + _originals(config, whole, on_gpu) + dequantised
    graphs = on_gpu and config.rollout.cuda_graphs
    rollouts = [
        rollout(small, worker, px, at.rollout.images_at_once, at.sampling, edited.get(px, 0), graphs)
        for px, at in settings.items()
    ]
    return MemoryPlan(training, rollouts)


def bound(config: LoopConfig, model: PreTrainedConfig, on_gpu: bool) -> MemoryPlan:
    """Bound ``plan`` from above with one loss and one sampling pass: every stage trains all parameters on the most rows
    at the highest resolution.
    """
    whole = _on_meta(model, _adapter(config))
    small = meta_model(model, _dtype(config, on_gpu), _adapter(config))
    cases = list(_cases(config))
    images = max(case.images for case in cases)
    questions = max(case.rows - case.images for case in cases)
    resolution = max(case.resolution for case in cases)
    edits = any(case.edits for case in cases)
    widest = _Case(
        stage=Stage(name="all", trains=("",), learns=Learns.EDITS, text_weight=1.0, noise=Noise()),
        resolution=resolution,
        settings=config,
        rows=images + questions,
        images=images,
        edits=edits,
    )
    kept = activations(small, widest.stage, widest.loss, 0)
    rows = max(case.settings.rollout.images_at_once for case in cases)
    sampling = max(
        (case.settings.sampling for case in cases), key=lambda sampling: family_of(model).model.guided(sampling.cfg)
    )
    training = [case.need(whole, on_gpu, kept) for case in cases]
    dequantised = four_bit_bytes(whole, config.adapter, _dtype(config, on_gpu))[1]
    weights = training[0].whole + _originals(config, whole, on_gpu) + dequantised
    graphs = on_gpu and config.rollout.cuda_graphs
    worker = rollout(small, weights, resolution, rows, sampling, edits * config.data.seen_side, graphs)
    return MemoryPlan(training, [replace(worker, resolution=case.resolution) for case in cases])


def _adapter(config: LoopConfig) -> AdapterConfig | None:
    return config.adapter if config.adapter.is_on else None


def _originals(config: LoopConfig, whole: Unified, on_gpu: bool) -> int:
    """Return the bytes of the originals of merged layers, which a worker keeps in the machine's memory."""
    if on_gpu or not config.adapter.is_merged:
        return 0
    layers = lora_layers(whole).values()
    return sum(base_linear(layer).weight.numel() for layer in layers) * _dtype(config, on_gpu).itemsize


def _on_meta(model: PreTrainedConfig, adapter: AdapterConfig | None = None) -> Unified:
    with META:
        made = family_of(model).model(model)
        if adapter is not None:
            attach(made, adapter)
    return made

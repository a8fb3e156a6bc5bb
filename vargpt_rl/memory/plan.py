"""How much memory a run needs, known before anything starts: ``plan`` says it, ``check_fits`` refuses what cannot be.

Weights, gradients and optimizer state follow from the model's own parameters and DeepSpeed's ZeRO stage. Activations
are counted, not guessed: the real losses, their backward pass and the real sampling run under
``vargpt_rl.memory.tracker``.
``vargpt_rl.bench.memory`` compares the sums with measured peaks.

Not counted: fragmentation, host memory where GPUs train, image-tokenizer training, a single small process, and vLLM.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from actors.config import PlacementConfig, RolloutConfig
from actors.resources import per_gpu
from configs.schema import LoopConfig
from learners.config import LearnerConfig, Recipe
from vargpt_rl.losses.supervised import Noise, sft_loss
from vargpt_rl.memory.tracker import META, MetaModel, counting, skeleton
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.families import family_of, load_config
from vargpt_rl.model.generate import GenerationState, SamplingConfig, draw_scales
from vargpt_rl.model.hub import TINY_V1
from vargpt_rl.model.likelihood import image_log_probs, symbol_log_probs
from vargpt_rl.model.prompt import IGNORED
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import Unified, replayed
from vargpt_rl.model.v1.configuration import VargptV1Config
from vargpt_rl.release.tiny_v1 import fresh_v1_config
from vargpt_rl.stages import Learns, Stage, freeze, stages_of

GIB = 2**30
RELEASE, RELEASE_V1 = "release", "release_v1"
SIZES: dict[str, Callable[[int], PreTrainedConfig]] = {
    RELEASE: lambda resolution: VargptConfig(),
    RELEASE_V1: lambda resolution: VargptV1Config(),
    TINY_V1: fresh_v1_config,
}
"""What stands for a checkpoint where only its sizes matter: the released ones, and one that is made for a run."""
TEXT_TOKENS = 128
"""Assumed length of a row's text: markup, prompt and reply."""
RUNTIME = GIB
"""Assumed for each process besides tensors: CUDA context, kernels and NCCL on a GPU, the interpreter on a CPU."""
REDUCE_BUCKET, LIVE_PARAMETERS, SUB_GROUP = 5 * 10**8, 10**9 + 5 * 10**7, 10**9
"""DeepSpeed's defaults, in elements: gradients reduced at once; parameters that ZeRO-3 keeps gathered, with those it
fetches ahead; parameters that ZeRO-3 updates at once."""


# One process


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a learner rank in one stage.

    ``whole`` is the model as it is loaded, before ZeRO-3 takes it apart; ``update`` is what the optimizer's step holds
    in the place of buffers and activations; ``otherwise`` the activations with the other choice of checkpointing.
    """

    stage: str
    resolution: int
    recipe: Recipe
    whole: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    update: int
    activations: int
    otherwise: int | None = None

    @property
    def total(self) -> int:
        states = self.weights + self.gradients + self.optimizer
        return RUNTIME + max(self.whole, states + self.buffers + self.activations, states + self.update)

    def __str__(self) -> str:
        if self.total == RUNTIME + self.whole:
            return f"{_gib(self.total)} (the whole model while it is loaded, runtime {_gib(RUNTIME)})"
        names = ["weights", "gradients", "optimizer", "buffers", "activations"]
        if self.update > self.buffers + self.activations:
            names[3:] = ["update"]
        return _sum(self, names)


@dataclass(frozen=True)
class Rollout:
    """Bytes of a rollout worker at one resolution. ``caches`` are what the last scale of a drawing sees."""

    resolution: int
    batch: int
    weights: int
    caches: int
    activations: int

    @property
    def total(self) -> int:
        return RUNTIME + self.weights + self.caches + self.activations

    def __str__(self) -> str:
        return _sum(self, ["weights", "caches", "activations"])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _sum(need: TrainingMemory | Rollout, names: list[str]) -> str:
    parts = [f"{name} {getattr(need, name) / GIB:.1f}" for name in names]
    return f"{_gib(need.total)} ({' + '.join([*parts, f'runtime {RUNTIME / GIB:.1f}'])})"


def states(
    sizes: list[tuple[int, bool]], dtype: torch.dtype, zero: int, ranks: int, accumulates: bool, on_gpu: bool
) -> dict[str, int]:
    """All of ``TrainingMemory`` but activations, from each parameter's elements and whether it is trained.

    ``accumulates``: a step has several micro-batches. A CPU holds no more of a buffer than is written to.
    """
    width, is_half = dtype.itemsize, dtype.itemsize < 4
    total, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
    own = {0: trained, 3: sum(-(-n // ranks) for n, is_trained in sizes if is_trained)}.get(zero, -(-trained // ranks))
    bucket = REDUCE_BUCKET if on_gpu else min(trained, REDUCE_BUCKET)
    reduced = bucket + min(trained, REDUCE_BUCKET)  # and its flattened copy
    master = 4 if is_half or zero else 0  # ZeRO keeps its own copy of fp32 weights too
    step = width + 4 if is_half else width  # an element's gradient, flattened, then in fp32
    found = {
        "whole": total * width,
        "weights": total * width,
        "gradients": (own if zero >= 2 else trained) * width,
        "optimizer": own * (8 + master),
        "buffers": 0,
        "update": own * 4 if is_half else 0,
    }
    if zero in (1, 2):
        again = own if accumulates else 0  # those of the last micro-batch, beside the sum so far
        found |= {"buffers": (reduced + again) * width, "update": own * step}
    if zero == 3:
        gathered = min(total, LIVE_PARAMETERS)
        found |= {
            "weights": sum(-(-n // ranks) for n, _ in sizes) * width,
            "buffers": (reduced + gathered) * width,
            "update": bucket * width + min(own, SUB_GROUP) * step,
        }
    return found


def parameter_sizes(model: Unified, stage: Stage) -> list[tuple[int, bool]]:
    """Elements of each parameter and whether the stage trains it."""
    freeze(model, stage)
    return [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]


def batch(
    model: Unified,
    rows: int,
    drawings: int,
    resolution: int,
    seen_side: int = 0,
    text: int = TEXT_TOKENS,
    edits: bool = False,
) -> dict[str, torch.Tensor]:
    """What a collator makes of ``drawings`` and, in the other rows, questions about an image; every row has a pad.

    With ``edits`` the drawings show an image too.
    """
    config, asked = model.config, rows - drawings
    schedule = config.image_tokenizer_config.schedule_for(resolution)
    tokens, count = token_count(schedule), rows if edits else asked
    shown, seen = model.blank_images(count, seen_side) if count else ({}, 0)
    prompt = text + edits * seen
    longest = max(prompt + tokens if drawings else 0, text + seen if asked else 0)
    length = -(-(longest + 1) // 8) * 8
    ids = torch.zeros(rows, length, dtype=torch.long)
    ids[:drawings, prompt - 1] = config.image_gen_start_token_id
    ids[:drawings, prompt : prompt + tokens] = config.image_gen_pad_token_id
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    mask[:, -1] = 0
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if drawings:
        channels = config.image_tokenizer_config.latent_channels
        found["features"] = torch.zeros(drawings, channels, *schedule[-1], device=model.device, dtype=model.dtype)
    ids[rows - count :, 1 : 1 + seen] = config.image_token_id
    return found | shown


def log_probs(model: Unified, inputs: dict, resolution: int) -> torch.Tensor:
    """float64 [B]: the teacher-forced log-probability of each row's image."""
    tokenizer, ids = model.config.image_tokenizer_config, inputs["input_ids"]
    tokens, depth = token_count(tokenizer.schedule_for(resolution)), tokenizer.symbols.depth
    labels = torch.zeros(len(ids), tokens, depth, dtype=torch.uint8)
    drawing = replayed(labels, (resolution, resolution))
    logits = model(ids, inputs["attention_mask"], drawing=drawing, text_logits=False).image_logits
    return image_log_probs(symbol_log_probs(logits, labels))


def preference_loss(model: Unified, inputs: dict, resolution: int) -> torch.Tensor:
    """DPO's, of rows [chosen, rejected]; the references weigh nothing."""
    chosen, rejected = log_probs(model, inputs, resolution).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def activations(skeleton: MetaModel, stage: Stage, loss: Callable[[Unified], torch.Tensor], checkpointing: bool) -> int:
    """The most bytes that a loss and its backward pass hold besides the model and its complete gradients."""
    model = skeleton.model.train()
    freeze(model, stage)
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    with counting(skeleton) as ledger:
        loss(model).backward()
    return ledger.peak


def rollout(
    skeleton: MetaModel, weights: int, resolution: int, rows: int, sampling: SamplingConfig, shown_side: int = 0
) -> Rollout:
    """A worker at its fullest: drawing, encoding or scoring ``rows`` images at once, or decoding one.

    Where prompts show images, ``shown_side`` is their size.
    """
    model, size = skeleton.model.eval(), (resolution, resolution)
    tokenizer, caches = model.config.image_tokenizer_config, 0

    def after_scale(*_):
        nonlocal caches
        caches = ledger.live

    def drawing():
        inputs = batch(model, rows, rows, resolution, shown_side, edits=shown_side > 0)
        prompt = int((inputs["input_ids"][0] == model.config.image_gen_pad_token_id).int().argmax())
        ids, mask = inputs["input_ids"][:, :prompt], inputs["attention_mask"][:, :prompt].clone()
        mask[:, 0] = 0
        hook = model.image_decoder.register_forward_hook(after_scale)
        reading = GenerationState(model, rows)
        reading.read(ids, mask, inputs.get("pixel_values"), inputs.get("image_grid_thw"))
        draw_scales(reading, list(range(rows)), size, sampling)  # not in inference mode, as the ledger wants
        hook.remove()

    def decoding():
        grid = tokenizer.schedule_for(resolution)[-1]
        model.image_tokenizer.decode(torch.zeros(1, tokenizer.latent_channels, *grid, device=META, dtype=model.dtype))

    def encoding():
        images = torch.zeros(rows, 3, *size, device=META, dtype=model.dtype)
        model.image_tokenizer.encode(images)

    def scoring():
        log_probs(model, batch(model, rows, rows, resolution), resolution)

    peaks = []
    for job in (drawing, decoding, encoding, scoring):
        with torch.no_grad(), counting(skeleton) as ledger:
            job()
        peaks.append(ledger.peak)
    return Rollout(resolution, rows, weights, caches, max(peaks) - caches)


# A run


@dataclass(frozen=True)
class MemoryPlan:
    """What each stage and each resolution of a run needs."""

    training: list[TrainingMemory]
    rollouts: list[Rollout]


@dataclass(frozen=True)
class _Case:
    """One stage at one resolution, with the settings in force; ``rows`` a micro-batch, ``drawings`` among them, which
    may be ``edits``.
    """

    stage: Stage
    resolution: int
    settings: LoopConfig
    rows: int
    drawings: int
    edits: bool = False

    @property
    def recipe(self) -> Recipe:
        return getattr(self.settings, self.stage.name).recipe

    @property
    def encodes(self) -> bool:
        """Whether the rank takes the features of its drawings itself."""
        data = self.settings.data
        return data.kind == "records" and not data.encoded and self.drawings > 0 and self.stage.name != "dpo"

    def inputs(self, model: Unified) -> dict[str, torch.Tensor]:
        """A micro-batch. A streamed question can be as long as ``data.max_tokens``, and makes all rows as wide."""
        data, text = self.settings.data, TEXT_TOKENS
        side = data.seen_side if data.kind != "records" else round(data.seen_pixels**0.5)
        if data.kind == "records" and self.rows > self.drawings:
            seen, schedule = model.blank_images(1, side)[1], model.image_tokenizer.schedule_for(self.resolution)
            longest = max(seen, token_count(schedule) if self.drawings else 0)
            text = max(text, data.max_tokens - longest)
        inputs = batch(model, self.rows, self.drawings, self.resolution, side, text, edits=self.edits)
        if self.encodes:
            pixels = torch.zeros(self.drawings, 3, self.resolution, self.resolution, device=META, dtype=model.dtype)
            with torch.no_grad():
                inputs["features"] = model.image_tokenizer.features(pixels)
        return inputs

    def loss(self, model: Unified) -> torch.Tensor:
        inputs = self.inputs(model)
        if self.stage.learns is Learns.PAIRS:
            return preference_loss(model, inputs, self.resolution)
        return sft_loss(model, inputs, self.stage.noise, self.stage.text_weight)[0]

    def need(self, whole: Unified, on_gpu: bool, kept: int, otherwise: int | None = None) -> TrainingMemory:
        """With these activations."""
        ranks, dtype = self.settings.learner.ranks, _dtype(self.settings)
        accumulates = self.recipe.accumulation(ranks) > 1
        sizes = parameter_sizes(whole, self.stage)
        held = states(sizes, dtype, self.recipe.zero, ranks, accumulates, on_gpu)
        if self.encodes:
            copied = sum(parameter.numel() for parameter in whole.image_tokenizer.parameters()) * dtype.itemsize
            held |= {"whole": held["whole"] + copied, "weights": held["weights"] + copied}
        if self.stage.text_weight > 0 and self.drawings and self.recipe.zero < 3:
            # Sums of each loss's gradients, shared out over the ranks (learners.gradient_norms).
            trained = sum(n for n, is_trained in sizes if is_trained)
            held["buffers"] += 2 * -(-trained // ranks) * dtype.itemsize
        return TrainingMemory(
            self.stage.name, self.resolution, self.recipe, **held, activations=kept, otherwise=otherwise
        )


def _dtype(config: LoopConfig) -> torch.dtype:
    return torch.bfloat16 if config.learner.bf16 else torch.float32


def _cases(config: LoopConfig) -> Iterator[_Case]:
    """All that DeepSpeed trains in a run. SFT covers DPO's control, which trains the same on as many rows or fewer."""
    for name in config.stages:
        stages = [stage for stage in stages_of([name]) if stage.learns not in (Learns.IMAGES, Learns.WINNERS)]
        for resolution in stages[0].resolutions(config.resolutions) if stages else []:
            settings = config.at_resolution(resolution)
            for stage in stages:
                block = getattr(settings, stage.block)
                rows = block.recipe.micro_batch * (2 if stage.learns is Learns.PAIRS else 1)
                share = block.drawing_share if stage.learns is Learns.QUESTIONS else 1
                yield _Case(stage, resolution, settings, rows, round(share * rows), stage.learns is Learns.EDITS)


def plan(config: LoopConfig, model: PreTrainedConfig, on_gpu: bool, compare: bool = False) -> MemoryPlan:
    """Memory of every stage and of the workers; with ``compare`` also activations with the other checkpointing."""
    whole, small, cases = _on_meta(model), skeleton(model, _dtype(config)), list(_cases(config))
    if not cases:
        raise ValueError(f"stages={config.stages}: expected one that DeepSpeed trains, whose memory can be planned")
    training = []
    for case in cases:
        kept = case.recipe.gradient_checkpointing
        other = activations(small, case.stage, case.loss, not kept) if compare else None
        training.append(case.need(whole, on_gpu, activations(small, case.stage, case.loss, kept), other))
    settings = {case.resolution: case.settings for case in cases}
    edited = {case.resolution: case.settings.data.seen_side for case in cases if case.edits}
    rollouts = [
        rollout(small, training[0].whole, px, at.rollout.batch_size, at.sampling, edited.get(px, 0))
        for px, at in settings.items()
    ]
    return MemoryPlan(training, rollouts)


def bound(config: LoopConfig, model: PreTrainedConfig, on_gpu: bool) -> MemoryPlan:
    """At least what ``plan`` says, from one loss and one drawing: all is trained, and everywhere the most rows at the
    highest resolution."""
    whole, small, cases = _on_meta(model), skeleton(model, _dtype(config)), list(_cases(config))
    drawings, questions = max(case.drawings for case in cases), max(case.rows - case.drawings for case in cases)
    resolution = max(case.resolution for case in cases)
    edits = any(case.edits for case in cases)
    widest = _Case(
        Stage(name="all", trains=("",), learns=Learns.EDITS, text_weight=1.0, noise=Noise()),
        resolution,
        config,
        drawings + questions,
        drawings,
        edits,
    )
    kept = activations(small, widest.stage, widest.loss, False)
    rows = max(case.settings.rollout.batch_size for case in cases)
    sampling = max(
        (case.settings.sampling for case in cases), key=lambda sampling: family_of(model).model.guided(sampling.cfg)
    )
    training = [case.need(whole, on_gpu, kept) for case in cases]
    worker = rollout(small, training[0].whole, resolution, rows, sampling, edits * config.data.seen_side)
    return MemoryPlan(training, [replace(worker, resolution=case.resolution) for case in cases])


def _on_meta(model: PreTrainedConfig) -> Unified:
    with META:
        return family_of(model).model(model)


@dataclass(frozen=True)
class Devices:
    """What processes run on: GPUs of so many bytes each, or without any the machines' memory."""

    gpus: int
    gpu_memory: int
    memory: int

    @property
    def room(self) -> int:
        """Bytes that processes share when they share a device."""
        return self.gpu_memory if self.gpus else self.memory


def gpu_memory() -> int:
    """Bytes of this process's first GPU."""
    return torch.cuda.get_device_properties(0).total_memory


def model_config(checkpoint: str, resolution: int = 256) -> PreTrainedConfig:
    """Of a model directory, or of one of ``SIZES`` for a run that begins at ``resolution``."""
    return SIZES[checkpoint](resolution) if checkpoint in SIZES else load_config(checkpoint)


@dataclass(frozen=True)
class Load:
    """So many workers and learner ranks on one device, in one stage."""

    workers: int
    rollout: Rollout
    ranks: int
    training: TrainingMemory

    @property
    def total(self) -> int:
        return self.workers * self.rollout.total + self.ranks * self.training.total

    @property
    def step(self) -> str:
        return f"{self.training.stage if self.ranks else 'drawing'} at {self.training.resolution} px"

    @property
    def remedies(self) -> str:
        """Settings that lower it, those that are in force already left out."""
        recipe, key = self.training.recipe, f"{self.training.stage}.recipe"
        found = {
            "a lower rollout.batch_size": self.workers > 0,
            f"a lower {key}.micro_batch": self.ranks > 0 and recipe.micro_batch > 1,
            f"{key}.gradient_checkpointing=true": self.ranks > 0 and not recipe.gradient_checkpointing,
            f"{key}.zero=3": self.ranks > 0 and recipe.zero < 3,
            "more learner.ranks": self.ranks == 1,
        }
        return " or ".join(text for text, helps in found.items() if helps)

    def __str__(self) -> str:
        crowds = (self.workers, "rollout worker", self.rollout), (self.ranks, "learner rank", self.training)
        return " and ".join(f"{count} {name}{'s' * (count > 1)} of {need}" for count, name, need in crowds if count)


def fullest(
    plan: MemoryPlan, rollout: RolloutConfig, learner: LearnerConfig, placement: PlacementConfig, on_gpu: bool
) -> Load:
    """The largest load that a device can get: all processes on a CPU, those that the placement puts on one GPU."""
    counts = [(rollout.workers, learner.ranks)]
    if on_gpu:
        filled = per_gpu(rollout, learner.gpus_per_rank, placement)
        counts = [(min(workers, rollout.workers), min(ranks, learner.ranks)) for workers, ranks in filled]
    beside = {need.resolution: need for need in plan.rollouts}
    loads = [
        Load(workers, beside[training.resolution], ranks, training)
        for workers, ranks in counts
        for training in plan.training
    ]
    return max(loads, key=lambda load: load.total)


def refusal(plan: MemoryPlan, config: LoopConfig, devices: Devices) -> str | None:
    """Why the run cannot be, with the sum; None if it can."""
    load = fullest(plan, config.rollout, config.learner, config.placement, devices.gpus > 0)
    if load.total <= devices.room:
        return None
    return (
        f"{load.step} needs {_gib(load.total)} on one {'GPU' if devices.gpus else 'machine'}, which has "
        f"{_gib(devices.room)}: {load}; less is needed with {load.remedies}"
    )


def check_fits(config: LoopConfig, model: PreTrainedConfig, devices: Devices) -> None:
    """ValueError, with the sum, when a stage of the run needs more memory than there is."""
    on_gpu = devices.gpus > 0
    if not any(_cases(config)) or refusal(bound(config, model, on_gpu), config, devices) is None:
        return  # the bound is quick, and enough for all that is far from full
    if reason := refusal(plan(config, model, on_gpu), config, devices):
        raise ValueError(reason)

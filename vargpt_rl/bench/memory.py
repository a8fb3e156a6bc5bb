"""Compare estimated with measured memory of a training step: ``python -m vargpt_rl.bench.memory``.

Real steps in fp32 on the CPU, in one process, for the embedded model and a larger one with random weights. A step is a
second micro-batch on top of gradients and optimizer state, then AdamW. Without ZeRO, torch's AdamW runs and the peak of
torch's allocator is measured; with ZeRO, DeepSpeed runs, whose threads the profiler does not see, and the peak of live
tensors is measured. Exit code 1 if an estimate is off by more than 15 %.
"""

import os
import sys
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learners.config import Recipe
from vargpt_rl.bench.harness import peak_memory, results_table
from vargpt_rl.common.console import print_table
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.common.usage import print_usage_if_asked
from vargpt_rl.losses.supervised import sft_loss
from vargpt_rl.memory.inputs import batch, preference_loss
from vargpt_rl.memory.tracker import META, meta_model
from vargpt_rl.memory.training import TrainingMemory, activations, parameter_sizes, states
from vargpt_rl.memory.units import RUNTIME
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.stages import STAGES, freeze

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from learners.image_policy import ScoredOutput

TOLERANCE = 0.15
TEXT = 32
"""Text tokens per row."""


@dataclass(frozen=True)
class Case:
    """One step."""

    model: str
    stage: str
    zero: int
    resolution: int
    micro_batch: int
    """Images, or pairs of images in DPO."""
    checkpointing: bool = False

    @property
    def rows(self) -> int:
        return self.micro_batch * (2 if self.stage == "dpo" else 1)


CASES = (
    Case("tiny", "sft", 0, 128, 4),
    Case("tiny", "sft", 0, 128, 4, checkpointing=True),
    Case("tiny", "dpo", 0, 128, 2),
    Case("middle", "sft", 0, 128, 1),
    Case("middle", "dpo", 0, 64, 1),
    Case("middle", "sft", 2, 64, 1),
    Case("middle", "sft", 3, 64, 1),
)


def enlarged(
    *, width: int, feed_forward: int, layers: int, heads: int, key_value_heads: int, depth: int
) -> VargptConfig:
    """Return the embedded model's configuration with a larger language model and a visual decoder as wide.

    ``depth`` counts the decoder's blocks; heads are 64 wide.
    """
    config = VargptConfig.from_pretrained(EMBEDDED)
    text = config.text_config
    text.hidden_size = width
    text.intermediate_size = feed_forward
    text.num_hidden_layers = layers
    text.num_attention_heads = heads
    text.num_key_value_heads = key_value_heads
    text.layer_types = ["full_attention"] * layers
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [8, 12, 12]}
    config.vision_config.hidden_size = width
    config.decoder_config.width = width
    config.decoder_config.depth = depth
    config.decoder_config.heads = heads
    return config


def model_config(name: str) -> VargptConfig:
    """Return the configuration of the embedded model, or of one with about 340 million parameters."""
    if name == "tiny":
        return VargptConfig.from_pretrained(EMBEDDED)
    config = enlarged(width=1024, feed_forward=2816, layers=12, heads=16, key_value_heads=4, depth=10)
    config.text_config.initializer_range = 0.02  # the embedded model's, for narrow layers, overflows gradients
    return config


def estimate(case: Case) -> int:
    """Estimate the bytes of tensors in the step from shapes alone."""
    config = model_config(case.model)
    stage = STAGES[case.stage]

    def loss(model: Vargpt) -> torch.Tensor:
        inputs = batch(model, case.rows, case.rows, case.resolution, text=TEXT)
        if case.stage == "dpo":
            return preference_loss(model, inputs, case.resolution)
        return sft_loss(model, inputs, stage.noise, stage.text_weight)[0]

    with META:
        whole = Vargpt(config)
    kept = activations(meta_model(config, torch.float32), stage, loss, case.checkpointing)
    held = states(parameter_sizes(whole, stage), torch.float32, case.zero, 1, True, True)
    need = TrainingMemory(case.stage, case.resolution, Recipe(), **held, activations=kept)
    return need.total - RUNTIME


def real_loss(
    case: Case,
    model: "Vargpt | DeepSpeedEngine",
    module: Vargpt,
    resolution: int,
    states_BTH: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the learner's loss of ``model``, which is ``module`` or DeepSpeed's engine around it.

    DPO may be given the language model's states.
    """
    inputs = batch(module, case.rows, case.rows, resolution, text=TEXT)
    stage = STAGES[case.stage]
    if case.stage != "dpo":
        return sft_loss(model, inputs, stage.noise, stage.text_weight)[0]
    scored = score(model, module, inputs, resolution, states_BTH)
    assert scored.log_probs is not None  # a policy returns them
    chosen, rejected = scored.log_probs.sum(1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def score(
    model: "Vargpt | DeepSpeedEngine",
    module: Vargpt,
    inputs: dict[str, torch.Tensor],
    resolution: int,
    states_BTH: torch.Tensor | None = None,
) -> "ScoredOutput":
    """Score images of zeros, as DPO does."""
    tokens = token_count(schedule_for(resolution))
    rows = len(inputs["input_ids"])
    bits = torch.zeros(rows, tokens, module.config.image_tokenizer_config.bits, dtype=torch.uint8)
    side = torch.tensor(resolution)
    return model(inputs["input_ids"], inputs["attention_mask"], bits, side, states=states_BTH)


def real_model(case: Case) -> tuple[Vargpt, torch.optim.Optimizer]:
    """Create the learner's model with random weights, and its trainer's optimizer."""
    from learners.image_policy import ImagePolicy

    model = (ImagePolicy if case.stage == "dpo" else Vargpt)(model_config(case.model)).train()
    freeze(model, STAGES[case.stage])
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def measure_torch(case: Case) -> int:
    """Measure the peak of torch's allocator, from the creation of the model to the end of the step."""

    def run() -> None:
        model, optimizer = real_model(case)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        real_loss(case, model, model, case.resolution).backward()
        optimizer.step()

    return peak_memory(run)


class LiveTensors(TorchDispatchMode):
    """Adds up the storages of live CPU tensors: ``live`` bytes now, ``peak`` bytes at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, size: int) -> None:
        self.live -= size


def measure_zero(case: Case) -> int:
    """Measure the peak of live tensors under DeepSpeed, configured as the learners configure it."""
    import deepspeed

    from learners.training import deepspeed_config

    if not dist.is_initialized():
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # this op would be compiled first
        deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    settings = deepspeed_config(Recipe(zero=case.zero), bf16=False)
    settings |= {"train_micro_batch_size_per_gpu": case.rows, "gradient_accumulation_steps": 2}
    with LiveTensors() as tensors:
        model, optimizer = real_model(case)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings | {"gradient_clipping": 1.0})[0]
        for resolution in (16, 16, case.resolution, case.resolution):  # the first step creates the optimizer state
            engine.backward(real_loss(case, engine, model, resolution))
            engine.step()
    if engine.skipped_steps:
        raise RuntimeError(f"{case}: expected finite gradients; without them there is no optimizer state to measure")
    engine.destroy()
    return tensors.peak


def main() -> int:
    """Print a row per case; return the exit code."""
    print_usage_if_asked(f"usage: {__doc__}")
    columns = ("model", "stage", "ZeRO", "px", "rows", "checkpointing", "estimate", "measured", "ratio")
    table = results_table("memory of a step, in MB", columns, left=("model", "stage"))
    within = True
    for case in CASES:
        expected = estimate(case)
        found = measure_zero(case) if case.zero else measure_torch(case)
        within &= abs(expected / found - 1) <= TOLERANCE
        table.add_row(
            case.model,
            case.stage,
            str(case.zero or "-"),
            str(case.resolution),
            str(case.rows),
            str(case.checkpointing),
            f"{expected / 1e6:.0f}",
            f"{found / 1e6:.0f}",
            f"{expected / found:.3f}",
        )
    print_table(table)
    return 0 if within else 1


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())

"""Estimated against measured memory of a step of training: ``python -m vargpt_rl.bench.memory``.

Real steps in fp32 on the CPU, in one process, for two models: the embedded one and a larger one with random weights.
A step is a second micro-batch on top of gradients and optimizer state, then AdamW. Without ZeRO it is torch's own
AdamW, and measured is the most that torch's allocator has handed out; with ZeRO it is DeepSpeed, whose threads the
profiler does not see, and measured are the tensors that live at once. Exit code 1 if an estimate is more than 15 % off.
"""

import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learners.config import Recipe
from vargpt_rl.common.console import wide_console
from vargpt_rl.losses.supervised import sft_loss
from vargpt_rl.memory.plan import RUNTIME, TrainingMemory, activations, batch, parameter_sizes, preference_loss, states
from vargpt_rl.memory.tracker import META, skeleton
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.stages import STAGES, freeze

TOLERANCE = 0.15
TEXT = 32
"""Tokens of text a row."""


@dataclass(frozen=True)
class Case:
    """One step; ``micro_batch`` counts images, or pairs of them in DPO."""

    model: str
    stage: str
    zero: int
    resolution: int
    micro_batch: int
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


def model_config(name: str) -> VargptConfig:
    """The embedded model's, or one of some 340 million parameters."""
    config = VargptConfig.from_pretrained(EMBEDDED)
    if name == "middle":
        text, decoder = config.text_config, config.decoder_config
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = 1024, 2816, 12
        text.num_attention_heads, text.num_key_value_heads = 16, 4
        text.layer_types = ["full_attention"] * text.num_hidden_layers
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [8, 12, 12]}
        text.initializer_range = 0.02  # the embedded model's is for narrow layers; here gradients would overflow
        config.vision_config.hidden_size = text.hidden_size
        decoder.width, decoder.depth, decoder.heads = 1024, 10, 16
    return config


def estimate(case: Case) -> int:
    """Bytes of tensors in the step, from shapes alone."""
    config, stage = model_config(case.model), STAGES[case.stage]

    def loss(model: Vargpt) -> torch.Tensor:
        inputs = batch(model, case.rows, case.rows, case.resolution, text=TEXT)
        if case.stage == "dpo":
            return preference_loss(model, inputs, case.resolution)
        return sft_loss(model, inputs, stage.noise, stage.text_weight)[0]

    with META:
        whole = Vargpt(config)
    kept = activations(skeleton(config, torch.float32), stage, loss, case.checkpointing)
    held = states(parameter_sizes(whole, stage), torch.float32, case.zero, 1, True, True)
    return TrainingMemory(case.stage, case.resolution, Recipe(), **held, activations=kept).total - RUNTIME


def real_loss(case: Case, model: Callable, module: Vargpt, resolution: int) -> torch.Tensor:
    """The learner's loss of ``model``, which is ``module`` or DeepSpeed's engine around it."""
    inputs, stage = batch(module, case.rows, case.rows, resolution, text=TEXT), STAGES[case.stage]
    if case.stage != "dpo":
        return sft_loss(model, inputs, stage.noise, stage.text_weight)[0]
    tokens, depth = token_count(schedule_for(resolution)), module.config.image_tokenizer_config.bits
    bits = torch.zeros(case.rows, tokens, depth, dtype=torch.uint8)
    scored = model(inputs["input_ids"], inputs["attention_mask"], bits, torch.tensor(resolution))
    chosen, rejected = scored.log_probs.sum(1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def real_model(case: Case) -> tuple[Vargpt, torch.optim.Optimizer]:
    """The learner's model with random weights, and the optimizer that its trainer takes."""
    from learners.image_policy import ImagePolicy

    model = (ImagePolicy if case.stage == "dpo" else Vargpt)(model_config(case.model)).train()
    freeze(model, STAGES[case.stage])
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def measure_torch(case: Case) -> int:
    """Peak of torch's allocator, from the making of the model to the end of the step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model, optimizer = real_model(case)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        real_loss(case, model, model, case.resolution).backward()
        optimizer.step()
    return peak(profiler)


def peak(profiler: profile) -> int:
    """The most bytes that torch's allocator had handed out at once, on top of those before ``profiler`` watched."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


class Living(TorchDispatchMode):
    """Adds up the storages of real tensors that live: ``live`` bytes now, ``peak`` at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
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
    """Peak of living tensors under DeepSpeed, with its configuration as the learners have it."""
    import deepspeed

    from learners.training import deepspeed_config

    if not dist.is_initialized():
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
        deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    settings = deepspeed_config(Recipe(zero=case.zero), bf16=False)
    settings |= {"train_micro_batch_size_per_gpu": case.rows, "gradient_accumulation_steps": 2}
    with Living() as living:
        model, optimizer = real_model(case)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings | {"gradient_clipping": 1.0})[0]
        for resolution in (16, 16, case.resolution, case.resolution):  # the first step makes the optimizer's state
            engine.backward(real_loss(case, engine, model, resolution))
            engine.step()
    if engine.skipped_steps:
        raise RuntimeError(f"{case}: gradients were not finite, so there is no optimizer state to measure")
    engine.destroy()
    return living.peak


def main() -> int:
    """Print a row a case; the exit code."""
    table = Table(title="memory of a step, in MB", title_justify="left", box=SIMPLE_HEAD)
    for column in ("model", "stage", "ZeRO", "px", "rows", "checkpointing", "estimate", "measured", "ratio"):
        table.add_column(column, justify="left" if column in ("model", "stage") else "right")
    right = True
    for case in CASES:
        expected, found = estimate(case), (measure_zero if case.zero else measure_torch)(case)
        right &= abs(expected / found - 1) <= TOLERANCE
        figures = (str(figure) for figure in (case.zero or "-", case.resolution, case.rows, case.checkpointing))
        table.add_row(
            case.model, case.stage, *figures, f"{expected / 1e6:.0f}", f"{found / 1e6:.0f}", f"{expected / found:.3f}"
        )
    wide_console().print(table)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

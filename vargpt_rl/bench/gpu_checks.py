"""Checks of `vargpt_rl.bench.gpu`: kernels and where they spend the time, hash and swap of a set, bf16 against fp32."""

import hashlib
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from vargpt_rl.memory.inputs import log_probs
from vargpt_rl.model.modeling import Vargpt

KERNEL = re.compile("flash|fmha|sdpa", re.IGNORECASE)
"""Names of attention's fused kernels on NVIDIA GPUs."""
ATTENTION = re.compile(r"aten::_scaled_dot_product_(\w+?)(_for_cpu)?$")
"""Operators that ``scaled_dot_product_attention`` chooses among."""
WORK = {
    "attention": re.compile("flash|fmha|sdpa|scaled_dot_product", re.IGNORECASE),
    "convolutions": re.compile("conv|fprop|dgrad|wgrad|implicit", re.IGNORECASE),
    "matrix products": re.compile("gemm|gemv|nvjet|cutlass|cublas|splitK|aten::(mm|bmm|addmm|linear)$", re.IGNORECASE),
    "copies": re.compile("memcpy|memset|copy", re.IGNORECASE),
}
"""Kinds of work by the names of kernels, or of operators on a CPU; the first that matches counts."""


def attention_kernels(step: Callable[[], None], device: torch.device) -> str:
    """Run a step; describe which operators and kernels its attention ran in, with their numbers of calls."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        step()
    operators: dict[str, int] = {}
    kernels: set[str] = set()
    for event in profiler.key_averages():
        if match := ATTENTION.match(event.key):
            operators[match[1]] = operators.get(match[1], 0) + event.count
        elif not event.key.startswith("aten::") and KERNEL.search(event.key):
            kernels.add(re.sub(r"[<(].*", "", event.key).removeprefix("void ").strip())
    others = [name for name in operators if not name.startswith(("flash_attention", "cudnn_attention"))]
    calls = ", ".join(f"{name} {count}" for name, count in sorted(operators.items()))
    verdict = "all in a flash kernel" if operators and not others else f"NOT in a flash kernel: {', '.join(others)}"
    return f"{verdict} ({calls}{'; kernels ' + ', '.join(sorted(kernels)) if kernels else ''})"


def time_shares(step: Callable[[], object], device: torch.device, seconds: float) -> str:
    """Run a step that takes ``seconds`` unwatched; describe the share of that time which each kind of kernel takes.

    On a CPU operators take the place of kernels. What is left over on a GPU is time in which it waits for work.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    spent: dict[str, float] = {}
    calls = 0
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if not microseconds or event.key.startswith("cuda"):  # calls of the runtime
            continue
        kind = next((kind for kind, names in WORK.items() if names.search(event.key)), "other")
        spent[kind] = spent.get(kind, 0.0) + microseconds / 1e6
        calls += event.count
    shares = [f"{kind} {time / seconds:.0%}" for kind, time in sorted(spent.items(), key=lambda item: -item[1])]
    return f"{', '.join(shares)} of the time; {calls} {'kernels' if on_gpu else 'operators'}"


def hash_and_swap(
    model: Vargpt, trained: list[str], folder: Path, synchronize: Callable[[], None]
) -> dict[str, tuple[float, int]]:
    """Hash, write, copy and swap the trained tensors: seconds and bytes of each.

    RuntimeError if the model does not hold the set afterwards.
    """
    own = model.state_dict()
    tensors = {name: own[name].to("cpu", copy=True).contiguous() for name in trained}
    size = sum(tensor.nbytes for tensor in tensors.values())
    digest, title = _digest()
    found: dict[str, tuple[float, int]] = {}

    @contextmanager
    def measured(work: str):
        synchronize()
        began = time.perf_counter()
        yield
        synchronize()
        found[work] = time.perf_counter() - began, size

    path = folder / "swap.safetensors"
    with measured(f"hash of a set, {title}"):
        written = {name: digest(name, tensor) for name, tensor in tensors.items()}
    with measured("write a set"):
        save_file(tensors, path)
    with measured("plain copy of a set to the device"), torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    with measured("swap from the mapped file, verified"), torch.no_grad():
        with safe_open(path, framework="pt") as file:
            for name in trained:
                own[name].copy_(file.get_tensor(name))
        held = {name: digest(name, own[name]) for name in trained}
    path.unlink()
    if held != written:
        raise RuntimeError("swap: expected the model to hold the tensors of the file")
    return found


def _digest() -> tuple[Callable[[str, torch.Tensor], str], str]:
    """Return the hash of weight sets; without ``xxhash``, which a plain checkout may lack, BLAKE2b, and its name."""
    if find_spec("xxhash"):
        from vargpt_rl.storage.hashes import tensor_hash

        return tensor_hash, "xxh3-128"

    def blake2b(name: str, tensor: torch.Tensor) -> str:
        own = tensor.detach().to("cpu").contiguous()
        return hashlib.blake2b(own.reshape(-1).view(torch.uint8).numpy().data).hexdigest()

    return blake2b, "BLAKE2b"


@torch.no_grad()
def precision(model: Vargpt, ids_BT: torch.Tensor, resolution: int) -> str:
    """Compare log-probabilities of two images in bf16 and fp32; converts the model, which stays in fp32."""
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    scores: dict[torch.dtype, list[float]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for parameter in model.parameters():  # buffers stay: rotary frequencies are in fp32
            parameter.data = parameter.data.to(dtype)
        with ids_BT.device:
            scores[dtype] = log_probs(model, inputs, resolution).tolist()
    half, full = scores[torch.bfloat16], scores[torch.float32]
    worst = max(abs(one - other) for one, other in zip(half, full, strict=True))
    return f"{half[0]:.2f} and {full[0]:.2f} nats; largest difference {worst:.3f} ({worst / abs(full[0]):.1e} of them)"

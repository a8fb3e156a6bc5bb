"""Low-rank adapters (LoRA, arXiv 2106.09685), made by peft: small trained matrices beside frozen linear layers.

A run has one adapter. It stands on the run's start model, begins without effect, and every stage continues it: a stage
trains the matrices of its own parts. So nothing is rounded between stages, an adapter's tensors replace those of an
earlier version in a weight set as full weights do, and the result of a whole run is one adapter of the start model.

``attach`` adds the matrices to a model, ``MergedAdapter`` keeps their product in the base weights of a live model,
``fuse`` puts it there for good.

Shape legend: O outputs and I inputs of a linear layer, r rank.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import torch
from torch import nn

from vargpt_rl.common.settings import Between, Count, Line, OneOf, Positive
from vargpt_rl.model.parts import IMAGE_TOKENIZER, PARTS

if TYPE_CHECKING:  # peft takes a second to load, and only a model with an adapter needs it
    from peft.tuners.lora import Linear as LoraLinear
    from transformers import PreTrainedModel

NAME = "default"
"""Name of the adapter in peft's layers, and so in the names of its tensors."""
_A, _B = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"


@dataclass
class AdapterConfig:
    """A low-rank adapter that a run trains instead of the model."""

    kind: Annotated[str, OneOf("none", "lora")] = "none"
    """``none`` trains the model's own weights, ``lora`` an adapter."""
    rank: Count = 16
    """Rank of the matrices: inner width of the product that is added to a layer."""
    alpha: Positive = 32.0
    """The product counts alpha / rank."""
    dropout: Annotated[float, Between(0, 1, includes_high=False)] = 0.0
    """Share of a layer's inputs that supervised stages hide from the adapter. DPO and online methods hide none."""
    targets: list[Line] = field(default_factory=lambda: ["language_model", "image_decoder", "projectors"])
    """Linear layers that get matrices: parts (language_model, vision_tower, image_decoder, projectors), names of
    layers, or ends of names such as self_attention.qkv. A stage trains those of the parts that it trains."""
    full: list[Annotated[str, OneOf(*PARTS)]] = field(default_factory=list)
    """Parts whose own weights train beside the matrices, in the stages that train them."""
    serving: Annotated[str, OneOf("applied", "merged")] = "applied"
    """Use in the rollout workers: ``applied`` beside the weights, as in the learner, or ``merged`` into them after each
    swap, which draws as fast as without an adapter and rounds to the weights' dtype."""
    reference: Annotated[str, OneOf("workers", "learner")] = "workers"
    """Who scores the reference of DPO and online methods: the ``workers``, or the ``learner`` with its own model and
    the adapter as the stage found it, for a forward pass more in each micro-batch. Online methods then need no swap to
    the reference and back; in DPO the workers' scores, which come with the pairs, only check the learner's. Not with
    ZeRO 3."""

    four_bit: list[Annotated[str, OneOf("language_model", "vision_tower", "image_decoder")]] = field(
        default_factory=list
    )
    """Parts whose frozen linear layers are held in 4 bits (QLoRA, by bitsandbytes, on GPUs alone), in the workers too.
    Needs ``serving=applied``, bf16, and ZeRO 0 to 2. Exports merge into the original weights."""

    def __post_init__(self):
        if not self.targets:
            raise ValueError("adapter.targets=[]: expected one or more")
        if any(target.split(".")[0] == IMAGE_TOKENIZER for target in self.targets):
            raise ValueError(
                f"adapter.targets={self.targets}: the image tokenizer takes no adapter, since all images are encoded "
                f"with it; expected some of {', '.join(PARTS)}"
            )
        if self.four_bit and self.serving == "merged":
            raise ValueError(
                f"adapter.serving=merged with adapter.four_bit={self.four_bit}: nothing merges into 4 bits, expected "
                f"applied"
            )
        if both := set(self.four_bit) & set(self.full):
            raise ValueError(f"adapter.full={self.full}: {min(both)} is in adapter.four_bit too, expected it in one")
        if both := set(self.targets) & set(self.full):
            raise ValueError(f"adapter.full={self.full}: {min(both)} is in adapter.targets too, expected it in one")

    @property
    def is_on(self) -> bool:
        return self.kind != "none"

    @property
    def is_merged(self) -> bool:
        """Tell whether workers score with rounded weights."""
        return self.is_on and self.serving == "merged"

    @property
    def scores_in_learner(self) -> bool:
        """Tell whether the learner scores the reference."""
        return self.is_on and self.reference == "learner"

    def trains(self, name: str) -> bool:
        """Tell whether a tensor of this name may train: the adapter's own and those of ``full`` parts."""
        return is_adapter(name) or name.startswith(self.full_prefixes)

    @property
    def full_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the tensors of ``full`` parts."""
        return tuple(prefix for part in self.full for prefix in PARTS[part])


def is_adapter(name: str) -> bool:
    """Tell whether a tensor of a model belongs to an adapter."""
    return name.endswith((_A, _B))


def target_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the names of the linear layers that get matrices.

    ValueError for a target that fits none. The text head is left out, because some checkpoints tie it to the embedding.
    """
    left_out = ("lm_head", f"{IMAGE_TOKENIZER}.", *config.full_prefixes)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(left_out)
    ]
    found: set[str] = set()
    for target in config.targets:
        fitting = {name for name in linears if _fits(target, name)}
        if not fitting:
            raise ValueError(
                f"adapter.targets={config.targets}: {target} fits no linear layer, expected parts "
                f"({', '.join(PARTS)}), names or ends of names such as {linears[0]}"
            )
        found |= fitting
    return sorted(found)


def _fits(target: str, name: str) -> bool:
    if target in PARTS:
        return name.startswith(PARTS[target])
    return name == target or name.endswith(f".{target}")


def attach(model: "PreTrainedModel", config: AdapterConfig, dropout: bool = False) -> None:
    """Add the matrices to a model, in its dtype, and freeze everything.

    Its outputs stay the same to the bit. Names of its own weights gain ``.base_layer``. Without ``dropout``, scores are
    exact in training mode too.
    """
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by r
        lora_dropout=config.dropout if dropout else 0.0,
        target_modules=target_modules(model, config),
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(lora, model, NAME)
    for name, parameter in model.named_parameters():
        if is_adapter(name):  # peft takes the dtype of the layer, and that of one in 4 bits is no float
            parameter.data = parameter.data.to(model.dtype)
    model.requires_grad_(False)


def fresh_tensors(model: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return an adapter without effect for a model with an adapter, which may be on the meta device.

    The first matrix is random as in peft (LoRA's paper, section 4.1), the second is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            tensor = torch.zeros(parameter.shape)
            if name.endswith(_A):
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
            found[name] = tensor.to(dtype)
    return found


def lora_layers(model: nn.Module) -> "dict[str, LoraLinear]":
    """Return the layers of a model that have matrices, by name."""
    from peft.tuners.lora import Linear as LoraLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def merged_weight(base_OI: torch.Tensor, a_rI: torch.Tensor, b_Or: torch.Tensor, scale: float) -> torch.Tensor:
    """Add an adapter's product to a weight: summed in fp32, rounded once. Without effect it is the base to the bit."""
    if not b_Or.any():
        return base_OI  # not even the sign of a zero changes
    return (base_OI.float() + scale * (b_Or.float() @ a_rI.float())).to(base_OI.dtype)


def base_linear(layer: "LoraLinear") -> nn.Linear:
    """Return the layer that has matrices, without them."""
    linear = layer.get_submodule("base_layer")
    assert isinstance(linear, nn.Linear)  # see `target_modules`
    return linear


def _merged(layer: "LoraLinear", base_OI: torch.Tensor) -> torch.Tensor:
    a_rI, b_Or = (layer.get_parameter(f"lora_{side}.{NAME}.weight") for side in "AB")
    return merged_weight(base_OI, a_rI, b_Or, layer.scaling[NAME])


class MergedAdapter:
    """Keeps a live model's adapter merged into its weights, whose originals stay in the machine's memory."""

    def __init__(self, model: nn.Module):
        self._layers = list(lora_layers(model).values())
        self._bases = [base_linear(layer).weight.detach().to("cpu", copy=True) for layer in self._layers]

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge the adapter's current tensors; the base comes back to the bit where they have no effect."""
        for layer, base_OI in zip(self._layers, self._bases, strict=True):
            weight_OI = base_linear(layer).weight
            weight_OI.copy_(_merged(layer, base_OI.to(weight_OI.device)))
            layer.merged_adapters = [NAME]  # peft then leaves the matrices out of the pass


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """Put the adapter into the weights for good: the model is then one without adapter."""
    for name, layer in lora_layers(model).items():
        linear = base_linear(layer)
        linear.weight.copy_(_merged(layer, linear.weight))
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, linear)
    del model.peft_config  # set by peft

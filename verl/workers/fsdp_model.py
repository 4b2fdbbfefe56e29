"""Builds a model: loads it, adds adapters, shards it (FSDP2), adds optimizer and schedule.

It also gathers full parameters. The code path is the same for any number of ranks, nccl or gloo.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForTokenClassification, PreTrainedModel

from verl.utils.torch_functional import at_least_float32
from verl.workers.checkpoint_names import checkpoint_format
from verl.workers.config import FSDPConfig, ModelConfig, OptimConfig
from verl.workers.image_tower import (
    forbid_image_tokens,
    freeze_tower,
    language_model,
    policy_class,
)
from verl.workers.lora import add_adapters, base_model, merged, plain_name, scaling
from verl.workers.packing import forget_lengths, packing_of
from verl.workers.shallow import Head


@dataclass
class TrainState:
    """A model with its optimizer and schedule.

    The learning rate is never saved. It follows from the configuration (`peak_lr`, `schedule`) and
    from the history of the run (`ticks`, `lr_factor`), so a resumed run uses the configured rate.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    peak_lr: float
    schedule: Callable[[int], float]
    """The share of the peak learning rate after a number of ticks."""
    optimizer_offload: bool = False
    """Whether the optimizer's state is on the host between updates."""
    ticks: int = 0
    """Training steps so far in which this model was updated."""
    lr_factor: float = 1.0
    """The factor by which roll-backs have multiplied the learning rate."""

    def __post_init__(self) -> None:
        self._set_lr()

    @property
    def lr(self) -> float:
        """The learning rate of the next training step."""
        return self.peak_lr * self.lr_factor * self.schedule(self.ticks)

    def tick(self) -> None:
        """Moves one step along the schedule, after a training step."""
        self.go_to(self.ticks + 1, self.lr_factor)

    def scale_lr(self, factor: float) -> None:
        """Multiplies the learning rate by `factor`, which is saved with checkpoints."""
        self.go_to(self.ticks, self.lr_factor * factor)

    def go_to(self, ticks: int, lr_factor: float) -> None:
        """Sets the position in the schedule, and the factor of the learning rate."""
        self.ticks = ticks
        self.lr_factor = lr_factor
        self._set_lr()

    def _set_lr(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def load_optimizer(self, device: torch.device) -> None:
        """Moves the optimizer's state to `device`, for the optimizer steps."""
        self._move_optimizer(device)

    def offload_optimizer(self) -> None:
        """Moves the optimizer's state to the host, if `optimizer_offload` is set."""
        self._move_optimizer(torch.device("cpu"))

    def _move_optimizer(self, device: torch.device) -> None:
        if not self.optimizer_offload:
            return
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = value.to(device)


def build_model(
    config: ModelConfig, head: Head, fsdp: FSDPConfig, mesh: DeviceMesh
) -> PreTrainedModel:
    """Builds the sharded model, in evaluation mode.

    There is no dropout, because old and new log-probs must be comparable. Every rank reads the
    weights to host memory and keeps its shard. A value head is a new linear layer, and is the same
    on all ranks because it is initialised with rank 0's seed. `model.packs_rows` says whether rows
    may share a forward pass. Raises ConfigError for a model that cannot be trained here.
    """
    dtype = getattr(torch, fsdp.model_dtype)
    packing = packing_of(config, head, mesh.device_type == "cuda", getattr(torch, fsdp.dtype))
    overrides = {k: v for k, v in config.override_config.items() if v is not None}
    overrides["attn_implementation"] = packing.attention
    if config.reads_images:
        overrides["attn_implementation"] = {"text_config": packing.attention}
    auto = policy_class(config) if head == "lm" else AutoModelForTokenClassification
    extra: dict[str, Any] = {} if head == "lm" else {"num_labels": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_pretrained(
            config.path,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            **overrides,
            **extra,
        )
        if config.lora_rank:
            model = add_adapters(model, config)
    if config.reads_images:
        freeze_tower(model)
        forbid_image_tokens(model)
    model.config.use_cache = False
    model.eval()
    forget_lengths(model)
    layers = decoder_layers(language_model(model) if config.reads_images else model)
    if config.use_torch_compile:
        for layer in layers:
            # only forward is compiled, so that the hooks of FSDP stay outside
            layer.forward = torch.compile(layer.forward, dynamic=True)
    if config.enable_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:
            checkpoint_in_evaluation(layer)
    shard(model, layers, fsdp, mesh)
    model.packs_rows = packing.packs  # pyright: ignore
    return model


def checkpoint_in_evaluation(layer: torch.nn.Module) -> None:
    """Makes a layer checkpoint its activations and still compute as in evaluation.

    Layers of transformers checkpoint only in training mode. Some families read that mode of the
    layer to decide about dropout (OPT) or noise, so the layer is in training mode only until its
    computation begins.
    """
    compute = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        layer.training = False
        try:
            return compute(*args, **kwargs)
        finally:
            layer.training = True

    layer.forward = forward
    layer.training = True


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The blocks that are sharded, checkpointed and compiled one by one."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def shard(
    model: PreTrainedModel, layers: list[torch.nn.Module], fsdp: FSDPConfig, mesh: DeviceMesh
) -> None:
    """Shards every layer, then the rest, over `mesh`."""
    dtype = getattr(torch, fsdp.dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=at_least_float32(dtype))
    offload = (
        CPUOffloadPolicy() if fsdp.param_offload and mesh.device_type == "cuda" else OffloadPolicy()
    )
    kwargs: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    for layer in layers:
        fully_shard(layer, reshard_after_forward=fsdp.reshard_after_forward, **kwargs)
    fully_shard(model, reshard_after_forward=fsdp.reshard_after_forward, **kwargs)


def build_train_state(
    model: PreTrainedModel, optim: OptimConfig, total_steps: int, fsdp: FSDPConfig | None = None
) -> TrainState:
    """Builds optimizer and schedule of a model. `total_steps` counts training steps (ticks)."""
    # with param_offload the optimizer steps on the host, so its state stays there
    moves = fsdp is not None and fsdp.optimizer_offload and not fsdp.param_offload
    return TrainState(
        model,
        build_optimizer(model, optim),
        peak_lr=optim.lr,
        schedule=build_schedule(optim, total_steps),
        optimizer_offload=moves,
    )


def build_optimizer(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Builds the optimizer of the trained parameters: fused AdamW.

    This is the only place that names it. Checkpoints save any optimizer's state, but the estimate
    of memory counts AdamW's two averages (`verl.estimate.memory.resident`).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )


def build_schedule(optim: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """A function from ticks to the share of the peak learning rate: linear warm-up, then decay."""
    warmup = int(optim.lr_warmup_steps_ratio * total_steps)

    def share(ticks: int) -> float:
        if ticks < warmup:
            return (ticks + 1) / warmup
        if optim.lr_scheduler_type == "constant":
            return 1.0
        progress = min(1.0, (ticks - warmup) / max(1, total_steps - warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine

    return share


def full_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Gathers the parameters one by one: names and whole tensors, with adapters merged.

    Names are those of a checkpoint. A collective: every rank must exhaust the iterator.
    """
    return checkpoint_format(
        base_model(model), merged(dict(model.named_parameters()), scaling(model), whole)
    )


def full_shapes(model: PreTrainedModel) -> list[tuple[str, torch.Size]]:
    """The names and shapes that `full_parameters` gives, in the same order, without gathering."""
    named = ((plain_name(name), value) for name, value in model.named_parameters())
    empty = ((name, torch.empty(value.shape, device="meta")) for name, value in named if name)
    return [(name, tensor.shape) for name, tensor in checkpoint_format(base_model(model), empty)]


def whole(value: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor, on the device of the mesh. A collective for sharded tensors.

    With `param_offload` the shards are on the host. They are moved to the GPU before they are
    gathered, so that they travel over NVLink instead of TCP (gloo), and so that the result can be
    sent by NCCL and CUDA IPC.
    """
    if isinstance(value, DTensor):
        shards: Any = value.to(value.device_mesh.device_type)
        value = shards.full_tensor()
    return value.detach()


def describe(model: PreTrainedModel) -> str:
    """The size, trained share and attention of a model, in one line."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total = sum(n for n, _ in sizes)
    trained = sum(n for n, trains in sizes if trains)
    share = f", {trained / 1e6:,.1f} M trained" if trained < total else ""
    return f"{total / 1e6:,.1f} M parameters{share}, attention {model.config._attn_implementation}"

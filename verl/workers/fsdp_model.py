"""Building and running a sharded model: load, shard (FSDP2), optimizer, schedule, forward on rows, full parameters.

One code path for 1..N ranks, nccl or gloo. Shapes: b rows of a micro-batch, P prompt, R response, V vocabulary.
"""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from verl.protocol import DataProto
from verl.utils.torch_functional import logprobs_and_entropy, logprobs_from_logits
from verl.workers.config import FSDPConfig, ModelConfig, OptimConfig

Head = Literal["lm", "value"]


@dataclass
class TrainState:
    """A model with what trains it."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR


def build_model(config: ModelConfig, head: Head, fsdp: FSDPConfig, mesh: DeviceMesh) -> PreTrainedModel:
    """The sharded model, in evaluation mode (no dropout: log-probs before and after the update must agree).

    Every rank reads the weights to host memory and keeps its shard. A value head is a new linear layer, the same on all
    ranks because rank 0's seed initialises it.
    """
    on_gpu = mesh.device_type == "cuda"
    overrides = {"attn_implementation": default_attention(on_gpu, fsdp), **config.override_config}
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForTokenClassification
    extra: dict[str, Any] = {} if head == "lm" else {"num_labels": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_pretrained(
            config.path,
            dtype=getattr(torch, fsdp.model_dtype),
            trust_remote_code=config.trust_remote_code,
            **overrides,
            **extra,
        )
    model.config.use_cache = False
    if config.enable_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard(model, fsdp, mesh)
    return model.eval()


def default_attention(on_gpu: bool, fsdp: FSDPConfig) -> str:
    """flash_attention_2 where it is installed and the dtype allows it, else torch's own sdpa."""
    flash = on_gpu and fsdp.dtype != "float32" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def shard(model: PreTrainedModel, fsdp: FSDPConfig, mesh: DeviceMesh) -> None:
    """Shards every decoder layer, then the rest, over `mesh`."""
    dtype = getattr(torch, fsdp.dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=at_least_float32(dtype))
    offload = CPUOffloadPolicy() if fsdp.param_offload and mesh.device_type == "cuda" else OffloadPolicy()
    kwargs: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, reshard_after_forward=fsdp.reshard_after_forward, **kwargs)
    fully_shard(model, reshard_after_forward=fsdp.reshard_after_forward, **kwargs)


def build_train_state(model: PreTrainedModel, optim: OptimConfig, total_steps: int) -> TrainState:
    """AdamW and its schedule; `total_steps` counts training steps (scheduler ticks)."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    warmup = int(optim.lr_warmup_steps_ratio * total_steps)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if optim.lr_scheduler_type == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return TrainState(model, optimizer, LambdaLR(optimizer, scale))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def trim(data: DataProto) -> tuple[dict[str, torch.Tensor], int]:
    """Model inputs of the rows without columns that are padding in all of them, and the trimmed response length r.

    input_ids, attention_mask, position_ids: [b, p + r].
    """
    prompts, responses, mask = (data.batch[k] for k in ("prompts", "responses", "attention_mask"))
    prompt_len = prompts.shape[1]
    p = int(mask[:, :prompt_len].sum(1).max())
    r = int(mask[:, prompt_len:].sum(1).max())
    mask = mask[:, prompt_len - p : prompt_len + r]
    ids = torch.cat([prompts[:, prompt_len - p :], responses[:, :r]], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, r


def forward_log_probs(
    model: PreTrainedModel, data: DataProto, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of the response tokens [b, R] under logits / temperature, and their entropy [b, R]; 0 on padding.

    The logit that predicts response token t sits one position earlier, so r + 1 positions are kept, the last dropped.
    """
    inputs, r = trim(data)
    logits = model(**inputs, use_cache=False, logits_to_keep=r + 1).logits[:, :-1]
    labels, pad = data.batch["responses"][:, :r], (0, data.batch["responses"].shape[1] - r)
    if not with_entropy:
        return torch.nn.functional.pad(logprobs_from_logits(logits, labels, temperature), pad), None
    log_probs, entropy = logprobs_and_entropy(logits, labels, temperature)
    return torch.nn.functional.pad(log_probs, pad), torch.nn.functional.pad(entropy, pad)


def log_probs_of_rows(model: PreTrainedModel, data: DataProto, temperature: float) -> torch.Tensor:
    """Log-probs alone: [b, R]."""
    return forward_log_probs(model, data, temperature, with_entropy=False)[0]


def forward_values(model: PreTrainedModel, data: DataProto) -> torch.Tensor:
    """Values [b, R] of the states in which the response tokens were chosen (one position earlier); 0 on padding."""
    inputs, r = trim(data)
    values = model(**inputs, use_cache=False).logits[:, -r - 1 : -1, 0]
    values = values.to(at_least_float32(values.dtype))
    return torch.nn.functional.pad(values, (0, data.batch["responses"].shape[1] - r))


def full_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and whole tensors, gathered one by one. A collective: every rank must exhaust it."""
    for name, param in model.state_dict().items():
        yield name, (param.full_tensor() if isinstance(param, DTensor) else cast(torch.Tensor, param)).detach()

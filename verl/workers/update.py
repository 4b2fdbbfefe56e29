"""The optimizer steps that actor and critic share.

Losses are divided by counts of the whole mini-batch, over all micro-batches and ranks, so the
gradient depends on neither. All ranks must run the same collectives, so ranks with fewer
micro-batches run empty ones, and all decide together whether a step is skipped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from verl.protocol import ACTOR_MINI_BATCH, DataProto
from verl.utils.seqlen_balancing import balance
from verl.workers.fsdp_model import TrainState
from verl.workers.image_tower import PIXELS

INPUTS = ("prompts", "responses", "attention_mask", "response_mask")
"""Columns that a forward pass reads."""
IMAGES = (PIXELS,)
"""Those that it reads if there are images."""
Metrics = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Counts:
    """Trained tokens and trajectories of a mini-batch, over all ranks."""

    num_tokens: int
    num_seqs: int
    """Trajectories with a trained token. One whose mask a loss filter has cleared has none."""


LossFn = Callable[[DataProto, Counts], tuple[torch.Tensor, Metrics]]
"""From a micro-batch to its share of the mini-batch's loss and metrics.

The shares of all micro-batches add up to those of the mini-batch."""


@dataclass(frozen=True)
class Budget:
    """The limits of one forward pass. A row with more than `max_tokens` passes alone."""

    max_tokens: int
    max_rows: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, max_tokens: int, max_rows: int | None = None) -> "Budget":
        """A budget of one row if the rows of this model may not share a pass (`packing.py`)."""
        return cls(max_tokens, max_rows if getattr(model, "packs_rows", True) else 1)


def micro_batches(lengths: list[int], budget: Budget, at_least: int = 1) -> list[list[int]]:
    """Positions of `lengths` in the fewest parts of nearly equal sums that fit the budget.

    There are `at_least` parts or more. With fewer rows than parts the last parts are empty.
    """
    max_rows = budget.max_rows or max(1, len(lengths))
    number = max(
        at_least, math.ceil(sum(lengths) / budget.max_tokens), math.ceil(len(lengths) / max_rows)
    )

    def fits(part: list[int]) -> bool:
        # a row that is too long passes alone
        within = len(part) <= 1 or sum(lengths[row] for row in part) <= budget.max_tokens
        return len(part) <= max_rows and within

    parts = balance(lengths, number, equal_size=False)
    while not all(map(fits, parts)):
        number += 1
        parts = balance(lengths, number, equal_size=False)
    return parts


def empty_rows(data: DataProto) -> DataProto:
    """One row without a trained token, with the columns of `data`.

    A rank without rows runs it to take part in the collectives of the others.
    """
    columns = {
        k: torch.zeros((1, *v.shape[1:]), dtype=v.dtype, device=v.device)
        for k, v in data.batch.items()
    }
    # the last token of the prompt and the first of the response are real
    last = columns["prompts"].shape[1] - 1
    columns["attention_mask"][:, last : last + 2] = 1
    return DataProto.from_dict(columns)


def reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """The sum of each value over all ranks, in float64. A collective."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def reduce_max(value: float, device: torch.device) -> float:
    """The largest value of all ranks. A collective."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return total.item()


def run_micro_batches(data: DataProto, budget: Budget, device: torch.device) -> list[DataProto]:
    """Divides the rows into micro-batches, the same number on every rank. A collective.

    Some of them are `empty_rows` if this rank has too few rows.
    """
    lengths = data.batch["attention_mask"].sum(1).tolist()
    parts = micro_batches(lengths, budget)
    number = 0
    most = int(reduce_max(len(parts), device))
    # a division into `most` parts may not fit, and then all ranks take the larger number
    while most > number:
        number = most
        if len(parts) < number:
            parts = micro_batches(lengths, budget, at_least=number)
        most = int(reduce_max(len(parts), device))
    return [data[part] if part else empty_rows(data) for part in parts]


def map_micro_batches(
    data: DataProto,
    budget: Budget,
    device: torch.device,
    forward: Callable[[DataProto], torch.Tensor],
) -> torch.Tensor:
    """Runs `forward` over micro-batches without gradient.

    `forward` gives [b, R]; the result is [B, R], on the CPU and in the order of `data`.
    """
    present = [column for column in IMAGES if column in data.batch]
    rows = data.select([*INPUTS, *present]).to(device)
    rows = rows.with_tensors(position=torch.arange(len(rows), device=device))
    result = torch.zeros(rows.batch["responses"].shape, dtype=torch.float32)
    with torch.no_grad():
        for part in run_micro_batches(rows, budget, device):
            out = forward(part)
            if part.batch["response_mask"].any():
                result[part.batch["position"].cpu()] = out.cpu()
    return result


def update_mini_batches(
    state: TrainState,
    data: DataProto,
    loss_fn: LossFn,
    *,
    epochs: int,
    budget: Budget,
    grad_clip: float,
    column: str = ACTOR_MINI_BATCH,
) -> dict[str, float]:
    """Takes one optimizer step per mini-batch and epoch; metrics are averaged over the steps.

    `column` assigns the rows to mini-batches. `meta_info["num_mini_batches"][column]` says how many
    there are, because a rank may have no row of one. Rows without a trained token are left out, and
    a mini-batch without a trained token takes no step. Metrics beside those of `loss_fn`: `lr`, the
    learning rate of these steps; `optimizer_steps`, the steps taken; `skipped_steps`, the steps
    skipped because loss or gradient was not finite.
    """
    device = data.batch[column].device
    has_tokens = data.batch["response_mask"].bool().any(1)
    steps: list[dict[str, float]] = []
    state.load_optimizer(device)
    for _ in range(epochs):
        for index in range(data.meta_info["num_mini_batches"][column]):
            rows = data[((data.batch[column] == index) & has_tokens).cpu()]
            counts = count_trained(rows, device)
            if counts.num_tokens == 0:
                continue
            totals: dict[str, float] = {}
            for part in run_micro_batches(rows, budget, device):
                loss, metrics = loss_fn(part, counts)
                # FSDP averages gradients over ranks, but these losses must be summed over them
                (loss * dist.get_world_size()).backward()
                add(totals, {"loss": loss.detach(), **metrics})
            steps.append(optimizer_step(state, totals, grad_clip, device))
    state.offload_optimizer()
    lr = state.lr
    state.tick()
    return {**over_steps(steps), "lr": lr}


def over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of all steps: means of their finite values, and how many steps there were."""
    names = steps[0] if steps else ()
    metrics: dict[str, float] = {}
    for name in names:
        metrics[name] = _mean([step[name] for step in steps])
    metrics["skipped_steps"] = sum(step["skipped_steps"] for step in steps)
    metrics["optimizer_steps"] = len(steps) - metrics["skipped_steps"]
    return metrics


def count_trained(rows: DataProto, device: torch.device) -> Counts:
    """Counts trained tokens, and trajectories with one, in the rows of all ranks. A collective.

    A row of a trajectory that has several counts as its share of the trajectory's tokens.
    """
    mask = rows.batch["response_mask"].bool()
    tokens = mask.sum(1)
    whole = rows.batch.get("seq_tokens", tokens)
    shares = tokens.double() / whole.clamp(min=1)
    num_tokens, num_seqs = reduce_sum([float(tokens.sum()), float(shares.sum())], device)
    return Counts(round(num_tokens), round(num_seqs))


def add(totals: dict[str, float], values: Metrics) -> None:
    """Adds `values` to `totals`, by name."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + float(value)


def optimizer_step(
    state: TrainState, totals: dict[str, float], grad_clip: float, device: torch.device
) -> dict[str, float]:
    """Takes a step with the accumulated gradients, unless loss or gradient is not finite.

    `totals`: this rank's loss and metrics. Returns their sums over all ranks, `grad_norm`, and
    `skipped_steps`, 1 or 0.
    """
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    names = sorted(totals)
    sums = reduce_sum([totals[name] for name in names], device)
    figures = dict(zip(names, sums, strict=True))
    # both numbers are the same on every rank, so that all ranks decide alike
    finite = math.isfinite(norm) and math.isfinite(figures["loss"])
    if finite:
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return {**figures, "grad_norm": norm, "skipped_steps": float(not finite)}


def _mean(values: list[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan

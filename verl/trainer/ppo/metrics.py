"""Metrics of a training batch under their final names.

Shapes and columns are those of `verl.protocol`.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from verl.protocol import DataProto
from verl.trainer.ppo.joined import has_several_rows, one_of_each, sum_of_trajectory
from verl.utils.torch_functional import masked_mean, masked_sum, masked_var

MEMINFO = Path("/proc/meminfo")
"""What Linux says of the memory of the machine (proc_meminfo(5)), in KiB."""


def compute_data_metrics(data: DataProto, max_length: int) -> dict[str, float]:
    """Rewards, advantages, lengths and rollout agreement of a batch that carries advantages.

    Values and their explained variance are there only if the batch has a critic's `values`.
    `response_length/*` counts everything after the prompt, `response_length_model/*` what the
    policy sampled, `response_length_observation/*` the rest. `response_length/clip_ratio` is the
    share of trajectories that ran out of context: they have more than `max_length` tokens, prompt
    included. `actor/positive_log_prob` is the mean log-prob of the sampled tokens with a positive
    advantage; it is absent if there are none. It rises while the policy learns, and falls before a
    collapse (arXiv 2512.04220).
    """
    batch = data.batch
    mask = batch["response_mask"].bool()
    sampled = mask & (batch["turns"] >= 0)  # no observations, even if they are trained on
    scores = of_trajectories(masked_sum(batch["token_level_scores"], mask, axis=-1), data)
    rewards = of_trajectories(masked_sum(batch["token_level_rewards"], mask, axis=-1), data)
    metrics = {
        **_stats("critic/score", scores),
        "critic/score/std": scores.float().std(correction=0).item(),
        **_stats("critic/rewards", rewards),
        **_stats("critic/advantages", batch["advantages"][mask]),
        "critic/advantages/std": batch["advantages"][mask].std(correction=0).item(),
        **_stats("critic/returns", batch["returns"][mask]),
        **_length_metrics(data, sampled, max_length),
        **rollout_gap(batch["rollout_log_probs"], batch["old_log_probs"], sampled),
    }
    positive = sampled & (batch["advantages"] > 0)
    if positive.any():
        metrics["actor/positive_log_prob"] = masked_mean(batch["old_log_probs"], positive).item()
    if "values" in batch:
        metrics |= _stats("critic/values", batch["values"][mask])
        metrics["critic/vf_explained_var"] = explained_variance(
            batch["values"], batch["returns"], mask
        )
    return metrics


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(returns - values) / var(returns) over the mask.

    It is 1 for a perfect critic and 0 for one that only knows the mean.
    """
    return 1 - (masked_var(returns - values, mask) / (masked_var(returns, mask) + 1e-5)).item()


def compute_throughput_metrics(
    data: DataProto, timing: Mapping[str, float], n_gpus: int
) -> dict[str, float]:
    """Tokens of the batch, seconds of the step, and tokens per second and GPU.

    Prompts are included. Another metric is the share of the step that the other timers cover.
    """
    tokens = int(data.batch["attention_mask"].sum())
    seconds = timing["timing_s/step"]
    return {
        "perf/total_num_tokens": tokens,
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / (seconds * n_gpus),
        "perf/timer_coverage": (sum(timing.values()) - seconds) / seconds,
    }


def host_metrics(meminfo: Path = MEMINFO) -> dict[str, float]:
    """Memory of the driver's machine that is in use, by all programs, in GB of 1e9 bytes.

    It is left out where the system does not tell it.
    """
    try:
        lines = (line.partition(":") for line in meminfo.read_text().splitlines())
        values = {name: value for name, _, value in lines}
        total, available = (int(values[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        return {}
    return {"perf/cpu_memory_used_gb": (total - available) * 1024 / 1e9}


def staleness_metrics(data: DataProto, version: int) -> dict[str, float]:
    """Age of the policy's tokens in weight versions before `version`.

    The metrics are the mean, the maximum, and the share of each age.
    """
    ages = version - data.batch["policy_versions"][data.batch["turns"] >= 0]
    shares = torch.bincount(ages) / len(ages)
    return {
        "training/staleness/mean": ages.float().mean().item(),
        "training/staleness/max": float(ages.max()),
        **{f"training/staleness/share_{age}": share.item() for age, share in enumerate(shares)},
    }


def console_line(metrics: dict[str, float], step: int, total: int, eta_s: float) -> str:
    """Step, reward, length, searches and speed in one line.

    Metrics of the task are left out if the task does not have them.
    """
    parts = [f"step {step}/{total}", f"reward {metrics['critic/score/mean']:.3f}"]
    labels = {
        "reward/em": "EM",
        "env/number_of_valid_search": "searches",
        "env/finish_ratio": "answered",
    }
    for key, label in labels.items():
        if key in metrics:
            parts.append(f"{label} {metrics[key]:.2f}")
    parts.append(f"tokens/s {metrics['perf/throughput']:.0f}")
    parts.append(f"{metrics['timing_s/step']:.1f} s/step")
    return "  ".join([*parts, f"ETA {math.ceil(eta_s / 60)} min"])


def of_trajectories(values: Tensor, data: DataProto) -> Tensor:
    """The sum of `values` [B] over the rows of each trajectory, [number of trajectories]."""
    return sum_of_trajectory(values, data)[one_of_each(data)]


def _length_metrics(data: DataProto, mask: Tensor, max_length: int) -> dict[str, float]:
    batch = data.batch
    prompt_width = batch["prompts"].shape[1]
    attended = batch["attention_mask"].bool()
    prompts = attended[:, :prompt_width].sum(-1)
    sampled = of_trajectories(mask.sum(-1), data)
    response = of_trajectories(attended[:, prompt_width:].sum(-1), data)
    too_long = of_trajectories((attended.sum(-1) > max_length).long(), data) > 0
    rows = {"rows/mean": len(data) / len(response)} if has_several_rows(data) else {}
    return {
        **_stats("prompt_length", prompts),
        **_stats("response_length", response),
        **rows,
        "response_length/clip_ratio": too_long.float().mean().item(),
        **_stats("response_length_model", sampled),
        **_stats("response_length_observation", response - sampled),
        "state_tokens/total": sampled.sum().item(),
        "state_tokens/coverage": (sampled.sum() / response.sum()).item(),
    }


def rollout_gap(rollout_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """Differences between the trainer's log-probs and those of the engine, in nats."""
    gap = torch.where(mask, (rollout_log_probs - old_log_probs).abs(), 0.0)
    return {
        "rollout/logprob_diff_mean": masked_mean(gap, mask).item(),
        "rollout/logprob_diff_max": gap.max().item(),
    }


def _stats(name: str, values: Tensor) -> dict[str, float]:
    values = values.float()
    return {
        f"{name}/mean": values.mean().item(),
        f"{name}/max": values.max().item(),
        f"{name}/min": values.min().item(),
    }

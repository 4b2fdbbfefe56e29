"""Figures of a training batch under their final names. Shapes and keys: the schema of
`verl.protocol`."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from verl.protocol import DataProto
from verl.utils.torch_functional import masked_mean, masked_sum, masked_var


def compute_data_metrics(data: DataProto, max_length: int) -> dict[str, float]:
    """Rewards, advantages, lengths and rollout agreement of a batch that carries advantages.

    Values and their explained variance only where the batch has a critic's `values`.
    `response_length/*` counts everything after the prompt, `response_length_model/*` what the
    policy sampled, `response_length_observation/*` the rest. `response_length/clip_ratio` is the
    share of trajectories, prompt included, of more than `max_length` tokens: those that ran out of
    context. `actor/positive_log_prob` is the mean log-probability of the sampled tokens that the
    advantage favours, absent where there are none: it rises while the policy learns, and falls
    before a collapse (arXiv 2512.04220).
    """
    batch = data.batch
    mask = batch["response_mask"].bool()
    sampled = mask & (batch["turns"] >= 0)  # without observations, also where they are trained on
    scores = masked_sum(batch["token_level_scores"], mask, axis=-1)
    metrics = {
        **_stats("critic/score", scores),
        "critic/score/std": scores.float().std(correction=0).item(),
        **_stats("critic/rewards", masked_sum(batch["token_level_rewards"], mask, axis=-1)),
        **_stats("critic/advantages", batch["advantages"][mask]),
        **_stats("critic/returns", batch["returns"][mask]),
        **_length_metrics(batch, sampled, max_length),
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
    """1 - var(returns - values) / var(returns) over the mask: 1 is a perfect critic, 0 one that
    knows the mean."""
    return 1 - (masked_var(returns - values, mask) / (masked_var(returns, mask) + 1e-5)).item()


def compute_throughput_metrics(
    data: DataProto, timing: Mapping[str, float], n_gpus: int
) -> dict[str, float]:
    """Tokens of the batch (prompts included), seconds of the step, tokens per second and GPU, and
    the share of the step that the other timers account for."""
    tokens = int(data.batch["attention_mask"].sum())
    seconds = timing["timing_s/step"]
    return {
        "perf/total_num_tokens": tokens,
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / (seconds * n_gpus),
        "perf/timer_coverage": (sum(timing.values()) - seconds) / seconds,
    }


def staleness_metrics(data: DataProto, version: int) -> dict[str, float]:
    """How many weight versions older than `version` the policy's tokens are: mean, max, and the
    share of each age."""
    ages = version - data.batch["policy_versions"][data.batch["turns"] >= 0]
    shares = torch.bincount(ages) / len(ages)
    return {
        "training/staleness/mean": ages.float().mean().item(),
        "training/staleness/max": float(ages.max()),
        **{f"training/staleness/share_{age}": share.item() for age, share in enumerate(shares)},
    }


def console_line(metrics: dict[str, float], step: int, total: int, eta_s: float) -> str:
    """Step, reward, length, searches and speed in one line; task metrics where the task has
    them."""
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


def _length_metrics(batch: Mapping[str, Tensor], mask: Tensor, max_length: int) -> dict[str, float]:
    prompt_width = batch["prompts"].shape[1]
    attended = batch["attention_mask"].bool()
    sampled = mask.sum(-1)
    response = attended[:, prompt_width:].sum(-1)
    return {
        **_stats("prompt_length", attended[:, :prompt_width].sum(-1)),
        **_stats("response_length", response),
        "response_length/clip_ratio": (attended.sum(-1) > max_length).float().mean().item(),
        **_stats("response_length_model", sampled),
        **_stats("response_length_observation", response - sampled),
        "state_tokens/total": sampled.sum().item(),
        "state_tokens/coverage": (sampled.sum() / response.sum()).item(),
    }


def rollout_gap(rollout_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the trainer's log-probs are from those the engine sampled with, in nats."""
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

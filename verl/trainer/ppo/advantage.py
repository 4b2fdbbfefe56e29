"""Rewards and advantages of a batch, computed by the functions of core_algos."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.config import AlgorithmConfig
from verl.trainer.ppo.core_algos import (
    ADVANTAGE_ESTIMATORS,
    AdaptiveKLController,
    FixedKLController,
    compute_rewards,
    kl_penalty,
)
from verl.trainer.ppo.joined import Joined, has_several_rows, one_of_each
from verl.utils.torch_functional import masked_mean

KLController = AdaptiveKLController | FixedKLController
NONZERO = "critic/advantages/nonzero_share"


def build_kl_controller(config: AlgorithmConfig) -> KLController:
    """The controller of the KL coefficient of the reward."""
    ctrl = config.kl_ctrl
    if ctrl.type == "fixed":
        return FixedKLController(ctrl.kl_coef)
    return AdaptiveKLController(ctrl.kl_coef, ctrl.target_kl, ctrl.horizon)


def restore_kl(
    controller: KLController, config: AlgorithmConfig, saved: Mapping[str, Any], value: float
) -> None:
    """Sets an adaptive coefficient to the saved `value`, unless its configured start has changed.

    `saved` is the `kl_ctrl` section with which the value was reached. A fixed coefficient stays as
    it is configured.
    """
    ctrl = config.kl_ctrl
    same_start = ctrl.type == saved["type"] and ctrl.kl_coef == saved["kl_coef"]
    if ctrl.type == "adaptive" and same_start:
        controller.value = value


def apply_kl_penalty(
    data: DataProto, config: AlgorithmConfig, controller: KLController
) -> tuple[DataProto, dict[str, float]]:
    """Adds `token_level_rewards`; returns the batch and the metrics of the KL in the reward.

    Rewards are the scores. With `use_kl_in_reward` the KL to the reference is subtracted, and then
    `controller` moves its coefficient.
    """
    batch = data.batch
    scores = batch["token_level_scores"]
    mask = batch["response_mask"]
    if not config.use_kl_in_reward:
        return data.with_tensors(token_level_rewards=scores), {}
    beta = controller.value
    rewards = compute_rewards(
        scores, batch["old_log_probs"], batch["ref_log_prob"], beta, mask, config.kl_penalty
    )
    kld = kl_penalty(batch["old_log_probs"], batch["ref_log_prob"], config.kl_penalty)
    kl = masked_mean(kld, mask).item()
    controller.update(kl, n_steps=len(mask[one_of_each(data)]))
    metrics = {"critic/kl": kl, "critic/kl_coeff": beta}
    return data.with_tensors(token_level_rewards=rewards), metrics


def compute_advantage(
    data: DataProto, config: AlgorithmConfig
) -> tuple[DataProto, dict[str, float]]:
    """The batch with `advantages` and `returns` by `adv_estimator`, and a metric.

    The metric is the share of trajectories whose advantages are not all 0.
    """
    batch = data.batch
    # an estimator that needs one of these fails where the batch lacks it
    columns: dict[str, Any] = {
        "token_level_rewards": batch["token_level_rewards"],
        "response_mask": batch["response_mask"],
        "values": batch.get("values"),
        "turns": batch.get("turns"),
        "states": batch.get("states"),
        "greedy_scores": batch.get("greedy_scores"),
        "trees": batch.get("trees"),
        "index": data.non_tensor_batch.get("uid"),
    }
    joined = Joined.of(data, batch["response_mask"]) if has_several_rows(data) else None
    if joined is not None:
        columns = join_columns(columns, joined, data)
    advantages, returns = ADVANTAGE_ESTIMATORS[config.adv_estimator].compute(
        gamma=config.gamma,
        lam=config.lam,
        norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo,
        step_advantage_w=config.step_advantage_w,
        **{name: column for name, column in columns.items() if column is not None},
    )
    shares = {NONZERO: nonzero_share(advantages)}
    if joined is not None:
        advantages = joined.split(advantages)
        returns = joined.split(returns)
    return data.with_tensors(advantages=advantages, returns=returns.to(torch.float32)), shares


def add_distillation(data: DataProto, weight: float) -> tuple[DataProto, dict[str, float]]:
    """The batch with the teacher's part in its `advantages`, and metrics.

    They are the policy's KL to the teacher, and the share of trajectories that teach, by now.

    With a weight of 0 there is no teacher, and the batch stays as it is.

    On a token of the policy the part is `weight * (log teacher - log policy)`, which is minus
    `weight` times the sample of the reverse KL there. What a token does to the KL of the tokens
    after it is not credited to it (discount 0), as in https://thinkingmachines.ai/blog/on-policy-distillation.
    """
    if weight == 0:
        return data, {}
    batch = data.batch
    mask = batch["response_mask"]
    gap = batch["teacher_log_prob"] - batch["old_log_probs"]
    part = torch.where(mask.bool(), weight * gap, 0.0)
    advantages = batch["advantages"] + part
    whole = Joined.of(data, mask).join(advantages) if has_several_rows(data) else advantages
    metrics = {
        "teacher/reverse_kl": masked_mean(-gap, mask).item(),
        NONZERO: nonzero_share(whole),
    }
    return data.with_tensors(advantages=advantages), metrics


def nonzero_share(advantages: torch.Tensor) -> float:
    """The share of trajectories whose advantages [B, R] are not all 0."""
    return float((advantages.abs().amax(1) > 0).float().mean())


def join_columns(columns: dict[str, Any], joined: Joined, data: DataProto) -> dict[str, Any]:
    """The columns of an estimator with a row for each trajectory instead of each context."""
    _, first_rows = np.unique(data.batch["trajectory"].numpy(), return_index=True)
    whole: dict[str, Any] = {}
    for name, column in columns.items():
        if column is None:
            continue
        if column.ndim == 1:
            whole[name] = column[first_rows]
        else:
            whole[name] = joined.join(column, pad=-1 if name in ("turns", "states") else 0)
    return whole

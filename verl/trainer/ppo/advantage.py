"""From rewards to advantages: the batch's side of core_algos."""

from collections.abc import Mapping
from typing import Any

import torch

from verl.protocol import DataProto
from verl.trainer.config import AlgorithmConfig
from verl.trainer.ppo.core_algos import (
    AdaptiveKLController,
    FixedKLController,
    compute_gae_advantage_return,
    compute_grpo_outcome_advantage,
    compute_reinforce_advantage,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_rewards,
    compute_rloo_outcome_advantage,
    compute_turn_level_advantage,
    kl_penalty,
)
from verl.utils.torch_functional import masked_mean

KLController = AdaptiveKLController | FixedKLController


def build_kl_controller(config: AlgorithmConfig) -> KLController:
    """The controller of the KL coefficient of the reward."""
    ctrl = config.kl_ctrl
    if ctrl.type == "fixed":
        return FixedKLController(ctrl.kl_coef)
    return AdaptiveKLController(ctrl.kl_coef, ctrl.target_kl, ctrl.horizon)


def restore_kl(
    controller: KLController, config: AlgorithmConfig, saved: Mapping[str, Any], value: float
) -> None:
    """Lets an adaptive coefficient go on from `value`, unless it is to start elsewhere than it did.

    `saved` is the `kl_ctrl` that the value was reached with. A fixed coefficient is what is
    configured.
    """
    ctrl = config.kl_ctrl
    same_start = ctrl.type == saved["type"] and ctrl.kl_coef == saved["kl_coef"]
    if ctrl.type == "adaptive" and same_start:
        controller.value = value


def apply_kl_penalty(
    data: DataProto, config: AlgorithmConfig, controller: KLController
) -> tuple[DataProto, dict[str, float]]:
    """`token_level_rewards`: the scores, minus the KL to the reference where it is in the
    reward."""
    batch = data.batch
    scores = batch["token_level_scores"]
    mask = batch["response_mask"]
    if not config.use_kl_in_reward:
        return data.with_tensors(token_level_rewards=scores), {}
    beta = controller.value
    rewards = compute_rewards(
        scores, batch["old_log_probs"], batch["ref_log_prob"], beta, mask, config.kl_penalty
    )
    kl = masked_mean(
        kl_penalty(batch["old_log_probs"], batch["ref_log_prob"], config.kl_penalty), mask
    ).item()
    controller.update(kl, n_steps=len(data))
    return data.with_tensors(token_level_rewards=rewards), {
        "critic/kl": kl,
        "critic/kl_coeff": beta,
    }


def estimate(data: DataProto, config: AlgorithmConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns [B, R] by `adv_estimator`."""
    batch = data.batch
    rewards = batch["token_level_rewards"]
    mask = batch["response_mask"]
    if config.adv_estimator == "gae":
        return compute_gae_advantage_return(
            rewards, batch["values"], mask, config.gamma, config.lam
        )
    index = data.non_tensor_batch["uid"]
    match config.adv_estimator:
        case "grpo":
            by_std = config.norm_adv_by_std_in_grpo
            return compute_grpo_outcome_advantage(
                rewards, mask, index, norm_adv_by_std_in_grpo=by_std
            )
        case "dr_grpo":
            return compute_grpo_outcome_advantage(
                rewards, mask, index, norm_adv_by_std_in_grpo=False
            )
        case "rloo":
            return compute_rloo_outcome_advantage(rewards, mask, index)
        case "reinforce":
            return compute_reinforce_advantage(rewards, mask, config.gamma)
        case "reinforce_plus_plus":
            return compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config.gamma)
        case "reinforce_plus_plus_baseline":
            return compute_reinforce_plus_plus_baseline_outcome_advantage(rewards, mask, index)
        case "turn_level":
            return compute_turn_level_advantage(rewards, mask, index, batch["turns"])


def compute_advantage(
    data: DataProto, config: AlgorithmConfig
) -> tuple[DataProto, dict[str, float]]:
    """`advantages` and `returns` of the batch, and the share of trajectories that teach
    anything."""
    advantages, returns = estimate(data, config)
    nonzero = (advantages.abs().amax(1) > 0).float().mean()
    shares = {"critic/advantages/nonzero_share": float(nonzero)}
    return data.with_tensors(advantages=advantages, returns=returns.to(torch.float32)), shares

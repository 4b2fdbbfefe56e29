"""The mathematics of PPO, GRPO and their relatives: tensors and floats in, tensors out.

The choices of a configuration are dictionaries of functions or tuples of names:
ADVANTAGE_ESTIMATORS, POLICY_LOSSES, LOSS_AGG_MODES, KL_PENALTIES, LEVELS.

Shapes: B trajectories, R response tokens. `response_mask` [B, R] is non-zero on the tokens that the
policy sampled; on every other position (observations, forced tokens, padding) inputs may hold
anything, NaN included: they change neither a result nor a gradient, and results are 0 there.

Losses are *additive*: a loss is the sum over a micro-batch, divided by the token or sequence count
of the whole mini-batch (`num_tokens`, `num_seqs`: over all micro-batches and ranks; None: the batch
is the whole mini-batch). The metrics that come with a loss are additive too, and always per token.
Summed over micro-batches and ranks, both give the figures of the mini-batch, and the gradient does
not depend on how the mini-batch was divided.
"""

from verl.trainer.ppo.core_algos.advantages import (
    ADVANTAGE_ESTIMATORS,
    AdvantageEstimator,
    compute_dr_grpo_outcome_advantage,
    compute_gae_advantage_return,
    compute_grpo_outcome_advantage,
    compute_grpo_passk_outcome_advantage,
    compute_maxrl_outcome_advantage,
    compute_opo_outcome_advantage,
    compute_reinforce_advantage,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_remax_outcome_advantage,
    compute_rloo_outcome_advantage,
    compute_tree_grpo_outcome_advantage,
)
from verl.trainer.ppo.core_algos.correction import (
    LEVELS,
    accepted,
    importance_weights,
    log_ratios,
    mismatch,
)
from verl.trainer.ppo.core_algos.group_scores import are_equal, group_rows
from verl.trainer.ppo.core_algos.kl import (
    KL_PENALTIES,
    AdaptiveKLController,
    FixedKLController,
    compute_rewards,
    kl_penalty,
)
from verl.trainer.ppo.core_algos.losses import (
    LOSS_AGG_MODES,
    POLICY_LOSSES,
    LossInputs,
    agg_loss,
    compute_entropy_loss,
    compute_value_loss,
    likelihood_losses,
)
from verl.trainer.ppo.core_algos.turn_advantages import (
    compute_gigpo_advantage,
    compute_igpo_advantage,
    compute_turn_level_advantage,
)

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "KL_PENALTIES",
    "LEVELS",
    "LOSS_AGG_MODES",
    "POLICY_LOSSES",
    "AdaptiveKLController",
    "AdvantageEstimator",
    "FixedKLController",
    "LossInputs",
    "accepted",
    "agg_loss",
    "are_equal",
    "compute_dr_grpo_outcome_advantage",
    "compute_entropy_loss",
    "compute_gae_advantage_return",
    "compute_gigpo_advantage",
    "compute_grpo_outcome_advantage",
    "compute_grpo_passk_outcome_advantage",
    "compute_igpo_advantage",
    "compute_maxrl_outcome_advantage",
    "compute_opo_outcome_advantage",
    "compute_reinforce_advantage",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_reinforce_plus_plus_outcome_advantage",
    "compute_remax_outcome_advantage",
    "compute_rewards",
    "compute_rloo_outcome_advantage",
    "compute_tree_grpo_outcome_advantage",
    "compute_turn_level_advantage",
    "compute_value_loss",
    "group_rows",
    "importance_weights",
    "kl_penalty",
    "likelihood_losses",
    "log_ratios",
    "mismatch",
]

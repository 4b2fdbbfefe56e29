"""Estimators of advantages from rewards; those that credit single turns are in turn_advantages.py.

To add one, write a function and name it in ADVANTAGE_ESTIMATORS (CONTRIBUTING.md lists the rest).
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from torch import Tensor

from verl.trainer.ppo.core_algos.group_scores import (
    centred,
    group_rows,
    per_token,
    standardised,
)
from verl.trainer.ppo.core_algos.turn_advantages import (
    compute_gigpo_advantage,
    compute_igpo_advantage,
    compute_turn_level_advantage,
)
from verl.utils.torch_functional import masked_sum, masked_whiten


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438).

    Returns the advantages, whitened over the mask, and the returns, which are the advantages before
    whitening plus the values; both [B, R]. Only policy tokens are time steps: the next value and
    the advantage are carried across masked tokens, so the result is that of the sequence with its
    observations cut out.
    """
    mask = response_mask.bool()
    advantage = next_value = torch.zeros_like(values[:, 0])
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = token_level_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    returns = torch.where(mask, advantages + values, 0.0)
    return masked_whiten(advantages, mask), returns


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """GRPO (arXiv 2402.03300): each row's score minus its group's mean, over the group's std.

    Returns advantages and returns, which are the same, [B, R]. The std is the unbiased one. `index`
    [B] names the group of each row. In a group of one the mean counts as 0 and the std as 1, as in
    verl, so that the advantage is the bare score; callers drop such groups beforehand. Without
    `norm_adv_by_std_in_grpo` there is no division by the std (Dr. GRPO, arXiv 2503.20783).
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    advantages = scores.clone()
    for rows in group_rows(index):
        if len(rows) > 1:
            advantages[rows] = standardised(scores[rows], norm_adv_by_std_in_grpo, epsilon)
        elif norm_adv_by_std_in_grpo:
            advantages[rows] = scores[rows] / (1.0 + epsilon)
    advantages = per_token(advantages, response_mask)
    return advantages, advantages


def compute_dr_grpo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, **_: object
) -> tuple[Tensor, Tensor]:
    """Dr. GRPO (arXiv 2503.20783): GRPO without the std."""
    return compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=False
    )


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, **_: object
) -> tuple[Tensor, Tensor]:
    """RLOO (arXiv 2402.14740): each row's score minus the mean of the other rows of its group.

    That is n / (n - 1) times (score - group mean). A group of one has the bare score. Returns
    advantages and returns, which are the same, [B, R].
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    advantages = scores.clone()
    for rows in group_rows(index):
        if len(rows) > 1:
            advantages[rows] = centred(scores[rows]) * len(rows) / (len(rows) - 1)
    advantages = per_token(advantages, response_mask)
    return advantages, advantages


def compute_opo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, **_: object
) -> tuple[Tensor, Tensor]:
    """OPO (arXiv 2505.23585): the score minus the group's mean, weighted by lengths.

    A_i = R_i - sum_j L_j R_j / sum_j L_j, where L_j are the tokens that the policy wrote in j. This
    is the baseline of least variance if every token adds as much to the squared norm of a gradient.
    A group of one has the bare score. Returns advantages and returns, which are the same, [B, R].
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    lengths = response_mask.bool().sum(-1).to(scores.dtype)
    advantages = scores.clone()
    for rows in group_rows(index):
        if len(rows) > 1:
            members = centred(scores[rows])
            weights = lengths[rows] / lengths[rows].sum().clamp(min=1)
            advantages[rows] = members - (weights * members).sum()
    advantages = per_token(advantages, response_mask)
    return advantages, advantages


def compute_grpo_passk_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Pass@k by GRPO (arXiv 2503.19595): the best of a group is credited, and no other.

    Its advantage is what the group's best score owes to it: the best score minus the second best,
    by the group's std. All others have 0, as have two that share the best score. Without the std
    this is an unbiased estimate of the gradient of the expected best score of a group. A group of
    one has the bare score. Returns advantages and returns, which are the same, [B, R].
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    advantages = torch.zeros_like(scores)
    for rows in group_rows(index):
        if len(rows) == 1:
            advantages[rows] = scores[rows]
            continue
        members = standardised(scores[rows], norm_adv_by_std_in_grpo, epsilon)
        best, second = members.topk(2).values
        advantages[rows[members.argmax()]] = best - second
    advantages = per_token(advantages, response_mask)
    return advantages, advantages


def compute_maxrl_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, **_: object
) -> tuple[Tensor, Tensor]:
    """MaxRL (arXiv 2602.02710): the score minus the group's mean, over the mean.

    With scores of 0 and 1 and n rows of a group, a rare success counts more: the mean estimate is
    the gradient of log p, cut off after the first n - 1 terms of its series in 1 - p, where p is
    the probability of a success. A group whose mean is not positive teaches nothing, as a group of
    one. Returns advantages and returns, which are the same, [B, R].
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    advantages = torch.zeros_like(scores)
    for rows in group_rows(index):
        mean = scores[rows].mean()
        if len(rows) > 1 and mean > 0:
            advantages[rows] = centred(scores[rows]) / mean
    advantages = per_token(advantages, response_mask)
    return advantages, advantages


def compute_tree_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    trees: Tensor,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Tree-GRPO (arXiv 2509.21240): GRPO among the rows of a tree, plus GRPO among all of a group.

    A_i = (R_i - mean_tree) / std_tree + (R_i - mean_group) / std_group. `trees` [B] numbers the
    trees of a group: rows of a tree branched off each other (`rollout.branches`). A row that is
    alone in its tree has the second part only. Every row is trained whole: a turn that m rows begin
    with stands in m rows, and its gradient has the sum of their advantages, as in the paper's
    objective, which is a mean over trajectories. Returns advantages and returns, which are the
    same, [B, R].
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    advantages = torch.zeros_like(scores)
    for rows in group_rows(index):
        tree_of_row = trees[rows].numpy()
        for members in [rows, *(rows[tree] for tree in group_rows(tree_of_row))]:
            if len(members) > 1:
                compared = standardised(scores[members], norm_adv_by_std_in_grpo, epsilon)
                advantages[members] += compared
    advantages = per_token(advantages, response_mask)
    return advantages, advantages


def compute_returns(token_level_rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """The discounted sum of the rewards from each policy token on, [B, R].

    Only policy tokens are time steps.
    """
    mask = response_mask.bool()
    running = torch.zeros_like(token_level_rewards[:, 0])
    columns = []
    for t in reversed(range(mask.shape[1])):
        running = torch.where(mask[:, t], token_level_rewards[:, t] + gamma * running, running)
        columns.append(running)
    return torch.where(mask, torch.stack(columns[::-1], dim=1), 0.0)


def compute_reinforce_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, gamma: float, **_: object
) -> tuple[Tensor, Tensor]:
    """REINFORCE (Williams 1992): advantages are the returns, [B, R]."""
    returns = compute_returns(token_level_rewards, response_mask, gamma)
    return returns, returns


def compute_remax_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, greedy_scores: Tensor, **_: object
) -> tuple[Tensor, Tensor]:
    """ReMax (arXiv 2310.10505): the return minus the score of the prompt's greedy trajectory.

    A_t = sum_{k >= t} r_k - b with b = `greedy_scores` [B]. The baseline follows from the prompt
    and the weights alone, never from what was sampled, so the estimate is unbiased for any number
    of trajectories of a prompt, also for one. Returns advantages and returns, both [B, R].
    """
    returns = compute_returns(token_level_rewards, response_mask, gamma=1.0)
    return returns - per_token(greedy_scores, response_mask), returns


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, gamma: float, **_: object
) -> tuple[Tensor, Tensor]:
    """REINFORCE++ (arXiv 2501.03262): the returns, whitened over all policy tokens of the batch.

    Returns the advantages and the returns before whitening, both [B, R].
    """
    returns = compute_returns(token_level_rewards, response_mask, gamma)
    return masked_whiten(returns, response_mask), returns


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, **_: object
) -> tuple[Tensor, Tensor]:
    """REINFORCE++-baseline (arXiv 2501.03262): the score minus the group's mean, whitened.

    It is whitened over all policy tokens of the batch. A group of one has the bare score before
    whitening. Returns advantages and returns, which are the same, [B, R].
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    advantages = scores.clone()
    for rows in group_rows(index):
        if len(rows) > 1:
            advantages[rows] = centred(scores[rows])
    whitened = masked_whiten(per_token(advantages, response_mask), response_mask)
    return whitened, whitened


def compute_no_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, **_: object
) -> tuple[Tensor, Tensor]:
    """No advantage from rewards, for training on the advantages of a teacher alone.

    Returns advantages and returns, which are all 0, [B, R].
    """
    zeros = torch.zeros_like(token_level_rewards)
    return zeros, zeros


@dataclass(frozen=True)
class AdvantageEstimator:
    """A function from rewards to advantages and returns, both [B, R], and what it needs.

    The function is called with all of these keywords and names those that it uses:
    token_level_rewards and response_mask [B, R], index [B] (the group of each row), values [B, R]
    (with a critic), turns and states [B, R], gamma, lam, norm_adv_by_std_in_grpo,
    step_advantage_w, greedy_scores [B] (with `uses_greedy`), trees [B] (with `uses_trees`).
    """

    compute: Callable[..., tuple[Tensor, Tensor]]
    uses_groups: bool = False
    """Whether it compares the trajectories of one prompt, so that there must be two or more."""
    uses_critic: bool = False

    @property
    def uses_greedy(self) -> bool:
        """Whether it compares with a greedy trajectory of each prompt."""
        return self.takes("greedy_scores")

    @property
    def uses_trees(self) -> bool:
        """Whether it compares trajectories that branched off each other (`rollout.branches`)."""
        return self.takes("trees")

    def takes(self, setting: str) -> bool:
        """Whether the function has a parameter of this name."""
        return setting in signature(self.compute).parameters


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "gae": AdvantageEstimator(compute_gae_advantage_return, uses_critic=True),
    "grpo": AdvantageEstimator(compute_grpo_outcome_advantage, uses_groups=True),
    "dr_grpo": AdvantageEstimator(compute_dr_grpo_outcome_advantage, uses_groups=True),
    "rloo": AdvantageEstimator(compute_rloo_outcome_advantage, uses_groups=True),
    "opo": AdvantageEstimator(compute_opo_outcome_advantage, uses_groups=True),
    "grpo_passk": AdvantageEstimator(compute_grpo_passk_outcome_advantage, uses_groups=True),
    "maxrl": AdvantageEstimator(compute_maxrl_outcome_advantage, uses_groups=True),
    "tree_grpo": AdvantageEstimator(compute_tree_grpo_outcome_advantage, uses_groups=True),
    "reinforce": AdvantageEstimator(compute_reinforce_advantage),
    "remax": AdvantageEstimator(compute_remax_outcome_advantage),
    "reinforce_plus_plus": AdvantageEstimator(compute_reinforce_plus_plus_outcome_advantage),
    "reinforce_plus_plus_baseline": AdvantageEstimator(
        compute_reinforce_plus_plus_baseline_outcome_advantage, uses_groups=True
    ),
    "turn_level": AdvantageEstimator(compute_turn_level_advantage, uses_groups=True),
    "gigpo": AdvantageEstimator(compute_gigpo_advantage, uses_groups=True),
    "igpo": AdvantageEstimator(compute_igpo_advantage, uses_groups=True),
    "none": AdvantageEstimator(compute_no_advantage),
}
"""The choices of `algorithm.adv_estimator`."""

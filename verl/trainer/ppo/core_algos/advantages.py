"""Estimators of advantages from rewards.

To add one, write a function and name it in ADVANTAGE_ESTIMATORS (CONTRIBUTING.md lists the rest).
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from torch import Tensor

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


def group_rows(index: np.ndarray) -> list[Tensor]:
    """The row numbers of each group that `index` [B] names."""
    names, group_of = np.unique(np.asarray(index), return_inverse=True)
    return [torch.from_numpy(np.flatnonzero(group_of == group)) for group in range(len(names))]


def per_token(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Advantages [B] of rows, spread over their policy tokens [B, R]."""
    return torch.where(response_mask.bool(), advantages.unsqueeze(-1), 0.0)


def centred(scores: Tensor, rows: Tensor) -> Tensor:
    """The scores of a group of at least two, minus their mean.

    Equal scores become exactly 0, because a rounding error of their mean would become large when it
    is divided by their std.
    """
    members = scores[rows] - scores[rows[0]]
    return members - members.mean()


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
            members = centred(scores, rows)
            spread = members.std() + epsilon if norm_adv_by_std_in_grpo else 1.0
            advantages[rows] = members / spread
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
            advantages[rows] = centred(scores, rows) * len(rows) / (len(rows) - 1)
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
            advantages[rows] = centred(scores, rows)
    whitened = masked_whiten(per_token(advantages, response_mask), response_mask)
    return whitened, whitened


def compute_turn_level_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    turns: Tensor,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Credit by turn: the return from a turn on, minus a baseline from the group's *other* rows.

    `turns` [B, R] numbers the policy's turns from 0, -1 elsewhere. The baseline of turn k is the
    mean return from turn k on of the other rows that have a turn k. If no other row has one, it is
    the mean of the whole returns of the other rows. A group of one has the bare return. Returns
    advantages and returns-to-go, both [B, R].

    The estimate is unbiased although the policy decides when to stop: which rows reach turn k
    depends on what they did before, not on this row's turn k, and a row is never part of its own
    baseline. A group mean over the rows that reach turn k would be biased.
    """
    mask = response_mask.bool()
    rewards = torch.where(mask, token_level_rewards, 0.0)
    of_turn = [turns == k for k in range(int(turns.max()) + 1)]
    reward_of_turn = torch.stack([(rewards * here).sum(-1) for here in of_turn], dim=1)
    # the sum from each turn to the last one
    to_go = reward_of_turn.flip(1).cumsum(1).flip(1)
    reached = torch.stack([(mask & here).any(-1) for here in of_turn], dim=1)
    baselines = turn_baselines(to_go, reached, index)
    turn_of_token = turns.clamp(min=0).long()
    returns = torch.where(mask, to_go.gather(1, turn_of_token), 0.0)
    advantages = torch.where(mask, returns - baselines.gather(1, turn_of_token), 0.0)
    return advantages, returns


def turn_baselines(to_go: Tensor, reached: Tensor, index: np.ndarray) -> Tensor:
    """The baseline of each row and turn [B, turns], computed from the other rows of the group.

    `to_go`: returns from each turn on. `reached`: whether a row has the turn. Both [B, turns].
    """
    baselines = torch.zeros_like(to_go)
    for rows in group_rows(index):
        for i, row in enumerate(rows.tolist()):
            others = torch.cat([rows[:i], rows[i + 1 :]])
            if len(others) == 0:
                continue
            others_reached = reached[others]
            count = others_reached.sum(0).clamp(min=1)
            means = (to_go[others] * others_reached).sum(0) / count
            # a turn that no other row has is compared with their whole returns
            whole_returns = to_go[others, 0].mean()
            baselines[row] = torch.where(others_reached.any(0), means, whole_returns)
    return baselines


@dataclass(frozen=True)
class AdvantageEstimator:
    """A function from rewards to advantages and returns, both [B, R], and what it needs.

    The function is called with all of these keywords and names those that it uses:
    token_level_rewards and response_mask [B, R], index [B] (the group of each row), values [B, R]
    (with a critic), turns [B, R], gamma, lam, norm_adv_by_std_in_grpo.
    """

    compute: Callable[..., tuple[Tensor, Tensor]]
    uses_groups: bool = False
    """Whether it compares the trajectories of one prompt, so that there must be two or more."""
    uses_critic: bool = False

    def takes(self, setting: str) -> bool:
        """Whether the function has a parameter of this name."""
        return setting in signature(self.compute).parameters


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "gae": AdvantageEstimator(compute_gae_advantage_return, uses_critic=True),
    "grpo": AdvantageEstimator(compute_grpo_outcome_advantage, uses_groups=True),
    "dr_grpo": AdvantageEstimator(compute_dr_grpo_outcome_advantage, uses_groups=True),
    "rloo": AdvantageEstimator(compute_rloo_outcome_advantage, uses_groups=True),
    "reinforce": AdvantageEstimator(compute_reinforce_advantage),
    "reinforce_plus_plus": AdvantageEstimator(compute_reinforce_plus_plus_outcome_advantage),
    "reinforce_plus_plus_baseline": AdvantageEstimator(
        compute_reinforce_plus_plus_baseline_outcome_advantage, uses_groups=True
    ),
    "turn_level": AdvantageEstimator(compute_turn_level_advantage, uses_groups=True),
}
"""The choices of `algorithm.adv_estimator`."""

"""From rewards to advantages."""

import numpy as np
import torch
from torch import Tensor

from verl.utils.torch_functional import masked_sum, masked_whiten


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages, whitened over the mask, and returns (of the raw advantages), both [B, R]; arXiv
    1506.02438.

    Only policy tokens are time steps: the next value and the advantage are carried across masked
    tokens, so that the result is that of the sequence with its observations cut out.
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
    return masked_whiten(advantages, mask), torch.where(mask, advantages + values, 0.0)


def group_rows(index: np.ndarray) -> list[Tensor]:
    """Row numbers of each group that `index` [B] names."""
    names, group_of = np.unique(np.asarray(index), return_inverse=True)
    return [torch.from_numpy(np.flatnonzero(group_of == group)) for group in range(len(names))]


def per_token(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """[B] spread over the policy tokens [B, R]."""
    return torch.where(response_mask.bool(), advantages.unsqueeze(-1), 0.0)


def centred(scores: Tensor, rows: Tensor) -> Tensor:
    """Scores of a group of at least two minus their mean. Equal scores become exactly 0: a rounding
    error of their mean would be blown up where it is divided by a spread."""
    members = scores[rows] - scores[rows[0]]
    return members - members.mean()


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (the same), [B, R]: each row's score against its group's mean and
    unbiased std (GRPO, arXiv 2402.03300).

    `index` [B] names the group of each row. A group of one has no spread: as in verl its mean
    counts as 0 and its std as 1, the advantage is then the bare score; callers drop such groups
    beforehand. Without `norm_adv_by_std_in_grpo` the std is left out (Dr. GRPO, arXiv 2503.20783).
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    advantages = scores.clone()
    for rows in group_rows(index):
        if len(rows) > 1:
            members = centred(scores, rows)
            advantages[rows] = members / (
                members.std() + epsilon if norm_adv_by_std_in_grpo else 1.0
            )
        elif norm_adv_by_std_in_grpo:
            advantages[rows] = scores[rows] / (1.0 + epsilon)
    spread = per_token(advantages, response_mask)
    return spread, spread


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (the same), [B, R]: each row's score minus the mean of the others of
    its group (RLOO, arXiv 2402.14740), which is n / (n - 1) times the score minus the group's mean.
    A group of one: the bare score.
    """
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    advantages = scores.clone()
    for rows in group_rows(index):
        if len(rows) > 1:
            advantages[rows] = centred(scores, rows) * len(rows) / (len(rows) - 1)
    spread = per_token(advantages, response_mask)
    return spread, spread


def compute_returns(token_level_rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each policy token on, [B, R]. Only policy tokens are time
    steps."""
    mask = response_mask.bool()
    running = torch.zeros_like(token_level_rewards[:, 0])
    columns = []
    for t in reversed(range(mask.shape[1])):
        running = torch.where(mask[:, t], token_level_rewards[:, t] + gamma * running, running)
        columns.append(running)
    return torch.where(mask, torch.stack(columns[::-1], dim=1), 0.0)


def compute_reinforce_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """REINFORCE (Williams 1992): advantages are the returns, [B, R]."""
    returns = compute_returns(token_level_rewards, response_mask, gamma)
    return returns, returns


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """REINFORCE++ (arXiv 2501.03262): returns, whitened over all policy tokens of the batch; and
    the returns."""
    returns = compute_returns(token_level_rewards, response_mask, gamma)
    return masked_whiten(returns, response_mask), returns


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray
) -> tuple[Tensor, Tensor]:
    """REINFORCE++-baseline (arXiv 2501.03262): score minus the group's mean, whitened over all
    policy tokens of the batch; advantages and returns (the same), [B, R]. A group of one: the bare
    score before whitening."""
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    advantages = scores.clone()
    for rows in group_rows(index):
        if len(rows) > 1:
            advantages[rows] = centred(scores, rows)
    whitened = masked_whiten(per_token(advantages, response_mask), response_mask)
    return whitened, whitened


def compute_turn_level_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, turns: Tensor
) -> tuple[Tensor, Tensor]:
    """Credit by turn: what a row earns from a turn on, minus what the *others* of its group earned
    from theirs on.

    `turns` [B, R] numbers the policy's turns from 0, -1 elsewhere. The baseline of turn k is the
    mean return from turn k on of the other rows that have a turn k; where there are none, the mean
    of all that the others earned. Which rows reach turn k depends on what they did before, not on
    this row's turn k, and the row itself never enters its own baseline: it stays unbiased although
    the policy decides when to stop. A group mean over the rows that reach turn k would not be.
    Advantages and returns-to-go, both [B, R]. A group of one: the bare return.
    """
    mask = response_mask.bool()
    rewards = torch.where(mask, token_level_rewards, 0.0)
    count = int(turns.max()) + 1
    earned = torch.stack([(rewards * (turns == k)).sum(-1) for k in range(count)], dim=1)
    to_go = earned.flip(1).cumsum(1).flip(1)
    reached = torch.stack([(mask & (turns == k)).any(-1) for k in range(count)], dim=1)
    baseline = torch.zeros_like(to_go)
    for rows in group_rows(index):
        for i, row in enumerate(rows.tolist()):
            others = torch.cat([rows[:i], rows[i + 1 :]])
            if len(others):
                totals = to_go[others, 0].mean()
                there = reached[others]
                means = (to_go[others] * there).sum(0) / there.sum(0).clamp(min=1)
                baseline[row] = torch.where(there.any(0), means, totals)
    at = turns.clamp(min=0).long()
    returns = torch.where(mask, to_go.gather(1, at), 0.0)
    return torch.where(mask, returns - baseline.gather(1, at), 0.0), returns

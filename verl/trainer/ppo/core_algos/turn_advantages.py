"""Estimators that credit each turn of the policy on its own.

What a turn is paid stands in `token_level_rewards` on its tokens (`verl.agent.Segment.reward`); the
rest of the score is on the last token of the trajectory.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl.trainer.ppo.core_algos.group_scores import group_rows, per_token, standardised
from verl.utils.torch_functional import masked_sum


@dataclass(frozen=True)
class Turns:
    """The turns of a batch: K is the largest number of turns of a row."""

    rewards: Tensor
    """What each turn is paid, 0 where a row has no such turn: [B, K]."""
    reached: Tensor
    """Whether a row has the turn, boolean [B, K]."""
    mask: Tensor
    """The policy's tokens, boolean [B, R]."""
    turn_of_token: Tensor
    """The turn of each token of the policy, anything elsewhere: int64 [B, R]."""

    @classmethod
    def of(cls, token_level_rewards: Tensor, response_mask: Tensor, turns: Tensor) -> "Turns":
        """The turns that `turns` [B, R] numbers from 0, -1 where the policy did not write."""
        mask = response_mask.bool()
        rewards = torch.where(mask, token_level_rewards, 0.0)
        of_turn = [turns == k for k in range(int(turns.max()) + 1)]
        return cls(
            rewards=torch.stack([(rewards * here).sum(-1) for here in of_turn], dim=1),
            reached=torch.stack([(mask & here).any(-1) for here in of_turn], dim=1),
            mask=mask,
            turn_of_token=turns.clamp(min=0).long(),
        )

    def returns(self, gamma: float) -> Tensor:
        """The sum of the rewards from each turn on, discounted by `gamma` for a turn: [B, K]."""
        return discounted(self.rewards, gamma)

    def per_token(self, values: Tensor) -> Tensor:
        """Values [B, K] of turns, spread over their tokens: [B, R], 0 elsewhere."""
        return torch.where(self.mask, values.gather(1, self.turn_of_token), 0.0)


def discounted(values: Tensor, gamma: float) -> Tensor:
    """For each turn k the sum of gamma^(j - k) values_j over j >= k: [B, K]."""
    sums = values.clone()
    for k in reversed(range(values.shape[1] - 1)):
        sums[:, k] += gamma * sums[:, k + 1]
    return sums


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
    steps = Turns.of(token_level_rewards, response_mask, turns)
    to_go = steps.returns(gamma=1.0)
    baselines = turn_baselines(to_go, steps.reached, index)
    return steps.per_token(to_go - baselines), steps.per_token(to_go)


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


def compute_gigpo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    turns: Tensor,
    states: Tensor,
    gamma: float,
    step_advantage_w: float,
    norm_adv_by_std_in_grpo: bool = True,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """GiGPO (arXiv 2505.10978): the advantage of the trajectory, plus that of the turn.

    A(turn) = A_E + w A_S with w = `step_advantage_w`. A_E is GRPO's: the score of the trajectory
    minus the mean of its group, over their std. A_S compares the discounted return from the turn on
    (`gamma` for a turn) in the same way with those of all turns of the group that began in the same
    state: `states` [B, R] names it, see `verl.protocol`. A turn that is alone in its state has
    A_S = 0. Without `norm_adv_by_std_in_grpo` nothing is divided by a std.

    Returns the advantages and the discounted returns, both [B, R].
    """
    steps = Turns.of(token_level_rewards, response_mask, turns)
    scores = masked_sum(token_level_rewards, response_mask, axis=-1)
    returns = steps.returns(gamma)
    of_episode = torch.zeros_like(scores)
    of_step = torch.zeros_like(returns)
    state_of_turn = states_of_turns(states, steps)
    for rows in group_rows(index):
        if len(rows) > 1:
            of_episode[rows] = standardised(scores[rows], norm_adv_by_std_in_grpo)
        of_step[rows] = step_advantages(
            returns[rows], steps.reached[rows], state_of_turn[rows], norm_adv_by_std_in_grpo
        )
    advantages = per_token(of_episode, response_mask) + step_advantage_w * steps.per_token(of_step)
    return advantages, steps.per_token(returns)


def states_of_turns(states: Tensor, steps: Turns) -> Tensor:
    """The state in which each turn began, [B, K]; -1 for a turn that a row does not have."""
    found = torch.full(steps.reached.shape, -1, dtype=states.dtype)
    rows, columns = steps.mask.nonzero(as_tuple=True)
    found[rows, steps.turn_of_token[rows, columns]] = states[rows, columns]
    return found


def step_advantages(returns: Tensor, reached: Tensor, states: Tensor, by_std: bool) -> Tensor:
    """The advantage of each turn of one group among those that began in its state: [rows, K].

    `returns`, `reached` and `states` are [rows, K].
    """
    advantages = torch.zeros_like(returns)
    for state in states[reached].unique():
        members = reached & (states == state)
        if members.sum() > 1:
            advantages[members] = standardised(returns[members], by_std)
    return advantages


def compute_igpo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    turns: Tensor,
    gamma: float,
    norm_adv_by_std_in_grpo: bool = True,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """IGPO (arXiv 2510.14967): what turns are paid, standardised over the group, then summed.

    Every turn of every trajectory of the group gives one reward; the last one of a trajectory
    includes the outcome. A_k is the reward of turn k minus their mean, over their std, and the
    advantage of turn k is the sum of gamma^(j - k) A_j over j >= k. Without
    `norm_adv_by_std_in_grpo` nothing is divided by the std. IGPO itself pays the gain of
    information (`algorithm.information_gain`); any reward by turn serves.

    Returns the advantages and the discounted returns, both [B, R].
    """
    steps = Turns.of(token_level_rewards, response_mask, turns)
    of_turn = torch.zeros_like(steps.rewards)
    for rows in group_rows(index):
        members = torch.zeros_like(steps.reached)
        members[rows] = steps.reached[rows]
        if members.sum() > 1:
            of_turn[members] = standardised(steps.rewards[members], norm_adv_by_std_in_grpo)
    advantages = steps.per_token(discounted(of_turn, gamma))
    return advantages, steps.per_token(steps.returns(gamma))

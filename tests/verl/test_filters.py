"""What a step trains on: groups that differ, and rows that no filter takes."""

import numpy as np
import pytest
import torch

from verl.agent import Completion, Segment, Source, Trajectory, context_digest
from verl.protocol import DataProto, collate_trajectories
from verl.rollout.agent_worker import Job
from verl.trainer.config import AlgorithmConfig, RolloutCorrectionConfig
from verl.trainer.ppo.advantage import compute_advantage
from verl.trainer.ppo.core_algos import ADVANTAGE_ESTIMATORS
from verl.trainer.ppo.filters import correct_rollout, filter_loss
from verl.trainer.ppo.groups import differing_groups, first_groups
from verl.utils.errors import RewardError


def rolled(scores):
    """Jobs and trajectories of groups with these scores."""
    jobs = [
        Job(uid, f"{uid}{i}", {}, [1]) for uid, values in scores.items() for i in range(len(values))
    ]
    trajectories = [
        Trajectory([1], reward={"score": v, "em": float(v > 0)})
        for values in scores.values()
        for v in values
    ]
    return jobs, trajectories


def test_groups_that_all_score_the_same_are_dropped():
    jobs, trajectories = rolled({"a": [1.0, 0.0], "b": [0.0, 0.0], "c": [0.2, 0.4], "d": [1.0]})
    kept, _ = differing_groups(jobs, trajectories, "score")
    assert [job.session for job in kept] == ["a0", "a1", "c0", "c1"]
    assert [job.session for job in differing_groups(jobs, trajectories, "em")[0]] == ["a0", "a1"]
    with pytest.raises(RewardError, match=r"metric=f1: the reward of 7 of 7 .* only em, score"):
        differing_groups(jobs, trajectories, "f1")
    assert [job.session for job in first_groups(jobs, trajectories, 2)[0]] == [
        "a0",
        "a1",
        "b0",
        "b1",
    ]


def test_filtered_rows_are_neither_trained_on_nor_counted():
    """Of two groups of two, the first scores the same twice."""
    data = DataProto.from_dict(
        {
            "token_level_scores": torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
            "void_turns": torch.tensor([0, 0, 1, 0]),
            "truncated": torch.tensor([False, False, False, True]),
            "response_mask": torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]]),
        },
        {"uid": np.array(list("aabb"), dtype=object)},
    )
    kept, shares = filter_loss(data, ["zero_variance", "void_turn"])
    assert kept.batch["response_mask"].tolist() == [[0, 0], [0, 0], [0, 0], [1, 0]]
    assert shares == {"rollout/filtered/zero_variance": 0.5, "rollout/filtered/void_turn": 0.25}
    assert filter_loss(data, ["truncated"])[0].batch["response_mask"].sum(1).tolist() == [
        2,
        1,
        2,
        0,
    ]
    assert torch.equal(filter_loss(data, [])[0].batch["response_mask"], data.batch["response_mask"])


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)
def test_groups_without_variance_are_told_by_their_scores_whatever_the_estimator(estimator):
    """Rewards with a KL in them differ where scores do not, and whitened advantages are never 0."""
    scores = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    data = DataProto.from_dict(
        {
            "token_level_scores": scores,
            "token_level_rewards": scores - 0.1 * torch.arange(8).view(4, 2),
            "values": torch.zeros(4, 2),
            "turns": torch.zeros(4, 2, dtype=torch.int32),
            "states": torch.zeros(4, 2, dtype=torch.long),
            "greedy_scores": torch.zeros(4),
            "trees": torch.zeros(4, dtype=torch.long),
            "response_mask": torch.ones(4, 2, dtype=torch.long),
        },
        {"uid": np.array(list("aabb"), dtype=object)},
    )
    data, _ = compute_advantage(data, AlgorithmConfig(adv_estimator=estimator))
    kept, _ = filter_loss(data, ["zero_variance"])
    assert kept.batch["response_mask"].sum(1).tolist() == [0, 0, 2, 2]


def test_turns_and_limits_travel_with_the_batch():
    def said(ids, reason):
        return Completion(ids, [0.0] * len(ids), reason, None, 0, context_digest([]))

    cut = Trajectory([1], reward={"score": 1.0})
    whole = Trajectory([1], reward={"score": 0.0}, void_turns=1)
    cut.add_completion(said([5, 6], "stop"))
    cut.add_observation([7])
    cut.add_completion(said([8], "length"))
    whole.segments.append(Segment(Source.MODEL, [9], [0.0]))
    batch = collate_trajectories([cut, whole], 0).batch
    assert batch["turns"].tolist() == [[0, 0, -1, 1], [0, -1, -1, -1]]
    assert batch["truncated"].tolist() == [True, False] and batch["void_turns"].tolist() == [0, 1]


@pytest.mark.parametrize("trains_on_observations", [False, True])
def test_bypassing_takes_the_samplers_log_probs_on_tokens_of_the_policy(trains_on_observations):
    mask = torch.tensor([[1, int(trains_on_observations), 1, 0], [1, 0, 0, 0]])
    data = DataProto.from_dict(
        {
            "old_log_probs": torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]]),
            "rollout_log_probs": torch.tensor([[-1.5, 0.0, -2.5, 0.0], [-5.5, 0.0, 0.0, 0.0]]),
            "response_mask": mask,
            "turns": torch.tensor([[0, -1, 1, -1], [0, -1, -1, -1]]),
        }
    )
    plain, expected = correct_rollout(data, RolloutCorrectionConfig())
    bypassed, metrics = correct_rollout(data, RolloutCorrectionConfig(bypass_mode=True))
    assert bypassed.batch["old_log_probs"].tolist() == [
        [-1.5, -2.0, -2.5, -4.0],
        [-5.5, -6.0, -7.0, -8.0],
    ]
    assert metrics == expected and metrics["rollout_corr/diff_mean"] == 0.5, (
        "of the trainer's log-probs"
    )
    assert torch.equal(plain.batch["old_log_probs"], data.batch["old_log_probs"])
    assert (
        torch.equal(bypassed.batch["response_mask"], mask)
        and "rollout_is_weights" not in bypassed.batch
    )

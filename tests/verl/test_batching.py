import numpy as np
import pytest
import torch

from verl.agent import Segment, Source, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.trainer.config import FilterGroupsConfig
from verl.trainer.ppo.batch_source import Rollouts
from verl.trainer.ppo.batching import build_batch, rows_of_ranks
from verl.trainer.ppo.failures import RolloutFailed, check_failures, failure_metrics
from verl.trainer.ppo.groups import surviving


def job(uid: str) -> Job:
    return Job(uid, f"{uid}-x", {"data_source": "d"}, [1, 2])


def done(length: int = 3, score: float = 1.0) -> Trajectory:
    return Trajectory(
        [1, 2], [Segment(Source.MODEL, [5] * length, [-1.0] * length)], reward={"score": score}
    )


def test_groups_left_with_one_member_are_dropped_and_counted():
    jobs = [job(u) for u in "aabbcc"]
    results = [done(), done(), done(), Failure("down", 2), Trajectory([1, 2]), done()]
    kept, trajectories, metrics = surviving(jobs, results, min_group=2)
    assert [j.uid for j in kept] == ["a", "a"] and len(trajectories) == 2
    assert metrics == {"rollout/dropped_empty": 1, "rollout/dropped_small_group": 2}
    kept, _, _ = surviving(jobs, results, min_group=1)
    assert [j.uid for j in kept] == ["a", "a", "b", "c"]


def test_failures_are_reported_by_number_of_searches():
    metrics = failure_metrics([done(), Failure("down", 2), Failure("down", 2), Failure("down", 1)])
    assert metrics["rollout/failed_share"] == 0.75
    assert metrics["rollout/failed/calls_2"] == 2.0 and metrics["rollout/failed/calls_1"] == 1.0


def test_too_many_failures_stop_training_with_their_cause():
    results = [done()] * 8 + [Failure("http://x: connection refused", 1)] * 2
    check_failures(results, 0.2)
    with pytest.raises(
        RolloutFailed,
        match=r"2 of 10 .*max_failed_share=0\.1.*\n.*2 x http://x: connection refused",
    ):
        check_failures(results, 0.1)


@pytest.mark.parametrize(
    ("rows", "world_size", "mini"), [(10, 2, 2), (7, 2, 2), (5, 3, 1), (240, 1, 1), (3, 2, 3)]
)
def test_every_row_lands_once_and_optimizer_steps_stay_as_configured(rows, world_size, mini):
    trajectories = [done(length=1 + i % 5, score=float(i)) for i in range(rows)]
    batch = build_batch(
        [job(str(i)) for i in range(rows)],
        trajectories,
        pad_token_id=0,
        num_mini_batches={"mini_batch": mini},
        world_size=world_size,
        state_masking=True,
    )
    assert sorted(batch.non_tensor_batch["uid"].tolist(), key=int) == [str(i) for i in range(rows)]
    assert (
        sum(batch.meta_info["rank_sizes"]) == rows
        and len(batch.meta_info["rank_sizes"]) == world_size
    )
    assert set(batch.batch["mini_batch"].tolist()) == set(range(mini))
    scores = batch.batch["token_level_scores"].sum(1).tolist()
    assert scores == [float(u) for u in batch.non_tensor_batch["uid"]]


def test_state_masking_off_trains_on_observations():
    t = done()
    t.add_observation([8, 8])
    kwargs = {"pad_token_id": 0, "num_mini_batches": {"mini_batch": 1}, "world_size": 1}
    on = build_batch([job("a")], [t], state_masking=True, **kwargs)
    off = build_batch([job("a")], [t], state_masking=False, **kwargs)
    assert on.batch["response_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert off.batch["response_mask"].tolist() == [[1, 1, 1, 1, 1]]


def test_actor_and_critic_have_optimizer_steps_of_their_own():
    """Rows 0 to 11 in their order: the actor takes 2 steps on them, the critic 3; both are spread
    over the ranks."""
    trajectories = [done(length=1 + i % 5, score=float(i)) for i in range(12)]
    batch = build_batch(
        [job(str(i)) for i in range(12)],
        trajectories,
        pad_token_id=0,
        num_mini_batches={"mini_batch": 2, "critic_mini_batch": 3},
        world_size=2,
        state_masking=True,
    )
    assert batch.meta_info["num_mini_batches"] == {"mini_batch": 2, "critic_mini_batch": 3}
    place = torch.tensor([int(uid) for uid in batch.non_tensor_batch["uid"]])
    assert torch.equal(batch.batch["mini_batch"], place // 6)
    assert torch.equal(batch.batch["critic_mini_batch"], place // 4)
    for rank in batch.split(batch.meta_info["rank_sizes"]):
        assert set(rank.batch["mini_batch"].tolist()) == {0, 1}
        assert set(rank.batch["critic_mini_batch"].tolist()) == {0, 1, 2}


def test_ranks_share_prompts_and_responses_alike():
    """Only together do prompts and responses say that one row is as long as two others."""
    trajectories = [
        Trajectory(
            [1] * prompt,
            [Segment(Source.MODEL, [5] * length, [-1.0] * length)],
            reward={"score": 0.0},
        )
        for prompt, length in ((40, 2), (2, 40), (2, 2), (2, 2), (40, 40), (2, 2))
    ]
    batch = build_batch(
        [job(str(i)) for i in range(6)],
        trajectories,
        pad_token_id=0,
        num_mini_batches={"mini_batch": 1},
        world_size=2,
        state_masking=True,
    )
    tokens = [
        int(rank.batch["attention_mask"].sum())
        for rank in batch.split(batch.meta_info["rank_sizes"])
    ]
    assert tokens == [88, 88]


def test_what_does_not_divide_evenly_goes_to_another_rank_each_time():
    """Three mini-batches of four rows on three ranks: each rank has the fourth row once."""
    ranks = rows_of_ranks([1] * 12, [np.arange(12) // 4], 3)
    assert [len(rows) for rows in ranks] == [4, 4, 4]


def test_figures_of_a_step_count_all_its_batches_of_prompts():
    drawn = Rollouts()
    drawn.add(
        [done(), Failure("down", 2)],
        [],
        {"rollout/dropped_empty": 0, "rollout/dropped_small_group": 1},
    )
    drawn.add(
        [done(), done()],
        [done(), done()],
        {"rollout/dropped_empty": 1, "rollout/dropped_small_group": 0},
    )
    assert drawn.metrics() == {
        "rollout/failed_share": 0.25,
        "rollout/failed": 1.0,
        "rollout/failed/calls_2": 1.0,
        "rollout/dropped_empty": 1.0,
        "rollout/dropped_small_group": 1.0,
        "training/num_gen_batches": 2.0,
        "training/num_trajectories": 2.0,
    }


def test_a_step_without_anything_to_train_on_says_why():
    drawn = Rollouts()
    drawn.add(
        [done(), Failure("down", 2)],
        [],
        {"rollout/dropped_empty": 0, "rollout/dropped_small_group": 1},
    )
    assert "rollout/dropped_small_group 1, rollout/failed 1" in drawn.nothing_left(
        FilterGroupsConfig()
    )
    drawn.add([done(), done()], [done(), done()], {})
    reason = drawn.nothing_left(FilterGroupsConfig(enable=True, metric="em"))
    assert reason.startswith("none of 2 trajectories is in a group that differs in em")

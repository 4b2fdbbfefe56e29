"""Trajectories as JSON: to read, and to train on again."""

from collections.abc import Sequence
from typing import Any

from verl.agent import Trajectory
from verl.rollout.agent_worker import Job


def trajectory_records(
    jobs: Sequence[Job], trajectories: Sequence[Trajectory], tokenizer: Any
) -> list[dict[str, Any]]:
    """One record per trajectory: its prompt, its segments with source, text, ids and facts, its
    reward."""
    return [
        {
            "uid": job.uid,
            "data_source": job.row["data_source"],
            "prompt": tokenizer.decode(trajectory.prompt_ids),
            "prompt_ids": trajectory.prompt_ids,
            "segments": [
                {
                    "source": str(segment.source),
                    "text": tokenizer.decode(segment.token_ids),
                    "token_ids": segment.token_ids,
                    "policy_version": segment.policy_version,
                    "info": segment.info,
                }
                for segment in trajectory.segments
            ],
            "stop_reason": trajectory.stop_reason,
            "reward": trajectory.reward,
            "info": trajectory.info,
            "ground_truth": job.row["reward_model"]["ground_truth"],
            "extra_info": job.row.get("extra_info"),
        }
        for job, trajectory in zip(jobs, trajectories, strict=True)
    ]

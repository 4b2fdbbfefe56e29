"""Trajectories as JSON, for people to read and for fine-tuning on them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.agent import Segment, Trajectory
from verl.rollout.agent_worker import Job


def trajectory_records(
    jobs: Sequence[Job], trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """One record for each trajectory: its prompt, its segments, its reward, its row."""
    return [
        trajectory_record(job, trajectory, tokenizer)
        for job, trajectory in zip(jobs, trajectories, strict=True)
    ]


def trajectory_record(
    job: Job, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """One trajectory as JSON; `rewrites` is there where the loop has written its context anew."""
    rewrites = [
        {"at": r.at, "prompt_ids": r.prompt_ids, "prompt": tokenizer.decode(r.prompt_ids)}
        for r in trajectory.rewrites
    ]
    return {
        **({"rewrites": rewrites} if rewrites else {}),
        "uid": job.uid,
        "data_source": job.row["data_source"],
        "prompt": tokenizer.decode(trajectory.prompt_ids),
        "prompt_ids": trajectory.prompt_ids,
        "segments": [segment_record(segment, tokenizer) for segment in trajectory.segments],
        "stop_reason": trajectory.stop_reason,
        "reward": trajectory.reward,
        "info": trajectory.info,
        "ground_truth": job.row["reward_model"]["ground_truth"],
        "extra_info": job.row.get("extra_info"),
    }


def segment_record(segment: Segment, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """One segment as JSON: its source, text, ids and facts; `is_aside` only if it is one."""
    return {
        **({"is_aside": True} if segment.is_aside else {}),
        "source": str(segment.source),
        "text": tokenizer.decode(segment.token_ids),
        "token_ids": segment.token_ids,
        "policy_version": segment.policy_version,
        "info": segment.info,
    }

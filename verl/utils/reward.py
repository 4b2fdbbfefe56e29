"""Rewards given as a plain function."""

import inspect
from typing import Any

from verl.agent import ComputeScore, Row, Source, Trajectory
from verl.utils.config import Config


class FunctionReward:
    """Calls `compute_score(data_source, solution_str, ground_truth, extra_info)`; it may also be a coroutine function.

    `solution_str` is the text of the policy's own tokens: neither the prompt nor anything the environment wrote, so
    without the `<think>` that some chat templates open.
    """

    class Config(Config):
        pass

    def __init__(self, compute_score: ComputeScore, tokenizer: Any) -> None:
        self.compute_score, self.tokenizer = compute_score, tokenizer

    async def __call__(self, trajectory: Trajectory, row: Row) -> dict[str, float]:
        result: Any = self.compute_score(
            data_source=row["data_source"],
            solution_str=policy_text(trajectory, self.tokenizer),
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info=row.get("extra_info"),
        )
        if inspect.isawaitable(result):
            result = await result
        return dict(result) if isinstance(result, dict) else {"score": float(result)}


def policy_text(trajectory: Trajectory, tokenizer: Any) -> str:
    """What the policy wrote, turn after turn, without special tokens."""
    turns = [s.token_ids for s in trajectory.segments if s.source is Source.MODEL]
    return "".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in turns)

"""The one boundary that every reward passes: what it returned becomes a score, components to log,
and facts to keep."""

import inspect
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from verl.agent import ComputeScore, Row, Source, Trajectory, TrajectoryFailed
from verl.utils.answers import plain
from verl.utils.config import Config
from verl.utils.errors import ConfigError, RewardError

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""What a reward function is called with, by name."""
LARGEST_SCORE = float(np.finfo(np.float32).max)
"""Batches hold scores in float32, where a larger one would be infinite."""
MAX_SHOWN = 120
"""Characters of a question or a value in a message."""


class FunctionReward:
    """Calls `compute_score(data_source, solution_str, ground_truth, extra_info)`; it may also be a
    coroutine function.

    `solution_str` is the text of the policy's own tokens: neither the prompt nor anything the
    environment wrote, so without the `<think>` that some chat templates open.
    """

    class Config(Config):
        pass

    def __init__(self, compute_score: ComputeScore, tokenizer: Any) -> None:
        self.compute_score = compute_score
        self.tokenizer = tokenizer

    def __call__(self, trajectory: Trajectory, row: Row) -> Any:
        return self.compute_score(
            data_source=row["data_source"],
            solution_str=policy_text(trajectory, self.tokenizer),
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info=row.get("extra_info"),
        )


def policy_text(trajectory: Trajectory, tokenizer: Any) -> str:
    """What the policy wrote, turn after turn, without special tokens."""
    turns = [s.token_ids for s in trajectory.segments if s.source is Source.MODEL]
    return "".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in turns)


def check_signature(function: Any, key: str) -> None:
    """Raises ConfigError naming `key` unless `function` can be called as FunctionReward calls
    it."""
    if not callable(function):
        raise ConfigError([f"{key}: expected a function, got a {type(function).__name__}"])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables of compiled modules have none
        return
    try:
        signature.bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise ConfigError(
            [
                f"{key}: {name_of(function)} is declared with {signature}, and is called with "
                f"{', '.join(ARGUMENTS)} "
                f"by name ({error}): name its parameters so, or add **kwargs"
            ]
        ) from error


def name_of(reward: Any) -> str:
    """How messages call a reward: the function with its file, or the class."""
    function = reward.compute_score if isinstance(reward, FunctionReward) else reward
    if not hasattr(function, "__qualname__"):
        return f"{type(function).__module__}.{type(function).__qualname__}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{function.__qualname__} of {code.co_filename if code else function.__module__}"


async def score(reward: Any, trajectory: Trajectory, row: Row) -> None:
    """Writes what `reward` says to `trajectory`: numbers to `reward`, all else to `info["reward"]`.

    Raises TrajectoryFailed when that holds no finite score, and RewardError when the reward raises
    anything else.
    """
    try:
        result = reward(trajectory, row)
        if inspect.isawaitable(result):
            result = await result
    except (TrajectoryFailed, RewardError):
        raise
    except Exception as error:
        raise RewardError(f"{raised_by(name_of(reward), error)}, for {described(row)}") from error
    take(result, trajectory, name_of(reward))


def compare(reward: Any, groups: Sequence[Sequence[Trajectory]]) -> dict[int, TrajectoryFailed]:
    """Lets `reward.score_groups` change the rewards of `groups` in place.

    Returns the failures of those that are then without a finite score, by the `id` of their
    trajectory. Raises RewardError when it raises.
    """
    name = f"{name_of(reward)}, score_groups"
    try:
        reward.score_groups(groups)
    except Exception as error:
        raise RewardError(
            f"{raised_by(name, error)}, for {len(groups)} groups of trajectories"
        ) from error
    failures: dict[int, TrajectoryFailed] = {}
    for trajectory in (trajectory for group in groups for trajectory in group):
        try:
            take(trajectory.reward, trajectory, name)
        except TrajectoryFailed as error:
            failures[id(trajectory)] = error
    return failures


def take(result: Any, trajectory: Trajectory, name: str) -> None:
    """Writes the `result` of the reward called `name` to `trajectory`. Raises TrajectoryFailed
    without a finite score.

    A result is a number or a mapping with one under `score`; a bool, a NumPy or a torch value with
    one element is one. Other entries that are finite numbers are components; what else the mapping
    holds is kept in `info["reward"]`.
    """
    entries = (
        {str(key): value for key, value in result.items()}
        if isinstance(result, Mapping)
        else {"score": result}
    )
    numbers = {
        key: number for key, value in entries.items() if (number := number_of(value)) is not None
    }
    if not abs(numbers.get("score", math.nan)) <= LARGEST_SCORE:  # NaN is not, either
        raise TrajectoryFailed(
            f"{name} returned {outline(result)}: expected a finite number, or a dict with one "
            "under 'score'",
            num_calls=sum(s.source is Source.OBSERVATION for s in trajectory.segments),
        )
    trajectory.reward = {key: number for key, number in numbers.items() if math.isfinite(number)}
    facts = {key: as_json(value) for key, value in entries.items() if key not in trajectory.reward}
    if facts:
        trajectory.info["reward"] = {**trajectory.info.get("reward", {}), **facts}


def number_of(value: Any) -> float | None:
    """A number as a float, also a bool or an array or a tensor of one element; None for anything
    else."""
    if callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):  # more than one element
            return None
    return float(value) if isinstance(value, Real) else None


def outline(result: Any) -> str:
    """What was returned, so that the same mistake reads the same for every trajectory and can be
    counted."""
    if isinstance(result, Mapping):
        keys = ", ".join(str(key) for key in result) or "none"
        return (
            f"score {outline(result['score'])}"
            if "score" in result
            else f"a dict without 'score' (keys: {keys})"
        )
    number = number_of(result)
    if number is not None or result is None:
        return str(number)
    return f"a value of type {type(result).__name__}"


def as_json(value: Any) -> Any:
    """`value` if JSON has a form for it, else its elements, else its text: it goes into trajectory
    files."""
    value = plain(value)
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)
    return value


def raised_by(name: str, error: Exception) -> str:
    """The exception of a reward, and the line of its code that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return (
        f"the reward {name} raised {what} at {frame.filename}, line {frame.lineno} (`{frame.line}`)"
    )


def described(row: Row) -> str:
    """The row that a message is about: its source, its question, its ground truth."""
    prompt = row.get("prompt")
    question = (row.get("extra_info") or {}).get("question") or (
        prompt[-1]["content"] if prompt else ""
    )
    truth = (row.get("reward_model") or {}).get("ground_truth")
    return (
        f"{row.get('data_source')}, question {shortened(question)}, ground truth {shortened(truth)}"
    )


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."

"""Calls rewards and checks their results.

Every result passes through here, and becomes a score, components to log, and facts to keep.
"""

import inspect
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from verl.agent import ComputeScore, GroupReward, Row, Source, Trajectory, TrajectoryFailed
from verl.utils.answers import plain
from verl.utils.config import Config
from verl.utils.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""The names of the arguments of a reward function."""
LARGEST_SCORE = float(np.finfo(np.float32).max)
"""The largest score: batches hold scores in float32, where a larger one would be infinite."""
TURN_REWARDS = "turn_rewards"
"""The entry of a reward's result with what each turn of the policy is paid."""
MAX_SHOWN = 120
"""Most characters of a question or a value in a message."""


class FunctionReward:
    """Calls `compute_score(data_source, solution_str, ground_truth, extra_info)`.

    `compute_score` may be a coroutine function. `solution_str` is the text of the policy's own
    tokens, without the prompt and without what the environment wrote. So it lacks a `<think>` that
    the chat template has written.
    """

    class Config(Config):
        pass

    def __init__(self, compute_score: ComputeScore, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.compute_score = compute_score
        self.tokenizer = tokenizer

    def __call__(self, trajectory: Trajectory, row: Row) -> Any:
        return self.compute_score(
            data_source=row["data_source"],
            solution_str=policy_text(trajectory, self.tokenizer),
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info=row.get("extra_info"),
        )


def policy_text(trajectory: Trajectory, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that the policy wrote in all turns, without special tokens and asides."""
    own = [s for s in trajectory.segments if s.source is Source.MODEL and not s.is_aside]
    turns = [segment.token_ids for segment in own]
    return "".join(str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in turns)


def check_signature(function: object, key: str) -> None:
    """Raises ConfigError naming `key` if FunctionReward cannot call `function`."""
    if not callable(function):
        raise ConfigError([f"{key}: expected a function, got a {type(function).__name__}"])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables of compiled modules have no signature
        return
    try:
        signature.bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise ConfigError(
            [
                f"{key}: {name_of(function)} is declared with {signature}, and is called with "
                f"{', '.join(ARGUMENTS)} by name ({error}): name its parameters so, or add "
                "**kwargs"
            ]
        ) from error


def name_of(reward: object) -> str:
    """The name of a reward in messages: the function with its file, or the class."""
    function: Any = reward.compute_score if isinstance(reward, FunctionReward) else reward
    if not hasattr(function, "__qualname__"):
        return f"{type(function).__module__}.{type(function).__qualname__}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{function.__qualname__} of {code.co_filename if code else function.__module__}"


async def score(reward: Callable[[Trajectory, Row], Any], trajectory: Trajectory, row: Row) -> None:
    """Calls `reward` and writes its result to `trajectory`, see `take`.

    Raises TrajectoryFailed when the result has no finite score, and RewardError when the reward
    raises anything else than TrajectoryFailed.
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


def compare(
    reward: GroupReward, groups: Sequence[Sequence[Trajectory]]
) -> dict[int, TrajectoryFailed]:
    """Lets `reward.score_groups` change the rewards of `groups` in place.

    Returns, by the `id` of trajectories, the failures of those that have no finite score
    afterwards. Raises RewardError when the reward raises.
    """
    name = f"{name_of(reward)}, score_groups"
    try:
        reward.score_groups(groups)
    except Exception as error:
        raise RewardError(
            f"{raised_by(name, error)}, for {len(groups)} groups of trajectories"
        ) from error
    failures: dict[int, TrajectoryFailed] = {}
    for trajectory in chain.from_iterable(groups):
        try:
            take(trajectory.reward, trajectory, name)
        except TrajectoryFailed as error:
            failures[id(trajectory)] = error
    return failures


def take(result: object, trajectory: Trajectory, name: str) -> None:
    """Writes the `result` of the reward called `name` to `trajectory`.

    A result is a number, or a mapping with a number under `score`; a bool and a NumPy or torch
    value with one element count as numbers. Other entries of the mapping that are finite numbers
    are components and go to `reward` with the score; `turn_rewards` go to the turns. The rest is
    kept in `info["reward"]`. Raises TrajectoryFailed if there is no finite score, and RewardError
    if `turn_rewards` are not a finite number for each turn.
    """
    given = result if isinstance(result, Mapping) else {"score": result}
    entries = {str(key): value for key, value in given.items()}
    if TURN_REWARDS in entries:
        pay_turns(entries.pop(TURN_REWARDS), trajectory, name)
    read = {key: number_of(value) for key, value in entries.items()}
    numbers = {key: number for key, number in read.items() if number is not None}
    if not abs(numbers.get("score", math.nan)) <= LARGEST_SCORE:  # also true for NaN
        raise TrajectoryFailed(
            f"{name} returned {outline(result)}: expected a finite number, or a dict with one "
            "under 'score'",
            num_calls=sum(s.source is Source.OBSERVATION for s in trajectory.segments),
        )
    trajectory.reward = {key: number for key, number in numbers.items() if math.isfinite(number)}
    facts = {key: as_json(value) for key, value in entries.items() if key not in trajectory.reward}
    if facts:
        trajectory.info["reward"] = {**trajectory.info.get("reward", {}), **facts}


def pay_turns(rewards: object, trajectory: Trajectory, name: str) -> None:
    """Writes what the reward called `name` pays for each turn of the policy.

    Raises RewardError unless `rewards` is a finite number for each turn.
    """
    rewards = plain(rewards)
    given = rewards if isinstance(rewards, list | tuple) else []
    numbers = [number for number in map(number_of, given) if number is not None]
    turns = trajectory.turns
    is_paid = len(given) == len(numbers) == len(turns)
    if not is_paid or not all(abs(number) <= LARGEST_SCORE for number in numbers):
        raise RewardError(
            f"{name} returned {shortened(rewards)} under '{TURN_REWARDS}': expected a list with a "
            f"finite number for each of the {len(turns)} turns of the policy (trajectory.turns)"
        )
    for turn, number in zip(turns, numbers, strict=True):
        turn.reward = number


def number_of(value: object) -> float | None:
    """A number, a bool, or an array or tensor of one element as a float; None for all else."""
    item = getattr(value, "item", None)
    if callable(item):
        try:
            value = item()
        except (TypeError, ValueError, RuntimeError):  # more than one element
            return None
    return float(value) if isinstance(value, Real) else None


def outline(result: object) -> str:
    """A description of what a reward returned, for messages.

    It is the same for every trajectory with the same mistake, so that messages can be counted.
    """
    if isinstance(result, Mapping):
        if "score" in result:
            return f"score {outline(result['score'])}"
        keys = ", ".join(str(key) for key in result) or "none"
        return f"a dict without 'score' (keys: {keys})"
    number = number_of(result)
    if number is not None or result is None:
        return str(number)
    return f"a value of type {type(result).__name__}"


def as_json(value: object) -> Any:
    """`value` in a form that JSON can express: unchanged, as a list, or as its text."""
    value = plain(value)
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)
    return value


def raised_by(name: str, error: Exception) -> str:
    """A message: the exception of a reward, and the line of its code that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return (
        f"the reward {name} raised {what} at {frame.filename}, line {frame.lineno} (`{frame.line}`)"
    )


def described(row: Row) -> str:
    """A row in a message: its source, its question, its ground truth."""
    prompt = row.get("prompt")
    asked = prompt[-1]["content"] if prompt else ""
    question = shortened((row.get("extra_info") or {}).get("question") or asked)
    truth = shortened((row.get("reward_model") or {}).get("ground_truth"))
    return f"{row.get('data_source')}, question {question}, ground truth {truth}"


def shortened(value: object) -> str:
    """The text of a value, cut to MAX_SHOWN characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."

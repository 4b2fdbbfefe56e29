"""What rewards of users return, and what becomes of it: scores, components, facts, failures,
errors."""

import asyncio
import json
import math
import pickle

import numpy as np
import pytest
import torch

from tests.verl.fake_agent import SAMPLING, Breaking, make_worker
from verl.agent import Segment, Source, Trajectory, TrajectoryFailed
from verl.rollout.agent_worker import Failure, Job
from verl.trainer.ppo.batch_source import trajectory_metrics
from verl.trainer.ppo.failures import RolloutFailed, check_failures, failure_metrics
from verl.trainer.ppo.groups import score_groups
from verl.utils.errors import ConfigError, RewardError
from verl.utils.loading import load_function
from verl.utils.reward import FunctionReward, check_signature, score

ROW = {
    "data_source": "nq",
    "prompt": [{"role": "user", "content": "Who?"}],
    "reward_model": {"ground_truth": {"target": ["A"]}},
    "extra_info": {"question": "Who?"},
}


def finished() -> Trajectory:
    return Trajectory(
        [1, 2], [Segment(Source.MODEL, [5, 6], [-1.0, -1.0]), Segment(Source.OBSERVATION, [7])]
    )


def scored(function, tokenizer) -> Trajectory:
    """A trajectory after a reward function has seen it."""
    trajectory = finished()
    asyncio.run(score(FunctionReward(function, tokenizer), trajectory, ROW))
    return trajectory


def returning(result):
    def compute_score(**kwargs):
        return result

    return compute_score


NUMBERS = [
    1,
    1.0,
    True,
    np.float32(1),
    np.bool_(True),
    np.ones(1),
    torch.tensor(1.0),
    torch.ones(1, dtype=torch.bool),
]


@pytest.mark.parametrize("value", NUMBERS)
def test_every_kind_of_number_is_a_score(tokenizer, value):
    for result in (value, {"score": value}):
        assert scored(returning(result), tokenizer).reward == {"score": 1.0}


@pytest.mark.parametrize("paid", [[0.25], (0.25,), np.array([0.25]), torch.tensor([0.25])])
def test_turns_are_paid_what_the_reward_says(tokenizer, paid):
    trajectory = scored(returning({"score": 1.0, "turn_rewards": paid}), tokenizer)
    assert [segment.reward for segment in trajectory.segments] == [0.25, 0.0]
    assert trajectory.reward == {"score": 1.0} and "reward" not in trajectory.info


@pytest.mark.parametrize("paid", [[], [0.1, 0.2], 0.1, None, [None], ["x"], [math.nan], "ab"])
def test_pay_that_does_not_fit_the_turns_ends_the_run(tokenizer, paid):
    with pytest.raises(RewardError, match=r"'turn_rewards': expected a list.* 1 turns"):
        scored(returning({"score": 1.0, "turn_rewards": paid}), tokenizer)


def test_a_coroutine_function_is_awaited(tokenizer):
    async def compute_score(solution_str, **kwargs):
        await asyncio.sleep(0)
        return {"score": 0.5}

    assert scored(compute_score, tokenizer).reward == {"score": 0.5}


def test_numbers_are_components_and_all_else_is_kept_in_a_form_that_json_has(tokenizer):
    result = {
        "score": 1.0,
        "acc": True,
        "pred": "42",
        "vector": np.arange(3),
        "odd": object,
        "gap": math.nan,
        "none": None,
    }
    trajectory = scored(returning(result), tokenizer)
    assert trajectory.reward == {"score": 1.0, "acc": 1.0}
    kept = trajectory.info["reward"]
    assert (
        kept["pred"] == "42"
        and kept["vector"] == [0, 1, 2]
        and kept["none"] is None
        and "object" in kept["odd"]
    )
    assert math.isnan(kept["gap"])
    json.dumps(trajectory.info)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "returned None"),
        (math.nan, "returned nan"),
        (-math.inf, "returned -inf"),
        (1e39, r"returned 1e\+39"),  # infinite in float32
        ("1.0", "returned a value of type str"),
        ((1.0, "x"), "returned a value of type tuple"),
        (np.ones(2), "returned a value of type ndarray"),
        ({"acc": 1.0, "pred": "x"}, r"returned a dict without 'score' \(keys: acc, pred\)"),
        ({"score": math.nan, "acc": 1.0}, "returned score nan"),
        ({"score": "high"}, "returned score a value of type str"),
        ({}, r"returned a dict without 'score' \(keys: none\)"),
    ],
)
def test_without_a_finite_score_the_trajectory_fails_and_the_function_is_named(
    tokenizer, result, said
):
    expected = (
        rf"returning.*compute_score of .*test_reward\.py {said}: expected a finite number, or a "
        r"dict"
    )
    with pytest.raises(TrajectoryFailed, match=expected) as caught:
        scored(returning(result), tokenizer)
    assert caught.value.num_calls == 1


async def test_such_failures_are_counted_with_their_cause_and_the_others_are_trained_on(
    tmp_path, tokenizer
):
    def compute_score(ground_truth, **kwargs):
        return math.nan if ground_truth == "bad" else 1.0

    made = make_worker(tmp_path, failures=0)
    made.reward = FunctionReward(compute_score, tokenizer)
    rows = [
        {**ROW, "name": str(i), "reward_model": {"ground_truth": "bad" if i == 2 else "A"}}
        for i in range(4)
    ]
    results = await made.run([Job("u", f"s{i}", row, [7]) for i, row in enumerate(rows)], SAMPLING)
    assert [isinstance(result, Failure) for result in results] == [False, False, True, False]
    assert failure_metrics(results)["rollout/failed"] == 1.0
    with pytest.raises(
        RolloutFailed, match=r"1 x .*compute_score of .*test_reward\.py returned nan"
    ):
        check_failures(results, 0.1)


async def test_a_reward_that_raises_ends_the_batch_and_names_function_line_and_question(
    tmp_path, tokenizer
):
    def compute_score(**kwargs):
        return 1 / 0

    made = make_worker(tmp_path, failures=0)
    made.agent = Breaking(0)
    made.reward = FunctionReward(compute_score, tokenizer)
    with pytest.raises(RewardError) as caught:
        await made.run([Job("u", "s", {**ROW, "name": "a"}, [7])], SAMPLING)
    message = str(pickle.loads(pickle.dumps(caught.value)))
    assert (
        "compute_score of" in message and "raised ZeroDivisionError: division by zero at" in message
    )
    assert f"line {compute_score.__code__.co_firstlineno + 1} (`return 1 / 0`)" in message
    assert "for nq, question 'Who?', ground truth {'target': ['A']}" in message


class Comparing:
    """A reward that compares: `change(group)` in the place of `score_groups`."""

    def __init__(self, change):
        self.change = change

    def score_groups(self, groups):
        for group in groups:
            self.change(group)


def results_of(scores) -> tuple[list[Job], list]:
    results: list = [finished() for _ in scores]
    for result, value in zip(results, scores, strict=True):
        result.reward = {"score": value}
    return [Job("u", f"s{i}", ROW, [1]) for i in range(len(results))], results


def test_a_comparison_passes_the_same_boundary():
    def change(group):
        group[0].reward["score"] = np.float32(0.5)
        group[0].reward["why"] = "first"
        group[1].reward["score"] = math.nan

    jobs, results = results_of([1.0, 1.0, 1.0])
    first, second, third = score_groups(Comparing(change), jobs, results, min_group=2)
    assert first.reward == {"score": 0.5} and first.info["reward"] == {"why": "first"}
    assert (
        isinstance(second, Failure)
        and "Comparing, score_groups returned score nan" in second.message
    )
    assert third is results[2]


def test_a_comparison_that_raises_is_named_and_groups_too_small_to_compare_are_not_given():
    jobs, results = results_of([1.0, 1.0])
    with pytest.raises(
        RewardError, match=r"Comparing, score_groups raised KeyError: 'em' at .*test_reward\.py"
    ):
        score_groups(Comparing(lambda group: group[0].reward["em"]), jobs, results, min_group=2)
    results[1] = Failure("down", 1)
    assert score_groups(Comparing(lambda group: 1 / 0), jobs, results, min_group=2) == results


def test_means_are_over_the_trajectories_that_have_the_component():
    trajectories = [finished() for _ in range(3)]
    for trajectory, reward in zip(trajectories, ({"acc": 1.0}, {"acc": 0.0}, {}), strict=True):
        trajectory.reward = {"score": 0.0, **reward}
    assert trajectory_metrics(trajectories)["reward/acc"] == 0.5


def test_a_function_that_cannot_be_called_by_these_names_is_refused(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("def compute_score(prediction, gold):\n    return 1.0\n\n\nNUMBER = 3\n")
    function = load_function(str(path), "compute_score", "custom_reward_function")
    expected = (
        r"\.name=compute_score: compute_score of .*reward\.py is declared with \(prediction, "
        r"gold\).*add \*\*kwargs"
    )
    with pytest.raises(ConfigError, match=expected):
        check_signature(function, "custom_reward_function.name=compute_score")
    number = load_function(str(path), "NUMBER", "custom_reward_function")
    with pytest.raises(ConfigError, match="expected a function, got a int"):
        check_signature(number, "custom_reward_function.name=NUMBER")
    check_signature(lambda solution_str, **kwargs: 1.0, "key")
    check_signature(
        lambda data_source, solution_str, ground_truth, extra_info=None, scale=2.0: 1.0, "key"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_this_name\n", "ModuleNotFoundError.*, line 1"),
        ("x = 1\ndef f(:\n", "SyntaxError"),
    ],
)
def test_a_reward_file_that_cannot_be_read_is_named(tmp_path, text, said):
    (tmp_path / "reward.py").write_text(text)
    with pytest.raises(ConfigError, match=rf"custom_reward_function\.path=.*reward\.py: {said}"):
        load_function(str(tmp_path / "reward.py"), "compute_score", "custom_reward_function")


def test_a_configuration_error_arrives_whole_from_another_process():
    error = pickle.loads(pickle.dumps(ConfigError(["a: wrong", "b: wrong"])))
    assert error.problems == ["a: wrong", "b: wrong"] and "  - b: wrong" in str(error)

"""Weights of sources, and questions that rest: what is drawn, what is refused."""

from collections import Counter
from math import ceil, floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import composed
from tests.verl.fake_roles import SMALL
from verl.trainer.config import PPOConfig, validate
from verl.trainer.ppo.gate import Gate, GateConfig
from verl.trainer.ppo.question_sampler import QuestionSampler, share_out
from verl.utils.dataset import ResumableSampler
from verl.utils.errors import ConfigError, DataError
from verl.utils.schedule import check_shares

ROWS = [{"data_source": "nq" if number % 4 else "hotpotqa"} for number in range(40)]


def configured(*overrides: str) -> PPOConfig:
    return validate(composed("grpo", *SMALL, *overrides))


WEIGHTS = st.dictionaries(st.sampled_from("abcde"), st.floats(0, 9), min_size=1).filter(
    lambda weights: sum(weights.values()) > 0.01
)


@given(count=st.integers(0, 50), weights=WEIGHTS, offset=st.floats(0, 1, exclude_max=True))
def test_each_source_gets_its_exact_share_rounded(count, weights, offset):
    places = share_out(count, weights, offset)
    assert sum(places.values()) == count and places.keys() == weights.keys()
    for source, weight in weights.items():
        exact = count * weight / sum(weights.values())
        assert floor(exact - 1e-9) <= places[source] <= ceil(exact + 1e-9)


def test_shares_are_exact_on_average_over_the_offset():
    weights = {"a": 1.0, "b": 2.5, "c": 0.0, "d": 0.25}
    total: Counter[str] = Counter()
    for offset in range(1000):
        total.update(share_out(10, weights, (offset + 0.5) / 1000))
    for source, weight in weights.items():
        assert total[source] / 1000 == pytest.approx(10 * weight / 3.75, abs=0.002)


def test_sources_follow_their_weights_and_each_keeps_its_order():
    """Of 8 questions hotpotqa has 0, then ever more, and at last all."""
    weights = "++data.source_weights={nq: [[3, 1], [5, 0]], hotpotqa: [[1, 0], [3, 1]]}"
    sampler = QuestionSampler(configured(weights, "data.shuffle_train_dataloader=true"), ROWS)
    batches = [sampler.draw(8, step) for step in (1, 2, 3, 4, 5, 9)]
    of_hotpotqa = [sum(number % 4 == 0 for number in batch) for batch in batches]
    assert of_hotpotqa[0] == 0 and of_hotpotqa[1] in (2, 3)
    assert of_hotpotqa[2] == 4 and of_hotpotqa[3] in (5, 6) and of_hotpotqa[4:] == [8, 8]
    assert any(batch != sorted(batch, key=lambda n: n % 4 == 0) for batch in batches), (
        "the sources are mixed within a batch, not one after the other"
    )
    numbers = [number for number in range(40) if number % 4]
    order = [numbers[place] for place in ResumableSampler(30, "0/nq", shuffle=True).take(30)]
    drawn = [[number for number in batch if number % 4] for batch in batches]
    taken = 0
    for batch in drawn:
        assert sorted(batch) == sorted(order[taken : taken + len(batch)])
        taken += len(batch)
    assert sampler.epoch == 0, "nq has not been seen once, hotpotqa twice"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{nq: 1, hotpot: 1}", "no training question has the data_source hotpot; there are "),
        ("{nq: 1}", r"no weight for hotpotqa; .* \(hotpotqa, nq\), with 0 for one"),
    ],
)
def test_sources_that_do_not_fit_the_questions_are_named(weights, message):
    with pytest.raises(DataError, match=message):
        QuestionSampler(configured(f"++data.source_weights={weights}"), ROWS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0}, "at least 0 for a"),
        ({"a": float("inf")}, "finite weights"),
        ({"a": 0.0, "b": [(4, 1.0), (9, 0.0)]}, "all weights are 0 at step 9"),
        ({"a": [(9, 1.0), (9, 0.0)]}, "rising steps"),
        ({"a": []}, "rising steps"),
    ],
)
def test_weights_that_divide_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        check_shares(weights)
    with pytest.raises(ConfigError, match=message):
        raw = composed("grpo", *SMALL)
        raw["data"]["source_weights"] = weights
        validate(raw)


def test_what_is_solved_sometimes_never_rests():
    gate = Gate(GateConfig(rest_solved=3, rest_unsolved=1, solved_at=0.5))
    gate.observe(0, [1.0, 0.5])
    gate.observe(1, [0.4, 0.0])
    gate.observe(2, [0.4, 0.6])
    gate.observe(3, [1.0])  # the others of its group have failed
    assert [gate.passes_over(number) for number in range(4)] == [True, True, False, False]
    assert gate.take_metrics() == {
        "gate/solved": 1,
        "gate/unsolved": 1,
        "gate/passed_over": 2,
        "gate/resting": 1,
    }
    assert [gate.passes_over(0) for _ in range(3)] == [True, True, False]
    assert gate.take_metrics()["gate/passed_over"] == 2


@given(rest=st.integers(1, 3), count=st.integers(1, 9))
@settings(deadline=None)
def test_a_batch_is_filled_also_where_every_question_rests(rest, count):
    sampler = QuestionSampler(configured(f"data.gate.rest_solved={rest}"), ROWS[:5])
    for number in range(5):
        sampler.gate.observe(number, [1.0, 1.0])
    assert sampler.draw(count, 1) == [number % 5 for number in range(count)]
    assert sampler.epoch == count // 5, "nothing was asked for rests that all had in common"


def test_rests_without_an_end_do_not_stop_the_training():
    """Where every question rests, those that rest the least are asked."""
    sampler = QuestionSampler(configured("data.gate.rest_solved=1000000000"), ROWS[:3])
    for number in (0, 2):
        sampler.gate.observe(number, [1.0, 1.0])
    assert sampler.draw(2, 1) == [1, 1]
    sampler.gate.observe(1, [1.0, 1.0])
    assert sampler.draw(2, 2) == [0, 2]
    assert sampler.gate.resting.keys() == {1}


def test_passes_are_counted_over_what_is_drawn_from():
    weights = "++data.source_weights={nq: 1, hotpotqa: 0}"
    sampler = QuestionSampler(configured(weights), ROWS)
    assert sampler.epoch == 0
    sampler.draw(60, 1)
    assert sampler.epoch == 2


def test_without_a_gate_a_resumed_run_forgets_what_rested():
    sampler = QuestionSampler(configured("data.gate.rest_solved=1"), ROWS[:5])
    sampler.gate.observe(1, [1.0, 1.0])
    for overrides, drawn in (["data.gate.rest_solved=1"], [0, 2]), ([], [0, 1]):
        resumed = QuestionSampler(configured(*overrides), ROWS[:5])
        resumed.load_state_dict(sampler.state_dict())
        assert resumed.draw(2, 1) == drawn


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [
                "data.gate.rest_solved=1",
                "actor_rollout_ref.rollout.n=1",
                "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            ],
            r"data\.gate needs .*n >= 2",
        ),
        (["data.gate.solved_at=0.5"], "no effect without rest_solved or rest_unsolved"),
    ],
)
def test_a_gate_that_sees_nothing_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        configured(*overrides)

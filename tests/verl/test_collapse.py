"""Hand-made curves for every rule of the collapse watch; steady curves and saved states from
hypothesis."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.configs import composed
from verl.trainer.config import validate
from verl.trainer.ppo.collapse import Bound, CollapseWatch, CollapseWatchConfig, replay
from verl.utils.errors import ConfigError

SIGNALS = {
    "entropy": {"rises_to": 2.0},
    "finished": {"falls_to": 0.7},
    "log_prob": {"falls_by": 0.5},
}
RECIPE = "experiment=nq_hotpotqa/qwen2.5-3b-grpo"
SHIPPED = composed("grpo", RECIPE)["trainer"]["collapse_watch"]


def config(**changes) -> CollapseWatchConfig:
    return CollapseWatchConfig.model_validate(
        {"signals": SIGNALS, "min_signals": 2, "patience": 2} | changes
    )


def alarms(watch, curves, start=1):
    """Alarms over curves of equal length, in which None is a step without the metric."""
    steps = [
        dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)
    ]
    seen = ({k: v for k, v in step.items() if v is not None} for step in steps)
    return [
        a for a in (watch.observe(i, step) for i, step in enumerate(seen, start)) if a is not None
    ]


def alarm_steps(watch, curves, start=1):
    return [a.step for a in alarms(watch, curves, start)]


@pytest.mark.parametrize(
    ("bound", "value", "reference", "text"),
    [
        ({"below": 0.1}, 0.09, None, "is below 0.1"),
        ({"below": 0.1}, 0.1, 5.0, None),
        ({"above": 0.1}, 0.11, None, "is above 0.1"),
        ({"falls_to": 0.5}, 0.9, 2.0, "fell below 0.5 of its reference"),
        ({"falls_to": 0.5}, 1.0, 2.0, None),
        ({"falls_to": 0.5}, 0.0, None, None),
        ({"rises_to": 2}, 4.1, 2.0, "rose above 2 times its reference"),
        ({"rises_to": 2}, 1.0, 0.0, None),  # no multiple of 0, or of a negative number
        ({"falls_to": 0.5}, -3.0, -1.0, None),
        ({"falls_by": 0.5}, -1.6, -1.0, "fell by more than 0.5"),
        ({"falls_by": 0.5}, -1.4, -1.0, None),
        ({"above": 0.1, "rises_to": 2}, 0.05, 0.01, "rose above 2 times its reference"),
        ({"above": 0.1}, math.nan, 0.0, "is not finite"),
        ({"below": 0.1}, math.inf, 0.0, "is not finite"),
    ],
)
def test_bounds(bound, value, reference, text):
    assert Bound(**bound).broken(value, reference) == text


@pytest.mark.parametrize(
    "bound", [{}, {"falls_to": 1.0}, {"rises_to": 1.0}, {"falls_by": 0.0}, {"under": 1.0}]
)
def test_bounds_that_mean_nothing_are_refused(bound):
    with pytest.raises(ValidationError):
        Bound.model_validate(bound)


def test_alarm_names_what_moved_first():
    curves = {
        "entropy": [1, 1, 1, 1, 3, 3],
        "finished": [1, 1, 0.5, 0.4, 0.3, 0.2],
        "log_prob": [-1] * 6,
    }
    (alarm,) = alarms(CollapseWatch(config()), curves)
    assert (alarm.step, alarm.since) == (6, 3)
    assert [(s.name, s.since, s.value, s.reference) for s in alarm.signals] == [
        ("finished", 3, 0.2, 0.75),  # a lone signal does not make a step ill: median of 1 1 .5 .4
        ("entropy", 5, 3, 1),
    ]
    assert alarm.message() == (
        "collapse at step 6: finished moved first, at step 3\n"
        "  finished = 0.2 (reference 0.75) fell below 0.7 of its reference, since step 3\n"
        "  entropy = 3 (reference 1) rose above 2 times its reference, since step 5"
    )


def test_of_signals_that_moved_together_the_first_configured_leads():
    (alarm,) = alarms(
        CollapseWatch(config()),
        {"finished": [1, 0, 0], "log_prob": [-1, -2, -2], "entropy": [1, 3, 3]},
    )
    assert [s.name for s in alarm.signals] == list(SIGNALS)


def test_one_signal_alone_or_for_too_short_raises_nothing():
    assert not alarms(CollapseWatch(config()), {"entropy": [1, 3, 3, 3, 3], "finished": [1] * 5})
    assert not alarms(
        CollapseWatch(config()), {"entropy": [1, 3, 1, 3, 1], "finished": [1, 0, 1, 0, 1]}
    )
    assert alarm_steps(CollapseWatch(config(min_signals=1)), {"entropy": [1, 3, 3]}) == [3]


def test_reference_follows_learning_and_not_a_collapse():
    halving = {"entropy": [0.8**i for i in range(40)], "finished": [0.8**i for i in range(40)]}
    assert not alarms(CollapseWatch(config(window=3)), halving)
    slow = {"entropy": [1, 1, 2.1, 2.2, 2.3, 2.4], "finished": [1, 1, 0.6, 0.6, 0.6, 0.6]}
    watch = CollapseWatch(config(window=2, patience=4))
    (alarm,) = alarms(watch, slow)
    assert [s.reference for s in alarm.signals] == [1, 1]


def test_history_needed():
    curves = {"entropy": [1, 3, 3, 3, 9, 9], "finished": [1, 0.5, 0.5, 0.5, 0.1, 0.1]}
    assert alarm_steps(CollapseWatch(config(min_history=1)), curves) == [3]
    assert alarm_steps(CollapseWatch(config(min_history=3)), curves) == [6]


def test_a_collapse_is_reported_once_until_it_was_healthy_again():
    # ill from 2 (alarm at 3), healthy for one step only, ill, healthy for two, ill from 10 (alarm
    # at 11)
    entropy = [1, 3, 3, 3, 1, 3, 3, 1, 1, 3, 3]
    finished = [1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0]
    assert alarm_steps(CollapseWatch(config()), {"entropy": entropy, "finished": finished}) == [
        3,
        11,
    ]


def test_after_an_alarm_steps_count_as_reference_only_once_it_is_armed_again():
    watch = CollapseWatch(config())
    alarms(watch, {"entropy": [1, 3, 3, 3, 1.5, 1.5], "finished": [1, 0, 0, 1, 1, 1]})
    assert watch.history == {"entropy": [1, 1.5, 1.5], "finished": [1, 1, 1]}


def test_not_a_number_is_out_of_bounds_and_never_a_reference():
    nan = math.nan
    watch = CollapseWatch(config())
    assert not alarms(watch, {"entropy": [1, nan, nan, 1, nan], "finished": [1, 1, nan, nan, 1]})
    (alarm,) = alarms(watch, {"entropy": [nan, nan], "log_prob": [nan, nan]}, start=6)
    assert [(s.reference, s.violation) for s in alarm.signals] == [
        (1, "is not finite"),
        (None, "is not finite"),
    ]
    assert "entropy = nan (reference 1) is not finite, since step 5" in alarm.message()


def test_a_missing_metric_is_not_observed():
    # warm-up without an actor; ill in 4; the step without an update is passed over and ends nothing
    entropy = [None, None, 1, 3, None, 3]
    finished = [1, 1, 1, 0, 0, 0]
    (alarm,) = alarms(CollapseWatch(config()), {"entropy": entropy, "finished": finished})
    assert (alarm.step, [(s.name, s.since) for s in alarm.signals]) == (
        6,
        [("entropy", 4), ("finished", 4)],
    )


def test_validation_metrics_alone_change_nothing():
    watch = CollapseWatch(config())
    before = watch.state_dict()
    assert watch.observe(0, {"val/test_score": 0.0}) is None
    assert watch.state_dict() == before


@settings(max_examples=50, deadline=None)
@given(
    values=st.fixed_dictionaries({n: st.floats(-1e6, 1e6) for n in SHIPPED["signals"]}),
    steps=st.integers(1, 60),
)
def test_constant_metrics_never_leave_relative_bounds(values, steps):
    relative = {
        name: {k: v for k, v in bound.items() if k not in ("below", "above")}
        for name, bound in SHIPPED["signals"].items()
        if set(bound) - {"below", "above"}
    }
    watch = CollapseWatch(
        CollapseWatchConfig.model_validate(SHIPPED | {"signals": relative, "min_signals": 1})
    )
    assert not any(watch.observe(i, values) for i in range(steps))


METRIC = st.one_of(st.none(), st.just(math.nan), st.floats(-3, 3))
STEPS = st.lists(st.fixed_dictionaries(dict.fromkeys(SIGNALS, METRIC)), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, data=st.data())
def test_a_saved_state_decides_as_the_watch_that_went_on(steps, data):
    cut = data.draw(st.integers(0, len(steps)))
    curves = {name: [step[name] for step in steps] for name in SIGNALS}
    head, tail = (
        {name: curve[part] for name, curve in curves.items()}
        for part in (slice(cut), slice(cut, None))
    )
    watch = CollapseWatch(config())
    resumed = CollapseWatch(config())
    alarms(watch, head)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    before, after = (map(str, alarms(w, tail, start=cut + 1)) for w in (watch, resumed))
    assert list(before) == list(after)
    assert watch.state_dict() == resumed.state_dict()


def test_a_saved_state_is_not_written_to():
    watch = CollapseWatch(config())
    alarms(watch, {"entropy": [1, 1], "finished": [1, 1]})
    state = watch.state_dict()
    copy = json.dumps(state)
    watch.load_state_dict(state)
    alarms(watch, {"entropy": [3, 3], "finished": [0, 0]}, start=3)
    assert json.dumps(state) == copy


def test_replay(tmp_path):
    """A validation before training, a step that a resumed run wrote again, and null for what was
    not finite."""
    rows = [
        {"training/global_step": 0, "val/test_score": 0.2},
        {"training/global_step": 1, "entropy": 1.0, "finished": 1.0},
        {"training/global_step": 2, "entropy": None, "finished": 0.1},
        {"training/global_step": 3, "entropy": 1.0, "finished": 0.1},
        {"training/global_step": 3, "entropy": None, "finished": 0.1},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (alarm,) = replay(path, config())
    assert (alarm.step, alarm.since) == (3, 2)


def test_shipped_signals():
    """The task adds to the library's; one is disabled by null."""
    name = "trainer.collapse_watch.signals"
    watch = validate(composed("grpo", RECIPE, f"{name}={{actor/entropy: null}}"))
    active = watch.trainer.collapse_watch.active
    assert "actor/entropy" not in active
    assert {"critic/score/std", "env/finish_ratio"} < set(active)


def test_what_could_never_answer_is_refused():
    with pytest.raises(ConfigError) as error:
        key = "trainer.collapse_watch"
        validate(
            composed(
                "grpo",
                RECIPE,
                f"{key}.min_signals=20",
                f"{key}.response=roll_back",
                "trainer.save_freq=-1",
            )
        )
    assert [p.split()[0] for p in error.value.problems] == [
        f"{key}.min_signals=20",
        f"{key}.response=roll_back",
    ]

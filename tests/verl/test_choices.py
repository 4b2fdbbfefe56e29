"""A name in the configuration is one of a table's keys; the table is the only list of them."""

from typing import Annotated

import pytest
from pydantic import ValidationError

from tests.configs import composed
from verl.trainer.config import AlgorithmConfig, RolloutCorrectionConfig, validate
from verl.trainer.ppo.core_algos import (
    ADVANTAGE_ESTIMATORS,
    KL_PENALTIES,
    LEVELS,
    LOSS_AGG_MODES,
    POLICY_LOSSES,
)
from verl.trainer.ppo.filters import FILTERS
from verl.utils.config import Config, OneOf, problems_of
from verl.utils.errors import ConfigError
from verl.workers.config import ActorConfig, PolicyLossConfig

TABLE = {"left": 1, "right": 2, "up": 3}


class Turn(Config):
    way: Annotated[str, OneOf(f"{__name__}.TABLE")] = "left"
    more: list[Annotated[str, OneOf(f"{__name__}.TABLE")]] = []


def test_the_names_are_those_of_the_table(monkeypatch):
    monkeypatch.setitem(TABLE, "down", 4)
    assert Turn(way="down", more=["up", "left"]).way == "down"


def test_another_name_is_refused_with_the_choices():
    with pytest.raises(ValidationError) as caught:
        Turn.model_validate({"way": "back", "more": ["up", "on"]})
    assert problems_of(caught.value, "turn.", Turn) == [
        "turn.way=back: expected 'left', 'right' or 'up'",
        "turn.more.1=on: expected 'left', 'right' or 'up'",
    ]


@pytest.mark.parametrize(
    ("section", "key", "table"),
    [
        (AlgorithmConfig, "adv_estimator", ADVANTAGE_ESTIMATORS),
        (AlgorithmConfig, "kl_penalty", KL_PENALTIES),
        (ActorConfig, "kl_loss_type", KL_PENALTIES),
        (ActorConfig, "loss_agg_mode", LOSS_AGG_MODES),
        (PolicyLossConfig, "loss_mode", POLICY_LOSSES),
        (RolloutCorrectionConfig, "rollout_is", LEVELS),
        (RolloutCorrectionConfig, "rollout_rs", LEVELS),
    ],
)
def test_every_algorithm_of_the_library_can_be_configured(section, key, table):
    for name in table:
        assert getattr(section.model_validate({key: name}), key) == name
    with pytest.raises(ValidationError, match="nothing_like_it"):
        section.model_validate({key: "nothing_like_it"})


def test_a_composed_configuration_says_which_names_there_are():
    assert AlgorithmConfig(loss_filters=list(FILTERS)).loss_filters == list(FILTERS)
    with pytest.raises(ConfigError) as caught:
        validate(composed("grpo", "algorithm.loss_filters=[short]", "algorithm.kl_penalty=k9"))
    assert caught.value.problems == [
        "algorithm.loss_filters.0=short: expected 'zero_variance', 'void_turn' or 'truncated'",
        "algorithm.kl_penalty=k9: expected 'kl', 'k1', 'abs', 'mse', 'k2', 'low_var_kl' or 'k3'",
    ]

"""The keys of the `reward` section: a weight for each component, and what components read."""

from math import isfinite
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from search_r1.rewards.judge import JudgeConfig
from verl.utils.config import Config
from verl.utils.schedule import Weight, check_points, values_of


class SearchRewardConfig(Config):
    em: Weight = 1.0
    """Weight of exact match, the paper's reward. Like every weight it is a number or a schedule
    `[[step, weight], ...]`."""
    sub_em: Weight = 0.0
    """Weight of a gold answer occurring in the answer."""
    f1: Weight = 0.0
    """Weight of token F1."""
    f1_above: Weight = 0.0
    """Weight of token F1 reaching `f1_threshold`, as 0 or 1."""
    soft_em: Weight = 0.0
    """Weight of exact match, where a wrong answer gets 0.8 times its token F1. Search-P1 is em=0
    soft_em=0.6 path=0.3 format=0.1."""
    balanced_f1: Weight = 0.0
    """Weight of DeepResearcher's reward (2504.03160): token F1, and -1 without an answer or where a
    tag stands alone."""
    format: Weight = 0.0
    """Weight of well-formed turns: each one `<think>`, then one `<search>` or, in the last turn,
    one `<answer>`."""
    em_format: Weight = 0.0
    """Weight of exact match with format (2505.15117), by the three scores below."""
    retrieval: Weight = 0.0
    """Weight of a retrieved passage holding a gold answer."""
    no_search: Weight = 0.0
    """Weight of not searching; negative for a penalty. F1+ is f1=1 no_search=-0.1
    no_answer=-0.1."""
    no_answer: Weight = 0.0
    """Weight of not answering; negative for a penalty."""
    repeated_query: Weight = 0.0
    """Weight of the share of searches asked before; negative for a penalty."""
    new_evidence: Weight = 0.0
    """Weight of the share of the gold passages that a turn found first, paid to that turn. The data
    must name them (`extra_info.gold_ids` or `gold_titles`)."""
    path: Weight = 0.0
    """Weight of the path by which the gold passages were found (Search-P1, 2602.22576): the share
    found, times gold passages per search. Each turn is paid the change that it makes. The data must
    name them."""
    redundancy: Weight = 0.0
    """Weight of the share of a turn's passages that an earlier turn had found, paid to that turn;
    negative for a penalty. StepSearch is new_evidence=1 redundancy=-1."""
    repeated_search: Weight = 0.0
    """Weight of each search that was asked before, paid to its turn; negative for a penalty."""
    random_turn: Weight = 0.0
    """Weight of a coin flip per turn that searches, paid to that turn: a control."""
    overlong: Weight = 0.0
    """Weight of DAPO's soft punishment of length, between 0 and -1: positive for a penalty."""
    ikea: Weight = 0.0
    """Weight of IKEA's reward (2505.07596): fewer searches for a right answer."""
    otc_ppo: Weight = 0.0
    """Weight of OTC's reward (2504.14870), PPO form."""
    otc_grpo: Weight = 0.0
    """Weight of OTC's reward, GRPO form, which compares with the right answer of the group that
    took the fewest searches. Training only."""
    judge: Weight = 0.0
    """Weight of the verdict of a language model as judge, see `reward.judge_endpoint`."""
    random: Weight = 0.0
    """Weight of a coin flip per trajectory: a control from which nothing can be learned."""
    call_price: dict[str, Weight] = {}
    """Price of every call, by tool, such as `{search: 0.02, python: 0.01}`: calls times the price
    are subtracted from the score, as `price_when` says."""
    token_price: dict[str, Weight] = {}
    """Price of every token of an observation, by tool, such as `{search: 0.0002}`."""
    price_when: Literal["right", "always"] = "right"
    """Which trajectories pay `call_price` and `token_price`: those whose answer is an exact match,
    as with OTC and IKEA, or all."""
    tool_used: dict[str, Weight] = {}
    """Weight of having called a tool at least once, by tool; negative for a penalty."""
    tool_errors: dict[str, Weight] = {}
    """Weight of every call that the policy got wrong, by tool; negative for a penalty."""
    f1_threshold: PositiveFloat = 0.5
    """The token F1 from which `f1_above` is 1."""
    structure_format_score: float = 0.2
    """`em_format`: score of a wrong but well-formed response. A right but malformed response gets
    1 minus this."""
    final_format_score: float = 0.1
    """`em_format`: score of a wrong and malformed response that has an answer."""
    retrieval_score: float = 0.0
    """`em_format`: added to the score of a wrong but well-formed response if a passage held a gold
    answer."""
    nested_search: bool = False
    """Whether a turn is well-formed if its `<search>` stands inside `<think>`."""
    overlong_limit: PositiveInt = 2000
    """`overlong`: number of the policy's own tokens from which the punishment is -1."""
    overlong_buffer: PositiveInt = 500
    """`overlong`: number of tokens before the limit in which the punishment goes from 0 to -1."""
    otc_c: PositiveFloat = 4.0
    """The constant c of OTC: the largest number of searches."""
    judge_endpoint: JudgeConfig = Field(default_factory=JudgeConfig)
    """The endpoint of the judge."""

    @field_validator("*")
    @classmethod
    def _steps_rise(cls, value: object) -> object:
        for weight in value.values() if isinstance(value, dict) else [value]:
            if isinstance(weight, list):
                check_points(weight, "weight")
        return value

    @field_validator("call_price", "token_price")
    @classmethod
    def _nobody_is_paid(cls, value: dict[str, Weight]) -> dict[str, Weight]:
        for tool, price in value.items():
            if any(number < 0 for number in values_of(price)):
                raise ValueError(
                    f"expected a price of at least 0 for {tool}; it is subtracted from the score"
                )
        return value

    @field_validator("call_price", "token_price", "tool_used", "tool_errors")
    @classmethod
    def _finite(cls, value: dict[str, Weight]) -> dict[str, Weight]:
        for tool, weight in value.items():
            if not all(map(isfinite, values_of(weight))):
                raise ValueError(f"expected a finite number for {tool}")
        return value

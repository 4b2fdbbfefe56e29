"""The reward of a trajectory: a weighted sum of components, each logged on its own.

Only what the policy wrote is read: not the prompt with its `<answer>` example, not what stands in
`<information>`.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from search_r1.rewards import components
from search_r1.rewards.episode import Episode, read_episode
from search_r1.rewards.judge import Judge, JudgeConfig
from verl.agent import Row, Trajectory, TrajectoryFailed, context_digest
from verl.utils.config import Config
from verl.utils.endpoint import EndpointFailed

Weight = float | list[tuple[int, float]]
"""A number, or `[[step, weight], ...]`: constant before the first and after the last, linear
between."""


class SearchRewardConfig(Config):
    em: Weight = 1.0
    """Weight of exact match, the paper's reward. Like every weight a number or a schedule `[[step,
    weight], ...]`."""
    sub_em: Weight = 0.0
    """Weight of a gold answer occurring in the answer."""
    f1: Weight = 0.0
    """Weight of token F1."""
    f1_above: Weight = 0.0
    """Weight of token F1 reaching `f1_threshold`, as 0 or 1."""
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
    overlong: Weight = 0.0
    """Weight of DAPO's soft punishment of length, between 0 and -1: positive for a penalty."""
    ikea: Weight = 0.0
    """Weight of IKEA's reward (2505.07596): fewer searches for a right answer."""
    otc_ppo: Weight = 0.0
    """Weight of OTC's reward (2504.14870), PPO form."""
    otc_grpo: Weight = 0.0
    """Weight of OTC's reward, GRPO form: compared with the group's right answer of fewest searches.
    Training only."""
    judge: Weight = 0.0
    """Weight of the verdict of a language model, see `reward.judge_endpoint`."""
    random: Weight = 0.0
    """Weight of a coin flip per trajectory: a control that must teach nothing."""
    f1_threshold: PositiveFloat = 0.5
    """What `f1_above` compares with."""
    structure_format_score: float = 0.2
    """`em_format`: of a wrong but well-formed response; a right malformed one gets 1 minus this."""
    final_format_score: float = 0.1
    """`em_format`: of a wrong malformed response with an answer."""
    retrieval_score: float = 0.0
    """`em_format`: added to a wrong well-formed response where a passage held a gold answer."""
    nested_search: bool = False
    """Whether `<search>` may stand inside `<think>` for the format."""
    overlong_limit: PositiveInt = 2000
    """`overlong`: own tokens of a trajectory from which the punishment is whole."""
    overlong_buffer: PositiveInt = 500
    """`overlong`: tokens before that over which it rises."""
    otc_c: PositiveFloat = 4.0
    """OTC's constant: the largest number of searches."""
    judge_endpoint: JudgeConfig = Field(default_factory=JudgeConfig)
    """Where the judge is."""

    @field_validator("*")
    @classmethod
    def _steps_rise(cls, value: Any) -> Any:
        if isinstance(value, list) and (not value or any(a[0] >= b[0] for a, b in pairwise(value))):
            raise ValueError("a schedule is [[step, weight], ...] with rising steps")
        return value


Component = Callable[[Episode, SearchRewardConfig], float]
ALWAYS: dict[str, Component] = {
    "em": lambda e, c: components.em(e),
    "f1": lambda e, c: components.token_f1(e),
    "sub_em": lambda e, c: components.sub_em(e),
    "format": lambda e, c: components.format_share(e, c.nested_search),
    "no_answer": lambda e, c: components.no_answer(e),
}
"""Logged at whatever weight."""
WEIGHTED: dict[str, Component] = {
    "f1_above": lambda e, c: components.f1_above(e, c.f1_threshold),
    "em_format": lambda e, c: components.em_format(
        e, c.structure_format_score, c.final_format_score, c.retrieval_score, c.nested_search
    ),
    "retrieval": lambda e, c: components.retrieval_hit(e),
    "no_search": lambda e, c: components.no_search(e),
    "repeated_query": lambda e, c: components.repeated_query(e),
    "overlong": lambda e, c: components.overlong(e, c.overlong_limit, c.overlong_buffer),
    "ikea": lambda e, c: components.ikea(e),
    "otc_ppo": lambda e, c: components.otc_ppo(e, c.otc_c),
}
"""Computed where they have a weight."""


class SearchReward:
    """`score`, the components, and `answered`. One that a judge takes part in is awaited."""

    Config: ClassVar = SearchRewardConfig

    def __init__(self, config: SearchRewardConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.functions = ALWAYS | {name: f for name, f in WEIGHTED.items() if getattr(config, name)}
        self.judge = Judge(config.judge_endpoint) if config.judge else None

    @property
    def entries(self) -> frozenset[str]:
        """The names of all that it returns in training."""
        optional = {name for name in ("random", "judge", "otc_grpo") if getattr(self.config, name)}
        return frozenset({"score", "answered"} | self.functions.keys() | optional)

    def __call__(
        self, trajectory: Trajectory, row: Row
    ) -> dict[str, float] | Awaitable[dict[str, float]]:
        episode = read_episode(trajectory, row, self.tokenizer)
        parts = {name: function(episode, self.config) for name, function in self.functions.items()}
        if self.config.random:
            parts["random"] = coin(trajectory)
        if self.judge is not None:
            return self._judged(self.judge, episode, parts, trajectory)
        return self._sum(parts, trajectory)

    async def _judged(
        self, judge: Judge, episode: Episode, parts: dict[str, float], trajectory: Trajectory
    ) -> dict[str, float]:
        try:
            parts["judge"] = await judge(episode)
        except EndpointFailed as error:
            raise TrajectoryFailed(f"judge: {error}", num_calls=episode.searches) from error
        return self._sum(parts, trajectory)

    def _sum(self, parts: dict[str, float], trajectory: Trajectory) -> dict[str, float]:
        score = sum(
            weight_at(getattr(self.config, name), step_of(trajectory)) * part
            for name, part in parts.items()
        )
        return {"score": score, **parts, "answered": 1.0 - parts["no_answer"]}

    def score_groups(self, groups: Sequence[Sequence[Trajectory]]) -> None:
        """Adds what depends on the other trajectories of a group."""
        if not self.config.otc_grpo:
            return
        for group in groups:
            searches = [sum(s.info.get("kind") == "search" for s in t.segments) for t in group]
            right = [t.reward["em"] == 1 for t in group]
            for t, part in zip(
                group, components.otc_grpo(searches, right, self.config.otc_c), strict=True
            ):
                t.reward["otc_grpo"] = part
                t.reward["score"] += weight_at(self.config.otc_grpo, step_of(t)) * part


def weight_at(weight: Weight, step: int) -> float:
    """The weight at a training step."""
    if not isinstance(weight, list):
        return weight
    before = [point for point in weight if point[0] <= step]
    after = [point for point in weight if point[0] > step]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (a, low) = before[-1]
    (b, high) = after[0]
    return low + (high - low) * (step - a) / (b - a)


def step_of(trajectory: Trajectory) -> int:
    """The training step that a trajectory belongs to: the weights that wrote it are those of the
    step before."""
    return (trajectory.segments[0].policy_version or 0) + 1 if trajectory.segments else 1


def coin(trajectory: Trajectory) -> float:
    """0 or 1, reproducible: seeded by the trajectory's tokens and by the weights that wrote them.

    Tokens alone would reward the same words at every step, which can be learned.
    """
    versions = [s.policy_version for s in trajectory.segments]
    return float(random.Random(f"{context_digest(trajectory.token_ids)} {versions}").random() < 0.5)

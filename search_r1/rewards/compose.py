"""The reward of a trajectory: a weighted sum of components, each logged on its own.

Only what the policy wrote is scored, not the `<answer>` example in the prompt and not what stands
in `<information>`.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from search_r1.rewards import components
from search_r1.rewards.config import SearchRewardConfig, Weight
from search_r1.rewards.episode import Episode, read_episode
from search_r1.rewards.judge import Judge
from search_r1.trajectory import read_searches
from verl.agent import Row, Trajectory, TrajectoryFailed, context_digest
from verl.utils.endpoint import EndpointFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Component = Callable[[Episode, SearchRewardConfig], float]
ALWAYS: dict[str, Component] = {
    "em": components.em,
    "f1": components.f1,
    "sub_em": components.sub_em,
    "format": components.format_share,
    "no_answer": components.no_answer,
}
"""Components that are computed and logged whatever their weight is, even 0."""
WEIGHTED: dict[str, Component] = {
    "f1_above": components.f1_above,
    "em_format": components.em_format,
    "retrieval": components.retrieval,
    "no_search": components.no_search,
    "repeated_query": components.repeated_query,
    "overlong": components.overlong,
    "ikea": components.ikea,
    "otc_ppo": components.otc_ppo,
}
"""Components that are computed only if their weight is not 0."""


class SearchReward:
    """Returns `score`, the components and `answered`. With a judge the result has to be awaited."""

    Config: ClassVar = SearchRewardConfig

    def __init__(self, config: SearchRewardConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.functions = ALWAYS | {name: f for name, f in WEIGHTED.items() if getattr(config, name)}
        self.judge = Judge(config.judge_endpoint) if config.judge else None

    @property
    def entries(self) -> frozenset[str]:
        """The names of everything in the result of a training trajectory."""
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
        step = training_step(trajectory)
        score = sum(
            weight_at(getattr(self.config, name), step) * part for name, part in parts.items()
        )
        return {"score": score, **parts, "answered": 1.0 - parts["no_answer"]}

    def score_groups(self, groups: Sequence[Sequence[Trajectory]]) -> None:
        """Adds the components that compare the trajectories of a group to their rewards."""
        if not self.config.otc_grpo:
            return
        for group in groups:
            searches = [len(read_searches(trajectory)) for trajectory in group]
            right = [trajectory.reward["em"] == 1 for trajectory in group]
            parts = components.otc_grpo(searches, right, self.config.otc_c)
            for trajectory, part in zip(group, parts, strict=True):
                weight = weight_at(self.config.otc_grpo, training_step(trajectory))
                trajectory.reward["otc_grpo"] = part
                trajectory.reward["score"] += weight * part


def weight_at(weight: Weight, step: int) -> float:
    """The weight at a training step."""
    if not isinstance(weight, list):
        return weight
    before = [point for point in weight if point[0] <= step]
    after = [point for point in weight if point[0] > step]
    if not before:
        return after[0][1]
    if not after:
        return before[-1][1]
    start, low = before[-1]
    end, high = after[0]
    return low + (high - low) * (step - start) / (end - start)


def training_step(trajectory: Trajectory) -> int:
    """The training step that a trajectory belongs to: one more than the version of the weights that
    began it."""
    return (trajectory.segments[0].policy_version or 0) + 1 if trajectory.segments else 1


def coin(trajectory: Trajectory) -> float:
    """A reproducible 0 or 1, seeded by the trajectory's tokens and the version of the weights.

    If only the tokens were the seed, the same words would be rewarded at every step, which can be
    learned.
    """
    versions = [s.policy_version for s in trajectory.segments]
    return float(random.Random(f"{context_digest(trajectory.token_ids)} {versions}").random() < 0.5)

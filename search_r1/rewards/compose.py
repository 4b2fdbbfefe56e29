"""The reward of a trajectory: a weighted sum of components, each logged on its own.

Only what the policy wrote is scored, not the `<answer>` example in the prompt and not what stands
in `<information>`.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from search_r1.rewards import components, turn_components
from search_r1.rewards.config import SearchRewardConfig
from search_r1.rewards.episode import Episode, read_episode
from search_r1.rewards.judge import Judge
from search_r1.trajectory import read_searches
from verl.agent import AgentLoop, Row, Source, Trajectory, TrajectoryFailed, context_digest
from verl.utils.endpoint import EndpointFailed
from verl.utils.errors import RewardError
from verl.utils.reward import TURN_REWARDS
from verl.utils.schedule import weight_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = dict[str, Any]
"""Numbers by the name of a component, and what turns are paid."""
OfTurns = dict[str, list[float]]
"""By the name of a component, its value for each turn of a trajectory."""
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
    "soft_em": components.soft_em,
    "balanced_f1": components.balanced_f1,
    "em_format": components.em_format,
    "retrieval": components.retrieval,
    "no_search": components.no_search,
    "repeated_query": components.repeated_query,
    "overlong": components.overlong,
    "ikea": components.ikea,
    "otc_ppo": components.otc_ppo,
}
"""Components that are computed only if their weight is not 0."""
TurnComponent = Callable[[Episode], list[float]]
BY_TURN: dict[str, TurnComponent] = {
    "new_evidence": turn_components.new_evidence,
    "path": turn_components.path,
    "redundancy": turn_components.redundancy,
    "repeated_search": turn_components.repeated_search,
}
"""Components that are paid to single turns, computed only if their weight is not 0."""
OF_EVIDENCE = ("new_evidence", "path")
"""Those of them for which the data must name the gold passages."""
ToolComponent = Callable[[Episode, SearchRewardConfig, str], float]
BY_TOOL: dict[str, ToolComponent] = {
    "call_price": components.call_price,
    "token_price": components.token_price,
    "tool_used": components.tool_used,
    "tool_errors": components.tool_errors,
}
"""Components that have a weight for each tool; their names are those of the keys, `/` and the
tool's."""
PRICES = frozenset({"call_price", "token_price"})
"""Those of them whose weights are subtracted."""


class SearchReward:
    """Returns `score`, the components and `answered`. With a judge the result has to be awaited."""

    Config: ClassVar = SearchRewardConfig

    def __init__(self, config: SearchRewardConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.functions = ALWAYS | {name: f for name, f in WEIGHTED.items() if getattr(config, name)}
        self.by_tool = {
            f"{name}/{tool}": (function, tool)
            for name, function in BY_TOOL.items()
            for tool in getattr(config, name)
        }
        self.by_turn = {name: f for name, f in BY_TURN.items() if getattr(config, name)}
        self.judge = Judge(config.judge_endpoint) if config.judge else None

    @property
    def entries(self) -> frozenset[str]:
        """The names of everything in the result of a training trajectory."""
        by_hand = ("random", "random_turn", "judge", "otc_grpo")
        optional = {name for name in by_hand if getattr(self.config, name)}
        named = self.functions.keys() | self.by_turn.keys() | self.by_tool.keys()
        return frozenset({"score", "answered"} | named | optional)

    def preflight(self, agent: AgentLoop) -> list[str]:
        """Tools that have a weight and that the agent loop does not have."""
        known = [tool.name for tool in getattr(agent, "tools", ())]
        return [
            f"reward.{field}.{tool}: there is no such tool; the agent has "
            f"{', '.join(known) or 'none'}"
            for field, _, tool in (name.partition("/") for name in self.by_tool)
            if tool not in known
        ]

    def __call__(self, trajectory: Trajectory, row: Row) -> Result | Awaitable[Result]:
        episode = read_episode(trajectory, row, self.tokenizer)
        parts = {name: function(episode, self.config) for name, function in self.functions.items()}
        for name, (by_tool, tool) in self.by_tool.items():
            parts[name] = by_tool(episode, self.config, tool)
        if self.config.random:
            parts["random"] = float(coin_of(trajectory).random() < 0.5)
        of_turns = self._of_turns(episode, trajectory, row)
        parts |= {name: sum(of_each) for name, of_each in of_turns.items()}
        if self.judge is not None:
            return self._judged(self.judge, episode, parts, of_turns, trajectory)
        return self._sum(parts, of_turns, trajectory)

    def _of_turns(self, episode: Episode, trajectory: Trajectory, row: Row) -> OfTurns:
        """What each component by turn says of each turn. Raises RewardError if the data lack it."""
        needing = [name for name in OF_EVIDENCE if name in self.by_turn]
        if needing and episode.gold is None:
            raise RewardError(
                f"reward.{needing[0]} needs extra_info.gold_ids or extra_info.gold_titles, which "
                f"this {row['data_source']} row lacks: prepare the data with them, or with an "
                "empty list where the evidence is unknown"
            )
        of_turns = {name: function(episode) for name, function in self.by_turn.items()}
        if self.config.random_turn:
            coin = coin_of(trajectory, "turns")
            of_turns["random_turn"] = turn_components.coins(episode, coin)
        return of_turns

    async def _judged(
        self,
        judge: Judge,
        episode: Episode,
        parts: dict[str, float],
        of_turns: OfTurns,
        trajectory: Trajectory,
    ) -> Result:
        try:
            parts["judge"] = await judge(episode)
        except EndpointFailed as error:
            raise TrajectoryFailed(f"judge: {error}", num_calls=episode.searches) from error
        return self._sum(parts, of_turns, trajectory)

    def _sum(self, parts: dict[str, float], of_turns: OfTurns, trajectory: Trajectory) -> Result:
        step = training_step(trajectory)
        score = sum(self._weight(name, step) * part for name, part in parts.items())
        result = {"score": score, **parts, "answered": 1.0 - parts["no_answer"]}
        if not of_turns:
            return result
        paid = np.zeros(len(trajectory.turns))
        for name, of_each in of_turns.items():
            paid += self._weight(name, step) * np.array(of_each)
        return {**result, TURN_REWARDS: paid}

    def _weight(self, name: str, step: int) -> float:
        """The weight of a component at a training step; that of a price is negative."""
        field, _, tool = name.partition("/")
        weight = getattr(self.config, field)
        if not tool:
            return weight_at(weight, step)
        return weight_at(weight[tool], step) * (-1 if field in PRICES else 1)

    @property
    def compares(self) -> bool:
        """Whether a component compares the trajectories of a prompt."""
        return bool(self.config.otc_grpo)

    def score_groups(self, groups: Sequence[Sequence[Trajectory]]) -> None:
        """Adds the components that compare the trajectories of a group to their rewards."""
        if not self.compares:
            return
        for group in groups:
            searches = [len(read_searches(trajectory)) for trajectory in group]
            right = [trajectory.reward["em"] == 1 for trajectory in group]
            parts = components.otc_grpo(searches, right, self.config.otc_c)
            for trajectory, part in zip(group, parts, strict=True):
                weight = weight_at(self.config.otc_grpo, training_step(trajectory))
                trajectory.reward["otc_grpo"] = part
                trajectory.reward["score"] += weight * part


def training_step(trajectory: Trajectory) -> int:
    """The training step that a trajectory belongs to: one more than the version of the weights that
    began it."""
    own = (s.policy_version for s in trajectory.segments if s.source is Source.MODEL)
    return next(own, 0) + 1


def coin_of(trajectory: Trajectory, salt: str = "") -> random.Random:
    """A reproducible coin, seeded by the trajectory's tokens and the version of the weights.

    Coins of different `salt` fall independently.

    If only the tokens were the seed, the same words would be rewarded at every step, which can be
    learned.
    """
    versions = [s.policy_version for s in trajectory.segments]
    return random.Random(f"{context_digest(trajectory.token_ids)} {versions}{salt}")

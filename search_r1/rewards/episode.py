"""What a reward may read: the policy's own words, and apart from them what its searches brought."""

from dataclasses import dataclass
from typing import Any

from search_r1.rewards.matching import gold_answers, last_answer
from verl.agent import Row, Source, Trajectory


@dataclass(frozen=True)
class Episode:
    """A finished trajectory and what its question asks for."""

    question: str
    golds: list[str]
    turns: list[str]
    """The policy's text, a turn each; nothing that the environment wrote."""
    queries: list[str]
    """Of executed searches, in their order."""
    passages: list[list[str]]
    """What each of these searches brought: title and text."""
    own_tokens: int = 0
    """Tokens that the policy wrote."""

    @property
    def answer(self) -> str | None:
        """The last complete `<answer>` within a turn, None without one."""
        return last_answer(self.turns)

    @property
    def searches(self) -> int:
        return len(self.queries)


def read_episode(trajectory: Trajectory, row: Row, tokenizer: Any) -> Episode:
    """The episode of a trajectory; special tokens are no text."""
    found = [s.info for s in trajectory.segments if s.source is Source.OBSERVATION and s.info.get("kind") == "search"]
    extra = row.get("extra_info") or {}
    return Episode(
        question=str(extra.get("question") or row.get("question") or ""),
        golds=gold_answers(row["reward_model"]["ground_truth"]),
        turns=[
            tokenizer.decode(s.token_ids, skip_special_tokens=True)
            for s in trajectory.segments
            if s.source is Source.MODEL
        ],
        queries=[str(info["query"]) for info in found],
        passages=[[f"{p['title']}\n{p['text']}" for p in info["passages"]] for info in found],
        own_tokens=trajectory.num_tokens(Source.MODEL),
    )

"""What a reward may read: the policy's own words, and apart from them what its searches brought."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search_r1.rewards.matching import gold_answers, last_answer
from verl.agent import Row, Source, Trajectory

THINK_START = "<think>"
OPENING_TOKENS = 16
"""Tokens that surely hold a `<think>` and the white space behind it, whatever the vocabulary."""


@dataclass(frozen=True)
class Episode:
    """A finished trajectory and what its question asks for."""

    question: str
    golds: list[str]
    turns: list[str]
    """The policy's text, a turn each; nothing that the environment wrote, except for a `<think>`
    that the chat template opened for the turn: the thought is the policy's, and only well-formed
    with it."""
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
    found = [
        s.info
        for s in trajectory.segments
        if s.source is Source.OBSERVATION and s.info.get("kind") == "search"
    ]
    extra = row.get("extra_info") or {}
    return Episode(
        question=str(extra.get("question") or row.get("question") or ""),
        golds=gold_answers(row["reward_model"]["ground_truth"]),
        turns=read_turns(trajectory, tokenizer),
        queries=[str(info["query"]) for info in found],
        passages=[[f"{p['title']}\n{p['text']}" for p in info["passages"]] for info in found],
        own_tokens=trajectory.num_tokens(Source.MODEL),
    )


def read_turns(trajectory: Trajectory, tokenizer: Any) -> list[str]:
    """The policy's text, a turn each, from the `<think>` on where the text before the turn ends
    with one.

    Some chat templates end with it (Qwen3.5, Qwen3-Thinking, QwQ, the distilled R1 models).
    """
    turns: list[str] = []
    before = trajectory.prompt_ids
    for segment in trajectory.segments:
        if segment.source is Source.MODEL:
            opened = ends_with_think(before, tokenizer)
            said = tokenizer.decode(segment.token_ids, skip_special_tokens=True)
            turns.append(f"{THINK_START}{said}" if opened else said)
            before = []
        else:
            before = segment.token_ids or before
    return turns


def ends_with_think(token_ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether the text of `token_ids` ends with an opened thought."""
    return tokenizer.decode(token_ids[-OPENING_TOKENS:]).rstrip().endswith(THINK_START)

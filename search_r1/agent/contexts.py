"""Contexts that do not only grow: folded into a summary, freed of old results or old thoughts.

Each time the context is written anew the trajectory goes on in another row
(`verl.agent.Trajectory.rewrite`). Without an option that asks for it, contexts only grow.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import PositiveInt

from verl.agent import Segment, Source, Trajectory
from verl.utils.config import Config
from verl.utils.tokenizer import encode_text

THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
SUMMARY = re.compile(r"<summary>(.*?)(?:</summary>|$)", re.DOTALL)


class ContextConfig(Config):
    fold_at: PositiveInt | None = None
    """Fold the context when a turn would begin with more tokens than this: the policy writes a
    `<summary>`, and goes on from the prompt and its summary. null: never."""
    max_summary_length: PositiveInt = 256
    """Most tokens of a summary."""
    train_summaries: bool = True
    """Whether the tokens of summaries are trained like the policy's other tokens."""
    keep_observations: PositiveInt | None = None
    """Results that stay in the context; of older ones only a note that they were left out. null:
    all."""
    strip_thoughts: bool = False
    """Whether the `<think>..</think>` of earlier turns is left out."""

    @property
    def rewrites(self) -> bool:
        """Whether any option is on."""
        return bool(self.fold_at or self.keep_observations or self.strip_thoughts)


@dataclass
class ContextState:
    """From what the next context of a trajectory is made."""

    base: list[int]
    """The prompt, with the summary of what was folded."""
    first: int = 0
    """Number of the first segment that still stands in the context."""
    placeholders: dict[int, list[int]] = field(default_factory=dict)
    """By the number of a segment with a result: what may stand there instead."""
    shortened: dict[int, list[int]] = field(default_factory=dict)
    """By the number of a segment: what stands there from now on."""


class Contexts:
    """Writes contexts anew, as configured."""

    def __init__(self, config: ContextConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer

    def shorten(self, state: ContextState, trajectory: Trajectory) -> None:
        """Leaves out what the next turn need not see."""
        segments = trajectory.segments
        if self.config.strip_thoughts:
            for number in range(state.first, len(segments)):
                if segments[number].source is Source.MODEL and number not in state.shortened:
                    state.shortened[number] = self._without_thought(segments, number)
        if self.config.keep_observations is not None:
            results = [n for n in sorted(state.placeholders) if n >= state.first]
            newest = [n for n, s in enumerate(segments) if s.source is Source.MODEL]
            for number in results[: -self.config.keep_observations]:
                if number < newest[-1]:  # those of the last turn have not been read yet
                    state.shortened[number] = state.placeholders[number]
        if self.config.rewrites:
            trajectory.rewrite(self.context(state, trajectory))

    def context(self, state: ContextState, trajectory: Trajectory) -> list[int]:
        """The ids of the present context."""
        ids = list(state.base)
        for number in range(state.first, len(trajectory.segments)):
            ids += state.shortened.get(number, trajectory.segments[number].token_ids)
        return ids

    def _without_thought(self, segments: Sequence[Segment], number: int) -> list[int]:
        """The ids of a turn without its thought; the token that ends the turn stays.

        Of a thought that the chat template has opened the end stays, because its beginning does.
        """
        segment = segments[number]
        end = [segment.info["ended_by"]] if "ended_by" in segment.info else []
        said = segment.token_ids[: len(segment.token_ids) - len(end)]
        # a special token, such as that of Mistral's calls, would not survive as text
        special = set(self.tokenizer.all_special_ids)
        size = next((place for place, token in enumerate(said) if token in special), len(said))
        text = self.tokenizer.decode(said[:size], skip_special_tokens=False)
        opened, closed, rest = text.partition("</think>")
        begins_inside = bool(closed) and "<think>" not in opened
        stripped = closed + THOUGHT.sub("", rest) if begins_inside else THOUGHT.sub("", text)
        if stripped == text:
            return segment.token_ids
        return [*encode_text(self.tokenizer, stripped), *said[size:], *end]

    def is_full(self, state: ContextState, trajectory: Trajectory) -> bool:
        """Whether the context is to be folded before the next turn.

        That is never so directly behind a fold, of which nothing could be left out.
        """
        limit = self.config.fold_at
        if limit is None or len(trajectory.segments) == state.first:
            return False
        return len(trajectory.token_ids) > limit

    def fold(self, state: ContextState, trajectory: Trajectory, base: Sequence[int]) -> None:
        """Goes on from `base` alone: the prompt with a summary of all that was said."""
        state.base = list(base)
        state.first = len(trajectory.segments)
        trajectory.rewrite(state.base)


def summary_of(text: str) -> str:
    """What a summary says, with or without its tags.

    >>> summary_of("<think> hm </think> <summary> Ada lives in Oslo. </summary>")
    'Ada lives in Oslo.'
    """
    said = text.rpartition("</think>")[2]
    match = SUMMARY.search(said)
    return (match.group(1) if match else said).strip()

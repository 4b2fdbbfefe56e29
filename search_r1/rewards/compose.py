"""The reward of a trajectory: a weighted sum of components, each logged on its own.

Only what the policy wrote is read: not the prompt with its `<answer>` example, not what stands in `<information>`.
"""

import random
import re
from typing import Any, ClassVar

from search_r1.rewards.matching import exact_match, extract_answer, f1, gold_answers, substring_match
from verl.agent import Row, Source, Trajectory, context_digest
from verl.utils.config import Config

NO_TAG = r"(?:(?!</?(?:think|search|information|answer)>).)*"
TURN = re.compile(rf"\s*<think>{NO_TAG}</think>\s*<(search|answer)>{NO_TAG}</\1>\s*", re.DOTALL)


class SearchRewardConfig(Config):
    em: float = 1.0
    """Weight of exact match, the paper's reward."""
    f1: float = 0.0
    """Weight of token F1."""
    format: float = 0.0
    """Weight of well-formed turns: each one `<think>`, then one `<search>` or, in the last turn, one `<answer>`."""
    random: float = 0.0
    """Weight of a coin flip per trajectory: a control that must teach nothing."""


class SearchReward:
    """`score` and the components `em`, `f1`, `sub_em`, `format`, `answered`, and `random` where it has a weight."""

    Config: ClassVar = SearchRewardConfig

    def __init__(self, config: SearchRewardConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer

    def __call__(self, trajectory: Trajectory, row: Row) -> dict[str, float]:
        turns = [
            self.tokenizer.decode(s.token_ids, skip_special_tokens=True)
            for s in trajectory.segments
            if s.source is Source.MODEL
        ]
        answer = next((found for turn in reversed(turns) if (found := extract_answer(turn)) is not None), None)
        golds = gold_answers(row["reward_model"]["ground_truth"])
        text = answer or ""
        parts = {
            "em": exact_match(text, golds) if answer is not None else 0.0,
            "f1": f1(text, golds),
            "sub_em": substring_match(text, golds) if answer is not None else 0.0,
            "format": format_score(turns),
            "answered": float(answer is not None),
        }
        weights = self.config
        score = weights.em * parts["em"] + weights.f1 * parts["f1"] + weights.format * parts["format"]
        if weights.random:
            parts["random"] = coin(trajectory)
            score += weights.random * parts["random"]
        return {"score": score, **parts}


def format_score(turns: list[str]) -> float:
    """Share of well-formed turns; 0 unless the last one answers."""
    kinds = [match.group(1) if (match := TURN.fullmatch(turn)) else None for turn in turns]
    if not kinds or kinds[-1] != "answer":
        return 0.0
    return sum(kind is not None for kind in kinds) / len(kinds)


def coin(trajectory: Trajectory) -> float:
    """0 or 1, reproducible: seeded by the trajectory's tokens and by the weights that wrote them.

    Tokens alone would reward the same words at every step, which can be learned.
    """
    versions = [s.policy_version for s in trajectory.segments]
    return float(random.Random(f"{context_digest(trajectory.token_ids)} {versions}").random() < 0.5)

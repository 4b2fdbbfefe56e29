"""The components of a reward: pure functions of an episode and the keys of `reward`.

Each names the paper that it is from. The weights are applied in `compose.py`.
"""

import math
import re
from collections.abc import Sequence
from functools import cache

from search_r1.rewards import matching
from search_r1.rewards.config import SearchRewardConfig
from search_r1.rewards.episode import Episode
from search_r1.trajectory import num_repeated

IKEA_BONUS = (0.6, 0.4, 0.2, 0.0)
"""IKEA's bonus for a right answer, by the number of searches."""
PARTLY_RIGHT = 0.8
"""What Search-P1 gives at most for a wrong answer that is partly right."""


def em(e: Episode, config: SearchRewardConfig) -> float:
    """Exact match of the answer (Search-R1, 2503.09516): the paper's reward."""
    return matching.exact_match(e.answer, e.golds) if e.answer is not None else 0.0


def sub_em(e: Episode, config: SearchRewardConfig) -> float:
    """1 where a gold answer occurs in the answer."""
    return matching.substring_match(e.answer, e.golds) if e.answer is not None else 0.0


def f1(e: Episode, config: SearchRewardConfig) -> float:
    """Token F1 of the answer; 0 without one."""
    return matching.f1(e.answer or "", e.golds)


def f1_above(e: Episode, config: SearchRewardConfig) -> float:
    """1 where token F1 reaches the threshold."""
    return float(f1(e, config) >= config.f1_threshold)


def soft_em(e: Episode, config: SearchRewardConfig) -> float:
    """1 for an exact match, else 0.8 times token F1 (Search-P1, 2602.22576).

    There a language model says how right a wrong answer is, and pays up to 0.2 more for the quality
    of the reasoning; token F1 stands for the one, and for the other nothing does.
    """
    return 1.0 if em(e, config) else PARTLY_RIGHT * f1(e, config)


def balanced_f1(e: Episode, config: SearchRewardConfig) -> float:
    """Token F1; -1 without an answer, or where a tag stands alone (DeepResearcher, 2504.03160).

    Tags are those of thoughts, calls, results and the answer, over all turns together. Words that
    an answer repeats count as often as they stand there, as in every F1 here; the paper's code
    compares sets of words.
    """
    names = ("think", "answer", *e.call_tags, *e.result_tags)
    text = "".join(e.turns)
    if e.answer is None or not all(is_balanced(text, name) for name in names):
        return -1.0
    return f1(e, config)


def is_balanced(text: str, name: str) -> bool:
    """Whether a tag opens and closes in turn.

    >>> is_balanced("<a> </a> <a> </a>", "a"), is_balanced("</a> <a>", "a")
    (True, False)
    """
    found = re.findall(rf"</?{re.escape(name)}>", text)
    return found == [f"<{name}>", f"</{name}>"] * (len(found) // 2)


def no_search(e: Episode, config: SearchRewardConfig) -> float:
    """1 where no search was executed.

    With weight -0.1 it is a penalty of F1+ (Search-R1++, 2602.19526).
    """
    return float(e.searches == 0)


def no_answer(e: Episode, config: SearchRewardConfig) -> float:
    """1 where no answer was given. With weight -0.1 it is the other penalty of F1+."""
    return float(e.answer is None)


@cache
def turn_patterns(
    call_tags: tuple[str, ...], result_tags: tuple[str, ...]
) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Two patterns: of a well-formed turn, and of a turn that calls a tool inside `<think>`.

    The first group that matches is the tag in which the turn acts. A turn may hold several calls;
    where a format has no tags, whatever follows the thought is taken for one.
    """
    tags = "|".join(["think", "answer", *call_tags, *result_tags])
    calls = "|".join(call_tags)
    text = rf"(?:(?!</?(?:{tags})>).)*"
    call = rf"(?:<({calls})>{text}</\1>\s*)+" if calls else rf"()(?=\S){text}"
    turn = rf"\s*<think>{text}</think>\s*(?:{call}|<(answer)>{text}</answer>)\s*"
    nested = rf"\s*<think>{text}<({calls})>{text}</\1>\s*(?:{text}</think>)?\s*"
    return re.compile(turn, re.DOTALL), re.compile(nested, re.DOTALL)


def turn_kinds(e: Episode, nested: bool) -> list[str | None]:
    """The tag in which each turn acts, such as `search` or `answer`; None for a malformed turn.

    With `nested` a turn may also call a tool inside `<think>`.
    """
    pattern, nested_pattern = turn_patterns(e.call_tags, e.result_tags)
    kinds: list[str | None] = []
    for turn in e.turns:
        match = pattern.fullmatch(turn)
        if match is None and nested:
            match = nested_pattern.fullmatch(turn)
        kinds.append(match[match.lastindex or 1] if match else None)
    return kinds


def format_share(e: Episode, config: SearchRewardConfig) -> float:
    """Share of well-formed turns; 0 unless the last turn answers."""
    kinds = turn_kinds(e, config.nested_search)
    if not kinds or kinds[-1] != "answer":
        return 0.0
    return sum(kind is not None for kind in kinds) / len(kinds)


def is_well_formed(e: Episode, nested: bool = False) -> bool:
    """Whether every turn but the last thinks and calls a tool, and the last thinks and answers.

    These are the responses that the state machine of 2505.15117 accepts.
    """
    kinds = turn_kinds(e, nested)
    if not kinds or kinds[-1] != "answer":
        return False
    return all(kind is not None and kind != "answer" for kind in kinds[:-1])


def retrieval(e: Episode, config: SearchRewardConfig) -> float:
    """1 where a retrieved passage holds a gold answer, both normalised (2505.15117).

    An `<information>` block that the policy wrote itself does not count.
    """
    texts = [text for passages in e.passages for text in passages]
    return float(matching.holds_gold(texts, e.golds))


def em_format(e: Episode, config: SearchRewardConfig) -> float:
    """Exact match with format (2505.15117, the released score table).

    The scores, with the three `*_score` keys of `reward`:
    - right and well-formed: 1; right but malformed: 1 - structure_format_score;
    - wrong but well-formed: structure_format_score, plus retrieval_score where a passage held a
      gold answer; wrong and malformed: final_format_score;
    - no answer: 0.
    """
    structure = config.structure_format_score
    if is_well_formed(e, config.nested_search):
        if em(e, config):
            return 1.0
        return structure + config.retrieval_score * retrieval(e, config)
    if e.answer is None:
        return 0.0
    return 1.0 - structure if em(e, config) else config.final_format_score


def ikea(e: Episode, config: SearchRewardConfig) -> float:
    """IKEA's reward (2505.07596): a right answer earns more, the fewer searches it took.

    Malformed: -1. Right: 1, plus 0.6, 0.4 or 0.2 after 0, 1 or 2 searches. Wrong: 0.05 after a
    search, else 0.
    """
    if not is_well_formed(e):
        return -1.0
    if em(e, config):
        return 1.0 + IKEA_BONUS[min(e.searches, 3)]
    return 0.05 if e.searches else 0.0


def otc_ppo(e: Episode, config: SearchRewardConfig) -> float:
    """OTC's reward (2504.14870), PPO form.

    cos(m pi / (2m + c)) for m searches where the answer is right, else 0.
    """
    m = e.searches
    return math.cos(m * math.pi / (2 * m + config.otc_c)) if em(e, config) else 0.0


def otc_grpo(searches: Sequence[int], right: Sequence[bool], c: float) -> list[float]:
    """OTC's rewards (2504.14870), GRPO form, of the trajectories of a group.

    n is the smallest number of searches of a right trajectory. A right trajectory with m searches
    gets 1 if m = n = 0, cos(m pi / (2m + c)) if only n = 0, and else sin(f pi / (2n)) with
    f = 2nm / (m + n). A wrong one gets 0.
    """
    n = min((m for m, ok in zip(searches, right, strict=True) if ok), default=0)

    def share(m: int) -> float:
        if n == 0:
            return math.cos(m * math.pi / (2 * m + c)) if m else 1.0
        return math.sin(2 * n * m / (m + n) * math.pi / (2 * n))

    return [share(m) if ok else 0.0 for m, ok in zip(searches, right, strict=True)]


def repeated_query(e: Episode, config: SearchRewardConfig) -> float:
    """Share of the searches of a trajectory whose query, normalised, repeats an earlier one."""
    return num_repeated(e.queries) / len(e.queries) if e.queries else 0.0


def is_charged(e: Episode, config: SearchRewardConfig) -> bool:
    """Whether a trajectory pays for its calls.

    By default only a right one does: where all answers of a group are wrong, a price would teach
    nothing but to call less.
    """
    return config.price_when == "always" or em(e, config) == 1


def call_price(e: Episode, config: SearchRewardConfig, tool: str) -> float:
    """Calls of a tool that are charged."""
    return float(e.use_of(tool).calls) if is_charged(e, config) else 0.0


def token_price(e: Episode, config: SearchRewardConfig, tool: str) -> float:
    """Tokens of a tool's observations that are charged."""
    return float(e.use_of(tool).tokens) if is_charged(e, config) else 0.0


def tool_used(e: Episode, config: SearchRewardConfig, tool: str) -> float:
    """1 where a tool was called."""
    return float(e.use_of(tool).calls > 0)


def tool_errors(e: Episode, config: SearchRewardConfig, tool: str) -> float:
    """Calls of a tool that the policy got wrong."""
    return float(e.use_of(tool).errors)


def overlong(e: Episode, config: SearchRewardConfig) -> float:
    """DAPO's soft punishment of length (2503.14476, equation 13), over the policy's own tokens.

    It is 0 up to `limit - buffer` tokens, falls linearly to -1 at `limit`, and stays -1 beyond.
    """
    harmless = config.overlong_limit - config.overlong_buffer
    excess = (e.own_tokens - harmless) / config.overlong_buffer
    return -min(1.0, max(0.0, excess))

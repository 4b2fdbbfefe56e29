"""The components of a reward: pure functions of an episode, each with its source. Weights are the
caller's."""

import math
import re
from collections.abc import Sequence

from search_r1.rewards.episode import Episode
from search_r1.rewards.matching import exact_match, f1, normalize_answer, substring_match

TAG = r"</?(?:think|search|information|answer)>"
NO_TAG = rf"(?:(?!{TAG}).)*"
THINK = rf"<think>{NO_TAG}</think>"
TURN = re.compile(rf"\s*{THINK}\s*<(search|answer)>{NO_TAG}</\1>\s*", re.DOTALL)
NESTED_TURN = re.compile(
    rf"\s*<think>{NO_TAG}<search>{NO_TAG}</search>\s*(?:{NO_TAG}</think>)?\s*", re.DOTALL
)
BONUS = (0.6, 0.4, 0.2, 0.0)


def em(e: Episode) -> float:
    """Exact match of the answer (Search-R1, 2503.09516): the paper's reward."""
    return exact_match(e.answer, e.golds) if e.answer is not None else 0.0


def sub_em(e: Episode) -> float:
    """A gold answer occurs in the answer."""
    return substring_match(e.answer, e.golds) if e.answer is not None else 0.0


def token_f1(e: Episode) -> float:
    """Token F1 of the answer; 0 without one."""
    return f1(e.answer or "", e.golds)


def f1_above(e: Episode, threshold: float) -> float:
    """1 where token F1 reaches the threshold."""
    return float(token_f1(e) >= threshold)


def no_search(e: Episode) -> float:
    """1 where no search was executed. With weight -0.1 a penalty of F1+ (Search-R1++,
    2602.19526)."""
    return float(e.searches == 0)


def no_answer(e: Episode) -> float:
    """1 where no answer was given. With weight -0.1 the other penalty of F1+."""
    return float(e.answer is None)


def turn_kinds(e: Episode, nested: bool) -> list[str | None]:
    """`search` or `answer` for each well-formed turn, else None. `nested`: a search may stand in
    `<think>`."""
    kinds: list[str | None] = []
    for turn in e.turns:
        if match := TURN.fullmatch(turn):
            kinds.append(match.group(1))
        else:
            kinds.append("search" if nested and NESTED_TURN.fullmatch(turn) else None)
    return kinds


def format_share(e: Episode, nested: bool = False) -> float:
    """Share of well-formed turns; 0 unless the last one answers."""
    kinds = turn_kinds(e, nested)
    if not kinds or kinds[-1] != "answer":
        return 0.0
    return sum(kind is not None for kind in kinds) / len(kinds)


def is_well_formed(e: Episode, nested: bool = False) -> bool:
    """Every turn thinks and searches, the last one thinks and answers (2505.15117: a state machine
    over a response)."""
    kinds = turn_kinds(e, nested)
    return bool(kinds) and kinds[-1] == "answer" and all(kind == "search" for kind in kinds[:-1])


def retrieval_hit(e: Episode) -> float:
    """1 where a passage holds a gold answer, both normalised (2505.15117).

    Reads what the retriever brought, not what the policy wrote into an `<information>` of its own.
    A gold answer without a word is in no passage.
    """
    golds = [gold for g in e.golds if (gold := normalize_answer(g))]
    texts = [normalize_answer(passage) for passages in e.passages for passage in passages]
    return float(any(gold in text for gold in golds for text in texts))


def em_format(
    e: Episode, structure: float, final: float, retrieval: float, nested: bool = False
) -> float:
    """Exact match with format (2505.15117, the released score table).

    Right and well-formed 1, right but malformed 1 - structure, wrong and well-formed structure (+
    retrieval where a passage held the answer), wrong and malformed final, no answer 0.
    """
    if is_well_formed(e, nested):
        return 1.0 if em(e) else structure + retrieval * retrieval_hit(e)
    if e.answer is None:
        return 0.0
    return 1.0 - structure if em(e) else final


def ikea(e: Episode) -> float:
    """IKEA (2505.07596): malformed -1; right 1 + .6, .4, .2, 0 for 0, 1, 2, 3+ searches; wrong .05
    if it searched."""
    if not is_well_formed(e):
        return -1.0
    if em(e):
        return 1.0 + BONUS[min(e.searches, 3)]
    return 0.05 if e.searches else 0.0


def otc_ppo(e: Episode, c: float) -> float:
    """OTC (2504.14870), PPO form: cos(m pi / (2m + c)) for m searches where the answer is right,
    else 0."""
    return math.cos(e.searches * math.pi / (2 * e.searches + c)) if em(e) else 0.0


def otc_grpo(searches: Sequence[int], right: Sequence[bool], c: float) -> list[float]:
    """OTC (2504.14870), GRPO form, of the trajectories of a group: n is the fewest searches of a
    right one.

    A right one with m searches gets 1 for m = n = 0, cos(m pi / (2m + c)) for n = 0, else sin(f pi
    / (2n)) with f = 2nm / (m + n).
    """
    n = min((m for m, ok in zip(searches, right, strict=True) if ok), default=0)

    def share(m: int) -> float:
        if n == 0:
            return math.cos(m * math.pi / (2 * m + c)) if m else 1.0
        return math.sin(2 * n * m / (m + n) * math.pi / (2 * n))

    return [share(m) if ok else 0.0 for m, ok in zip(searches, right, strict=True)]


def repeated_query(e: Episode) -> float:
    """Share of the searches whose query, normalised, was asked before in the same trajectory."""
    normal = [normalize_answer(query) for query in e.queries]
    return (len(normal) - len(set(normal))) / len(normal) if normal else 0.0


def overlong(e: Episode, limit: int, buffer: int) -> float:
    """DAPO's soft punishment of length (2503.14476, equation 13), over the policy's own tokens: 0
    up to `limit - buffer`, from there falling to -1 at `limit`, and -1 beyond."""
    return -min(1.0, max(0.0, (e.own_tokens - (limit - buffer)) / buffer))

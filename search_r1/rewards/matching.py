"""Answers compared with gold answers: exact match, substring, F1.

Both are normalised as in SQuAD (Rajpurkar et al. 2016).
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from search_r1.agent.actions import ANSWER
from verl.utils.answers import answers_of

ARTICLE = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """`text` in lower case, without ASCII punctuation, articles and superfluous white space.

    >>> normalize_answer("The U.S.A. - a  Test"), normalize_answer("well-known")
    ('usa test', 'wellknown')
    """
    return " ".join(ARTICLE.sub(" ", text.lower().translate(PUNCTUATION)).split())


def extract_answer(text: str) -> str | None:
    """The content of the last complete `<answer>` in `text`, None without one."""
    answers = ANSWER.findall(text)
    return answers[-1].strip() if answers else None


def last_answer(turns: Sequence[str]) -> str | None:
    """The last complete `<answer>` that stands within one turn, None without one."""
    return next(
        (found for turn in reversed(turns) if (found := extract_answer(turn)) is not None), None
    )


def gold_answers(ground_truth: object) -> list[str]:
    """The accepted answers of a row's `reward_model.ground_truth`.

    It is a text, a number, a list of these, or one of the former under the key `target`. Raises
    ValueError for anything nested deeper.
    """
    if isinstance(ground_truth, dict) and "target" in ground_truth:
        return answers_of(ground_truth["target"])
    return answers_of(ground_truth)


def exact_match(prediction: str, golds: Iterable[str]) -> float:
    """1 if the prediction equals a gold answer after normalisation, else 0."""
    return float(normalize_answer(prediction) in {normalize_answer(g) for g in golds})


def substring_match(prediction: str, golds: Iterable[str]) -> float:
    """1 if a gold answer occurs in the prediction after normalisation, else 0.

    As in the original, a gold answer of punctuation alone ("---") occurs in everything.
    """
    text = normalize_answer(prediction)
    return float(any(normalize_answer(g) in text for g in golds))


def holds_gold(texts: Iterable[str], golds: Iterable[str]) -> bool:
    """Whether a gold answer occurs in one of the texts, all normalised.

    A gold answer that is empty after normalisation occurs in no text.
    """
    normal_golds = [normal for gold in golds if (normal := normalize_answer(gold))]
    normal_texts = [normalize_answer(text) for text in texts]
    return any(gold in text for gold in normal_golds for text in normal_texts)


def stands_in(answer: str, text: str) -> bool:
    """Whether an answer stands in a text in whole words, both normalised as rewards do.

    >>> stands_in("the Tide", "Tide, 1947"), stands_in("194", "Tide, 1947"), stands_in("-", "a - b")
    (True, False, False)
    """
    words = normalize_answer(answer)
    return bool(words) and f" {words} " in f" {normalize_answer(text)} "


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Best token F1 against the gold answers, in [0, 1]."""
    return max(
        (_f1(normalize_answer(prediction).split(), normalize_answer(g).split()) for g in golds),
        default=0.0,
    )


def _f1(prediction: list[str], gold: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * common / (len(prediction) + len(gold)) if common else 0.0

"""Components of a reward that are paid to the turn that earned them.

Pure functions of an episode. Each gives a value for each of the trajectory's turns; the component
of the trajectory, which is logged, is their sum.
"""

import random
from collections.abc import Iterable

from search_r1.rewards.episode import Episode
from search_r1.rewards.matching import normalize_answer
from search_r1.trajectory import GoldPassages, Search


def new_evidence(e: Episode) -> list[float]:
    """The share of the gold passages that a turn found and no earlier one had found.

    Opened pages do not count. This is the information gain of StepSearch (2505.15107), where the
    similarity of a passage to a gold passage is 1 if it is that passage and else 0. Over the turns
    it adds up to the share of the evidence that was found.
    """
    if e.gold is None or not e.gold.names:
        return [0.0] * len(e.searches_by_turn)
    known = found_by(e.gold, e.searches_before)
    gains: list[float] = []
    for searches in e.searches_by_turn:
        found = found_by(e.gold, searches)
        gains.append(len(found - known) / len(e.gold.names))
        known |= found
    return gains


def found_by(gold: GoldPassages, searches: Iterable[Search]) -> frozenset[str]:
    """The names of the gold passages that searches found."""
    return frozenset().union(*(gold.found_in(search.passages) for search in searches))


def path(e: Episode) -> list[float]:
    """What each turn adds to the score of the path, or takes from it (Search-P1, 2602.22576).

    With a reference path of n steps, of which c were taken, in whatever order, by m actions,

        S_ref = c / n * min(1, c / m)

    Here the steps are the gold passages, one is taken where a search finds it, and actions are
    searches. A turn is paid S_ref after it minus S_ref before it: one that finds nothing new costs
    something where a step was taken before. Over the turns it adds up to the score of the path,
    less that of what the agent had found before the first turn.

    The paper lets a language model write the reference path beforehand and match actions with its
    steps, and takes the larger one of S_ref and of the same figure over the plan that the policy
    states itself; gold passages need no model, and no plan is read. The bound of 1 is ours: a
    search may find two passages.
    """
    if e.gold is None or not e.gold.names:
        return [0.0] * len(e.searches_by_turn)
    taken = found_by(e.gold, e.searches_before)
    actions = len(e.searches_before)
    score = path_score(len(taken), len(e.gold.names), actions)
    paid: list[float] = []
    for searches in e.searches_by_turn:
        taken |= found_by(e.gold, searches)
        actions += len(searches)
        before, score = score, path_score(len(taken), len(e.gold.names), actions)
        paid.append(score - before)
    return paid


def path_score(taken: int, steps: int, actions: int) -> float:
    """The score of a path of so many actions that took so many of the steps.

    >>> path_score(1, 2, 1), path_score(2, 2, 4), path_score(2, 2, 1), path_score(0, 2, 0)
    (0.5, 0.5, 1.0, 0.0)
    """
    return taken / steps * min(1.0, taken / actions) if actions else 0.0


def redundancy(e: Episode) -> list[float]:
    """The share of a turn's passages that an earlier turn had found (StepSearch's penalty)."""
    known = {text for search in e.searches_before for text in search.texts}
    shares: list[float] = []
    for searches in e.searches_by_turn:
        found = [text for search in searches for text in search.texts]
        repeated = sum(text in known for text in found)
        shares.append(repeated / len(found) if found else 0.0)
        known.update(found)
    return shares


def repeated_search(e: Episode) -> list[float]:
    """The searches of a turn whose query, normalised, was asked before."""
    asked = {normalize_answer(search.query) for search in e.searches_before}
    repeated: list[float] = []
    for searches in e.searches_by_turn:
        count = 0
        for query in (normalize_answer(search.query) for search in searches):
            count += query in asked
            asked.add(query)
        repeated.append(float(count))
    return repeated


def coins(e: Episode, coin: random.Random) -> list[float]:
    """0 or 1 by chance for each turn that searched, 0 for the others."""
    flips = [float(coin.random() < 0.5) for _ in e.searches_by_turn]
    return [
        flip if searches else 0.0 for flip, searches in zip(flips, e.searches_by_turn, strict=True)
    ]

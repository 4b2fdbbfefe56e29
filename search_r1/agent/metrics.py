"""The search task's metrics of a batch, under the original's names where it has them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from search_r1.trajectory import gold_passages, read_passages
from verl.agent import Trajectory

Stats = dict[str, Any]
"""The `info` of a trajectory (`AgentData.facts`)."""
OVERRUN_KINDS = {"newline": "\n", "tag": "<"}


def reduce_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The metrics `env/...`: turns, actions, searches, latencies, recall, stop reasons."""
    stats = [t.info for t in trajectories]
    metrics = _actions(stats)
    metrics |= _scheduled(stats)
    metrics |= _stop_reasons(trajectories)
    metrics |= _overruns(stats)
    metrics |= _latency(stats)
    metrics |= _errors(stats)
    metrics |= _tools(stats)
    metrics |= _departures(stats)
    metrics |= _folds(stats)
    metrics |= _by_hops(stats)
    metrics |= _recall(trajectories)
    return {name: float(value) for name, value in metrics.items()}


def _actions(stats: list[Stats]) -> dict[str, float]:
    """Turns, valid actions and searches of a trajectory, and observations that were cut."""
    turns = np.array([s["turns"] for s in stats], dtype=float)
    valid = np.array([s["valid_actions"] for s in stats], dtype=float)
    searches = np.array([s["searches"] for s in stats], dtype=float)
    cut = sum(s["cut"] for s in stats)
    return {
        "env/number_of_actions/mean": turns.mean(),
        "env/number_of_actions/max": turns.max(),
        "env/number_of_actions/min": turns.min(),
        "env/number_of_valid_action": valid.mean(),
        "env/ratio_of_valid_action": (valid / np.maximum(turns, 1)).mean(),
        "env/number_of_valid_search": searches.mean(),
        "env/observation_truncated": cut / max(1.0, searches.sum()),
    }


def _scheduled(stats: list[Stats]) -> dict[str, float]:
    """Turns that might call, and the share of noise in searches, where they follow a schedule."""
    metrics: dict[str, float] = {}
    for name in ("max_turns", "noise"):
        values = [s[name] for s in stats if name in s]
        if values:
            metrics[f"env/{name}"] = float(np.mean(values))
    return metrics


def _stop_reasons(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Shares of the trajectories that answered, and that ended for each reason."""
    counts = Counter(t.stop_reason for t in trajectories)
    metrics = {f"env/stop_reason/{r}": n / counts.total() for r, n in sorted(counts.items())}
    return {"env/finish_ratio": counts["answer"] / counts.total()} | metrics


def _overruns(stats: list[Stats]) -> dict[str, float]:
    """Turns whose last token ran past the tag, per turn, by what it brought."""
    turns = max(1, sum(s["turns"] for s in stats))
    texts = [text for s in stats for text in s["overruns"]]
    counts = {kind: sum(t.startswith(mark) for t in texts) for kind, mark in OVERRUN_KINDS.items()}
    counts["other"] = len(texts) - sum(counts.values())
    return {f"env/overrun/{kind}": count / turns for kind, count in counts.items()}


def _latency(stats: list[Stats]) -> dict[str, float]:
    seconds = [x for s in stats for x in s["latency_s"]]
    if not seconds:
        return {}
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"env/retrieval_latency_s/p50": p50, "env/retrieval_latency_s/p95": p95}


def _errors(stats: list[Stats]) -> dict[str, float]:
    """Failed attempts to search, by kind, those included that a retry made good."""
    total = sum_counts(s.get("search_errors", {}) for s in stats)
    return {
        "env/search_errors": total.total(),
        **{f"env/search_errors/{kind}": n for kind, n in total.items()},
    }


def _tools(stats: list[Stats]) -> dict[str, float]:
    """What the calls of every tool brought, and those of tools that do not exist."""
    metrics: dict[str, float] = {}
    for name in sorted({name for s in stats for name in s.get("tools", {})}):
        metrics |= _tool(name, [s["tools"][name] for s in stats if name in s.get("tools", {})])
    unknown = sum_counts(s.get("unknown_calls", {}) for s in stats)
    metrics |= {f"tool/unknown/errors/{kind}": n / len(stats) for kind, n in unknown.items()}
    failures: dict[str, Counter[str]] = defaultdict(Counter)
    for s in stats:
        for name, kinds in s.get("tool_failures", {}).items():
            failures[name].update(kinds)
    for name, kinds in sorted(failures.items()):
        metrics |= {f"tool/{name}/failures/{kind}": n for kind, n in sorted(kinds.items())}
    return metrics


def _tool(name: str, counts: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics `tool/<name>/...`: per trajectory, but for shares and times per call."""
    calls = sum(c["calls"] for c in counts)
    errors = sum_counts(c["errors"] for c in counts)
    metrics = {
        f"tool/{name}/calls": calls / len(counts),
        f"tool/{name}/errors": errors.total() / len(counts),
        f"tool/{name}/tokens": sum(c["tokens"] for c in counts) / len(counts),
        f"tool/{name}/truncated": sum(c["cut"] for c in counts) / max(1, calls),
    }
    metrics |= {f"tool/{name}/errors/{kind}": n / len(counts) for kind, n in errors.items()}
    if seconds := [x for c in counts for x in c["latency_s"]]:
        p50, p95 = np.percentile(seconds, [50, 95])
        metrics |= {f"tool/{name}/latency_s/p50": p50, f"tool/{name}/latency_s/p95": p95}
    return metrics


def sum_counts(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sum of several counts, its names in order.

    >>> sum_counts([{"b": 1}, {"a": 2, "b": 1}])
    Counter({'a': 2, 'b': 2})
    """
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return Counter(dict(sorted(total.items())))


def _folds(stats: list[Stats]) -> dict[str, float]:
    """How often contexts were folded, per trajectory, where that may happen."""
    if not any("folds" in s for s in stats):
        return {}
    return {"env/folds": sum(s.get("folds", 0) for s in stats) / len(stats)}


def _departures(stats: list[Stats]) -> dict[str, float]:
    """Trajectories that the chat template would have written otherwise, by where they depart."""
    places = [s["template_departure"] for s in stats if "template_departure" in s]
    if not places:
        return {}
    counts = Counter(place for place in places if place)
    metrics = {"env/template_departure": counts.total() / len(places)}
    return metrics | {
        f"env/template_departure/{place}": n / len(places) for place, n in sorted(counts.items())
    }


def _by_hops(stats: list[Stats]) -> dict[str, float]:
    """Executed searches per question, by the number of facts it needs, where the data says so."""
    groups: dict[int, list[float]] = defaultdict(list)
    for s in stats:
        if "hops" in s:
            groups[s["hops"]].append(s["searches"])
    return {
        f"env/number_of_valid_search/hops_{h}": float(np.mean(n)) for h, n in sorted(groups.items())
    }


def _recall(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Share of the gold passages that were seen, and of the questions of which all were.

    Both over the questions whose gold passages the data name.
    """
    shares = []
    for trajectory in trajectories:
        gold = gold_passages(trajectory.info)
        if gold.names:
            found = gold.found_in(read_passages(trajectory))
            shares.append(len(found) / len(gold.names))
    if not shares:
        return {}
    return {
        "env/gold_recall": float(np.mean(shares)),
        "env/gold_retrieved": float(np.mean(np.equal(shares, 1))),
    }

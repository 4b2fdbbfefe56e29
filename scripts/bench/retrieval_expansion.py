"""What expanding queries (RM3) and documents (neighbours) does to BM25 on Cranfield and SciFact.

    python scripts/bench/retrieval_expansion.py tune --data DATA
    python scripts/bench/retrieval_expansion.py measure --data DATA --rows ROWS.jsonl

DATA holds `cranfield/` (TREC XML) and `scifact_beir/` (BEIR). `tune` tries the settings of document
expansion on every second query of Cranfield. `measure` takes the best ones, which are the defaults,
and the published ones of RM3, to the queries held out, which are the others of Cranfield and all of
SciFact, and to all: nDCG@10 and recall@100, the differences to BM25 with 95 % paired
bootstrap intervals over queries, and the processor time of a search as a ratio to BM25's. Indexes
are made in --work (default: runs/bench/expansion).
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retrieval_quality import Qrels, Queries, cranfield, measures, prepare, say, scifact

from search_r1.evaluation.scores import compare
from search_r1.search.engine import Retriever
from search_r1.search.engines import bm25
from search_r1.search.engines.bm25.expansions import OWN_WEIGHT, Expansions
from search_r1.search.engines.bm25.feedback import Feedback, Rm3Retriever
from search_r1.search.engines.bm25.neighbours import Neighbourhood, Neighbours
from search_r1.search.index.reader import CorpusReader

DEPTH = 100
TERMS = (5, 10, 20)
OWN_WEIGHTS = (2, 4, 8)
TIMED_ROUNDS = 3
CHOSEN_TERMS = Neighbourhood().terms

Scores = dict[str, dict[str, float]]
"""By measure, the value of each query."""


class Collection(NamedTuple):
    name: str
    corpus: Path
    queries: Queries
    qrels: Qrels
    work: Path

    def index(self, lines: Sequence[tuple[str, list[str]]] = (), own_weight: int = 1) -> Retriever:
        """BM25 over the documents, expanded by the terms of `lines` where there are any."""
        folder = self.work / f"{self.name}-{len(lines)}"
        expansions = None
        if lines:
            path = self.work / f"{self.name}-expansions.jsonl"
            rows = [json.dumps({"id": id, "terms": terms}) for id, terms in lines]
            path.write_text("\n".join(rows), encoding="utf-8")
            expansions = Expansions(path, own_weight)
        bm25.build(CorpusReader(self.corpus), folder, expansions)
        return bm25.BM25Retriever(folder, self.corpus)

    def scores(self, retriever: Retriever) -> Scores:
        judged = [(id, text) for id, text in self.queries if id in self.qrels]
        found = retriever.search([text for _, text in judged], DEPTH)
        rows = {}
        for (id, _), hits in zip(judged, found, strict=True):
            rows[id] = measures([str(document["id"]) for document, _ in hits], self.qrels[id])
        return {
            "ndcg@10": {id: ndcg for id, (ndcg, _, _) in rows.items()},
            "recall@100": {id: recall for id, (_, _, recall) in rows.items()},
        }

    def neighbours(self, plain: bm25.BM25Retriever, terms: int) -> list[tuple[str, list[str]]]:
        return list(Neighbours(plain, Neighbourhood(terms=terms)))


def collections(data: Path, work: Path) -> list[Collection]:
    sets = {
        "Cranfield": cranfield(data / "cranfield"),
        "SciFact": scifact(data / "scifact_beir"),
    }
    return [
        Collection(name, prepare(work, name, documents), queries, qrels, work)
        for name, (documents, queries, qrels) in sets.items()
    ]


def half(scores: Scores, first: int) -> Scores:
    """Every second query, from the query at `first` on."""
    return {
        name: dict(itertools.islice(values.items(), first, None, 2))
        for name, values in scores.items()
    }


def means(scores: Scores) -> list[float]:
    return [sum(values.values()) / len(values) for values in scores.values()]


def tune(data: Path, work: Path) -> None:
    """Means of nDCG@10 and recall@100 on every second query of Cranfield, from the first one on."""
    say("| terms | own weight | nDCG@10 | recall@100 |")
    say("|---|---|---|---|")
    collection = collections(data, work)[0]
    plain = collection.index()
    say_means("0", "-", half(collection.scores(plain), 0))
    longest = collection.neighbours(plain, max(TERMS))
    for terms, own_weight in itertools.product(TERMS, OWN_WEIGHTS):
        lines = [(id, words[:terms]) for id, words in longest]
        scores = collection.scores(collection.index(lines, own_weight))
        say_means(str(terms), str(own_weight), half(scores, 0))


def say_means(terms: str, own_weight: str, scores: Scores) -> None:
    ndcg, recall = means(scores)
    say(f"| {terms} | {own_weight} | {ndcg:.4f} | {recall:.4f} |")


def measure(data: Path, work: Path, rows: Path) -> None:
    """Writes a row for each set, engine and part of the queries, and prints them."""
    say("| set | queries | engine | nDCG@10 | difference | recall@100 | difference | time |")
    say("|---|---|---|---|---|---|---|---|")
    written = []
    for collection in collections(data, work):
        plain = collection.index()
        lines = collection.neighbours(plain, CHOSEN_TERMS)
        expanded = collection.index(lines, OWN_WEIGHT)
        engines = {
            "bm25": plain,
            "bm25+rm3": Rm3Retriever(plain, Feedback()),
            "expanded": expanded,
            "expanded+rm3": Rm3Retriever(expanded, Feedback()),
        }
        seconds = times(engines, [text for _, text in collection.queries])
        scores = {name: collection.scores(engine) for name, engine in engines.items()}
        parts = ("all", "held out") if collection.name == "Cranfield" else ("held out",)
        for part, name in itertools.product(parts, engines):
            row = {"set": collection.name, "queries": part, "engine": name}
            is_half = part == "held out" and "all" in parts
            row |= compared(scores[name], scores["bm25"], is_half)
            row["time_ratio"] = round(seconds[name] / seconds["bm25"], 2)
            written.append(row)
            say_row(row)
    rows.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")


def compared(scores: Scores, baseline: Scores, is_half: bool) -> dict[str, Any]:
    """Mean of each measure, and its difference to the baseline with the interval of that.

    With `is_half` over the queries that `tune` does not look at.
    """
    if is_half:
        scores, baseline = half(scores, 1), half(baseline, 1)
    row = {}
    for name, values in scores.items():
        difference = compare(baseline[name], values)
        row["number"] = len(values)
        row[name] = round(sum(values.values()) / len(values), 4)
        row[f"{name} difference"] = round(difference.difference, 4)
        row[f"{name} interval"] = [round(end, 4) for end in difference.interval]
    return row


def say_row(row: dict[str, Any]) -> None:
    cells = [row["set"], f"{row['queries']} ({row['number']})", row["engine"]]
    for name in ("ndcg@10", "recall@100"):
        low, high = row[f"{name} interval"]
        difference = row[f"{name} difference"]
        cells += [f"{row[name]:.4f}", f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]"]
    say("| " + " | ".join([*cells, f"{row['time_ratio']:.2f}"]) + " |")


def times(engines: dict[str, Retriever], queries: Sequence[str]) -> dict[str, float]:
    """Least processor seconds that all queries took, one a call and three passages each.

    The engines take turns, because other work runs on the machine.
    """
    least = dict.fromkeys(engines, float("inf"))
    for _ in range(TIMED_ROUNDS):
        for name, engine in engines.items():
            began = time.process_time()
            for query in queries:
                engine.search([query], 3)
            least[name] = min(least[name], time.process_time() - began)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tune", "measure"))
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cranfield/ and scifact_beir/"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/bench/expansion"))
    parser.add_argument("--rows", type=Path, default=Path("runs/bench/expansion/rows.jsonl"))
    args = parser.parse_args()
    if args.what == "tune":
        tune(args.data, args.work)
    else:
        measure(args.data, args.work, args.rows)


if __name__ == "__main__":
    sys.exit(main())

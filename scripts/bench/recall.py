"""Does the plain question find its gold passages? Recall of a BM25 index over question files.

    python scripts/bench/recall.py --index_path INDEX/bm25 --corpus_path CORPUS.jsonl --questions
    Q.jsonl ... --topk 3

A question file is what `search_r1.data.prepare` reads, with `gold_titles` or `gold_ids`. Prints one
row per file: the mean share of its gold passages among the first `topk`, and the share of questions
with an answer in one of these.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from search_r1.data.rows import read_rows, texts
from search_r1.rewards.matching import normalize_answer
from search_r1.search.engines.bm25 import BM25Retriever


def recall(record: dict[str, Any], hits: list[Any]) -> float:
    """Share of the gold passages, by id where ids are known and else by title, that are among
    `hits`."""
    if ids := set(texts(record.get("gold_ids"))):
        return len(ids & {document["id"] for document, _ in hits}) / len(ids)
    titles = set(texts(record["gold_titles"]))
    return len(
        titles & {document["contents"].split("\n")[0].strip('"') for document, _ in hits}
    ) / len(titles)


def has_answer(answers: list[str], hits: list[Any]) -> bool:
    """Whether a passage contains an answer, both normalised."""
    passages = [f" {normalize_answer(document['contents'])} " for document, _ in hits]
    return any(
        f" {normalize_answer(answer)} " in passage for answer in answers for passage in passages
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index_path", type=Path, required=True)
    parser.add_argument("--corpus_path", type=Path, required=True)
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument("--topk", type=int, default=3)
    args = parser.parse_args()
    retriever = BM25Retriever(args.index_path, args.corpus_path)
    sys.stdout.write(
        f"| questions | n | recall@{args.topk} | answer in top {args.topk} |\n| - | - | - | - |\n"
    )
    for path in args.questions:
        records = [record for _, record in read_rows(path) if isinstance(record, dict)]
        found = retriever.search([record["question"] for record in records], args.topk)
        pairs = list(zip(records, found, strict=True))
        gold = sum(recall(r, hits) for r, hits in pairs) / len(pairs)
        answer = sum(has_answer(texts(r["answers"]), hits) for r, hits in pairs) / len(pairs)
        sys.stdout.write(f"| {path.stem} | {len(pairs)} | {gold:.3f} | {answer:.3f} |\n")


if __name__ == "__main__":
    main()

"""How well engines rank: nDCG@10, MAP and recall@100 on Cranfield and SciFact, and how far BM25
agrees with Lucene.

    python scripts/bench/retrieval_quality.py --data DATA bm25              # bm25 beside lucene
    python scripts/bench/retrieval_quality.py --data DATA dense --model ENCODER

DATA holds `cranfield/` (TREC XML) and `scifact_beir/` (BEIR). `dense` compares FAISS types on
SciFact: recall of the exact top 10, size, time per query, and nDCG@10. Indexes are made in --work
(default: runs/bench/retrieval).
"""

import argparse
import ast
import csv
import gzip
import io
import json
import math
import re
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search_r1.search.engines import bm25, lucene
from search_r1.search.index.documents import contents
from search_r1.search.index.reader import CorpusReader

Queries = list[tuple[str, str]]
Qrels = dict[str, dict[str, int]]


def cranfield(folder: Path) -> tuple[list[dict[str, str]], Queries, Qrels]:
    """1,400 abstracts, 225 queries, which the judgements number by their position."""
    text = (folder / "cran.all.1400.xml").read_text()
    documents = [
        {
            "id": field(doc, "docno").strip(),
            "contents": contents(squeeze(field(doc, "title")), squeeze(field(doc, "text"))),
        }
        for doc in re.findall(r"<doc>(.*?)</doc>", text, re.S)
    ]
    tops = re.findall(r"<title>(.*?)</title>", (folder / "cran.qry.xml").read_text(), re.S)
    queries = [(str(i), squeeze(query)) for i, query in enumerate(tops, 1)]
    return documents, queries, read_qrels(folder / "cranqrel.trec.txt")


def scifact(folder: Path) -> tuple[list[dict[str, str]], Queries, Qrels]:
    """5,183 abstracts, 300 claims."""
    with zipfile.ZipFile(folder / "scifact.zip") as archive:
        name = next(n for n in archive.namelist() if "corpus" in n)
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open(name), encoding="utf-8")))
    documents = [
        {
            "id": row["doc_id"],
            "contents": contents(row["title"], " ".join(sentences(row["abstract"]))),
        }
        for row in rows
    ]
    with gzip.open(next(folder.glob("topics*.gz")), "rt", encoding="utf-8") as file:
        queries = [(line.split("\t", 1)[0], line.rstrip("\n").split("\t", 1)[1]) for line in file]
    return documents, queries, read_qrels(next(folder.glob("qrels*")))


def sentences(printed: str) -> list[str]:
    """A printed list of strings, with or without commas between them."""
    return [
        ast.literal_eval(m[0])
        for m in re.finditer(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", printed)
    ]


def field(xml: str, name: str) -> str:
    found = re.search(rf"<{name}>(.*?)</{name}>", xml, re.S)
    return found[1] if found else ""


def squeeze(text: str) -> str:
    return " ".join(text.split())


def read_qrels(path: Path) -> Qrels:
    judged: Qrels = {}
    for line in path.read_text().splitlines():
        query, _, document, grade = line.split()
        judged.setdefault(query, {})[document] = int(grade)
    return judged


def measures(ranking: Sequence[str], judged: dict[str, int]) -> tuple[float, float, float]:
    """(nDCG@10, average precision, recall@100), as trec_eval has them; a document counts from grade
    1."""
    gains = [max(0, judged.get(d, 0)) for d in ranking]
    best = sorted((g for g in judged.values() if g > 0), reverse=True)
    if not best:
        return 0.0, 0.0, 0.0
    ideal = dcg(best[:10])
    hits = 0
    precision = 0.0
    for rank, gain in enumerate(gains, 1):
        if gain > 0:
            hits += 1
            precision += hits / rank
    return (
        dcg(gains[:10]) / ideal,
        precision / len(best),
        sum(g > 0 for g in gains[:100]) / len(best),
    )


def dcg(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def evaluate(
    retriever: Any, queries: Queries, qrels: Qrels, depth: int = 1000
) -> tuple[list[float], list[list[Any]], float]:
    """(means of the measures, hits, seconds per query)."""
    queries = [(id, text) for id, text in queries if id in qrels]
    began = time.perf_counter()
    found = retriever.search([text for _, text in queries], depth)
    seconds = (time.perf_counter() - began) / len(queries)
    rows = [
        measures([str(d["id"]) for d, _ in hits], qrels[id])
        for (id, _), hits in zip(queries, found, strict=True)
    ]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)], found, seconds


def agreement(ours: list[Any], theirs: list[Any]) -> str:
    """Same first document, overlap of the first ten (means), largest relative difference of a
    shared score."""
    first = overlap = worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        ids_a = [str(d["id"]) for d, _ in a[:10]]
        ids_b = [str(d["id"]) for d, _ in b[:10]]
        first += ids_a[:1] == ids_b[:1]
        overlap += len(set(ids_a) & set(ids_b)) / max(1, len(ids_b))
        scores = {str(d["id"]): s for d, s in b[:10]}
        gaps = [
            abs(s - scores[str(d["id"])]) / scores[str(d["id"])]
            for d, s in a[:10]
            if str(d["id"]) in scores
        ]
        worst = max([worst, *gaps])
    n = len(ours)
    return f"{first / n:.3f} | {overlap / n:.4f} | {worst:.1e}"


def prepare(work: Path, name: str, documents: list[dict[str, str]]) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{name}.jsonl"
    path.write_text(
        "".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8"
    )
    return path


def compare_bm25(data: Path, work: Path) -> None:
    say(
        "| set | engine | nDCG@10 | MAP | recall@100 | same first | overlap@10 | largest score gap "
        "|"
    )
    say("|---|---|---|---|---|---|---|---|")
    for name, (documents, queries, qrels) in {
        "Cranfield": cranfield(data / "cranfield"),
        "SciFact": scifact(data / "scifact_beir"),
    }.items():
        corpus = prepare(work, name, documents)
        bm25.build(CorpusReader(corpus), work / f"{name}-bm25")
        lucene.build(CorpusReader(corpus), work / f"{name}-lucene", threads=1)
        theirs, reference, _ = evaluate(
            lucene.LuceneRetriever(work / f"{name}-lucene", None), queries, qrels
        )
        ours, found, _ = evaluate(bm25.BM25Retriever(work / f"{name}-bm25", corpus), queries, qrels)
        say(f"| {name} | lucene | " + " | ".join(f"{v:.4f}" for v in theirs) + " | | | |")
        say(
            "| | bm25 | "
            + " | ".join(f"{v:.4f}" for v in ours)
            + f" | {agreement(found, reference)} |"
        )


def compare_dense(data: Path, work: Path, model: str) -> None:
    from search_r1.search.engines import dense
    from search_r1.search.engines.encoder import Encoder

    documents, queries, qrels = scifact(data / "scifact_beir")
    corpus = prepare(work, "SciFact", documents)
    encoder = Encoder("dense", model)
    shards = dense.EmbeddingShards(work / "emb")
    exact = None
    queries = [(id, text) for id, text in queries if id in qrels]
    vectors = encoder.encode_queries([text for _, text in queries])
    say("| FAISS type | recall@10 of Flat | nDCG@10 | MB | ms per query, one at a time |")
    say("|---|---|---|---|---|")
    for kind in dense.TYPES:
        index = work / f"dense_{kind}.index"
        dense.build(CorpusReader(corpus), index, encoder, shards, kind, batch_size=64)
        retriever = dense.DenseRetriever(index, corpus, encoder, "dense", nprobe=16)
        quality, _, _ = evaluate(retriever, queries, qrels, depth=100)
        began = time.perf_counter()
        places = [retriever.index.search(vector[None], 10)[1][0] for vector in vectors]
        milliseconds = (time.perf_counter() - began) / len(vectors) * 1000
        exact = exact or places
        recall = sum(len(set(a) & set(b)) / 10 for a, b in zip(places, exact, strict=True)) / len(
            places
        )
        size = (index / dense.INDEX).stat().st_size / 1e6
        say(f"| {kind} | {recall:.3f} | {quality[0]:.4f} | {size:.1f} | {milliseconds:.2f} |")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("bm25", "dense"))
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cranfield/ and scifact_beir/"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/bench/retrieval"))
    parser.add_argument("--model", help="dense: a sentence-transformers encoder")
    args = parser.parse_args()
    if args.what == "bm25":
        compare_bm25(args.data, args.work)
    else:
        compare_dense(args.data, args.work, args.model)


if __name__ == "__main__":
    main()

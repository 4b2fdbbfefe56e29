"""BM25 beside Lucene over the same passages in the same run: queries per second and latency by
number of clients.

    python scripts/bench/retrieval_beside_lucene.py --corpus C.jsonl --queries Q.jsonl

Both servers stay up; for each number of clients they are measured in turn, --rounds times, so that
whatever else runs on the machine disturbs both. Every client keeps one connection, each query is
different, the cache is off. Q.jsonl has a `question` a line. `none` is without HTTP: the engine in
this process, 64 queries a call. Indexes are made in --work.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from retrieval_load import ROOT, Load, run_clients, server

from search_r1.search.engines.load import load
from search_r1.search.retrieval_server import parse_arguments

ENGINES = ("bm25", "lucene")


def prepare(engine: str, corpus: Path, work: Path) -> list[str]:
    """The server's flags for the engine, its index built if it is not there."""
    build = ["--retrieval_method", engine, "--corpus_path", str(corpus), "--save_dir", str(work)]
    subprocess.run(
        [sys.executable, "-m", "search_r1.search.index_builder", *build], check=True, cwd=ROOT
    )
    return [
        "--retriever_name",
        engine,
        "--index_path",
        str(work / engine),
        "--corpus_path",
        str(corpus),
    ]


def unique(texts: list[str]) -> Iterator[str]:
    """The questions over and over, each time with another number."""
    return (f"{text} {turn}" for turn in itertools.count() for text in texts)


def engines_alone(
    flags: dict[str, list[str]], texts: list[str], rounds: int
) -> dict[str, list[float]]:
    """Queries per second of each round by engine, without HTTP."""
    engines = {name: load(parse_arguments(f)) for name, f in flags.items()}
    queries = unique(texts)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            began = time.perf_counter()
            count = 0
            while time.perf_counter() - began < 3:
                engine.search(list(itertools.islice(queries, 64)), 3)
                count += 64
            if turn > 0:  # the first warms up
                rates[name].append(count / (time.perf_counter() - began))
    return rates


def row(what: str, name: str, rates: list[float], loads: list[Load]) -> None:
    """Prints a line of the table: the median rate, and latencies of all rounds together."""
    latencies = Load(0.0, [latency for one in loads for latency in one.latencies])
    quantiles = " | ".join(
        f"{latencies.quantile(q):.1f}" if loads else "" for q in (0.5, 0.95, 0.99)
    )
    others = sum(one.statuses.total() - one.statuses["200"] for one in loads)
    if others:
        raise RuntimeError(f"{name}, {what} clients: {others} answers were not 200")
    sys.stdout.write(f"| {what} | {name} | {statistics.median(rates):.0f} | {quantiles} |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--queries", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/bench/beside"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="per engine, round and number of clients"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    texts = [
        json.loads(line)["question"]
        for path in args.queries
        for line in path.open(encoding="utf-8")
    ]
    flags = {name: prepare(name, args.corpus, args.work) for name in ENGINES}
    sys.stdout.write(
        "| clients | engine | q/s | p50 ms | p95 ms | p99 ms |\n|---|---|---|---|---|---|\n"
    )
    ratios = {}
    with server(flags["bm25"]) as ours, server(flags["lucene"]) as theirs:
        ports = dict(zip(ENGINES, (ours, theirs), strict=True))
        queries = unique(texts)
        for port in ports.values():
            asyncio.run(run_clients(port, 4, queries, 4.0))  # warm-up
        for count in args.clients:
            loads: dict[str, list[Load]] = {name: [] for name in ENGINES}
            for _ in range(args.rounds):
                for name, port in ports.items():
                    loads[name].append(asyncio.run(run_clients(port, count, queries, args.seconds)))
            rates = {
                name: [one.statuses["200"] / one.seconds for one in loads[name]] for name in ENGINES
            }
            for name in ENGINES:
                row(str(count), name, rates[name], loads[name])
            pairs = zip(rates["bm25"], rates["lucene"], strict=True)
            ratios[f"{count} clients"] = [ours / theirs for ours, theirs in pairs]
    alone = engines_alone(flags, texts, args.rounds)
    for name in ENGINES:
        row("none", name, alone[name], [])
    ratios["no HTTP"] = [
        ours / theirs for ours, theirs in zip(alone["bm25"], alone["lucene"], strict=True)
    ]
    for what, values in ratios.items():
        shown = ", ".join(f"{value:.2f}" for value in sorted(values))
        sys.stdout.write(
            f"{what}: bm25 / lucene = {statistics.median(values):.2f} (rounds: {shown})\n"
        )


if __name__ == "__main__":
    main()

"""Latency of `/open` and `/find` beside `/retrieve`, over one server with a BM25 index.

    python scripts/bench/retrieval_documents.py --passages 100000 --work DIR

The corpus is synthetic: 100 words a passage, drawn from 50,000 by Zipf's law, ten passages a title.
One client asks one request after the other on one connection, the three kinds in turn, so that what
else the machine does falls on all of them alike. Queries are three words of a passage, `/open` asks
a page of a document, `/find` two words that stand next to each other in one. Every request is
another one, and caches are off.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np

from search_r1.launch import free_port
from search_r1.search.engines import bm25

ROOT = Path(__file__).resolve().parents[2]
WORDS = 50_000
PASSAGES_PER_TITLE = 10


def write_corpus(path: Path, count: int) -> list[list[str]]:
    """Writes so many passages; returns their words."""
    rng = np.random.default_rng(0)
    drawn = (rng.zipf(1.2, size=(count, 100)) - 1) % WORDS
    passages = [[f"w{word}" for word in row] for row in drawn.tolist()]
    with path.open("w", encoding="utf-8") as file:
        for i, words in enumerate(passages):
            title = f"Title {i // PASSAGES_PER_TITLE}"
            row = {"id": str(i), "contents": f'"{title}"\n{" ".join(words)}.'}
            file.write(json.dumps(row) + "\n")
    return passages


def wait_until_ready(base: str, server: "subprocess.Popen[bytes]") -> None:
    """Returns when engine and documents are loaded."""
    while server.poll() is None:
        try:
            if httpx.get(f"{base}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    sys.exit("the server ended")


def ask_in_turn(base: str, passages: list[list[str]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each request, by endpoint."""
    rng = random.Random(0)
    took: dict[str, list[float]] = {"retrieve": [], "open": [], "find": []}
    with httpx.Client(trust_env=False, timeout=60) as client:
        for number in range(rounds):
            place = rng.randrange(len(passages))
            document = f"Title {place // PASSAGES_PER_TITLE}"
            words = passages[place]
            bodies = {
                "retrieve": {"queries": [" ".join(rng.sample(words, 3))], "return_scores": True},
                "open": {"document": document, "page": 1 + number % 3},
                "find": {"document": document, "text": " ".join(words[40:42])},
            }
            for endpoint, body in bodies.items():
                began = time.perf_counter()
                answer = client.post(f"{base}/{endpoint}", json=body)
                took[endpoint].append(1000 * (time.perf_counter() - began))
                if answer.status_code != 200 or answer.json().get("error"):
                    sys.exit(f"/{endpoint}: {answer.status_code} {answer.text[:200]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = args.work / "corpus.jsonl"
    passages = write_corpus(corpus, args.passages)
    if not (args.work / "bm25").exists():
        bm25.build(corpus, args.work / "bm25")
    port = free_port()
    command = [sys.executable, str(ROOT / "search_r1" / "search" / "retrieval_server.py")]
    command += ["--index_path", str(args.work / "bm25"), "--corpus_path", str(corpus)]
    command += ["--documents", "title", "--cache_size", "0", "--port", str(port)]
    began = time.perf_counter()
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(base, server)
        ready_s = time.perf_counter() - began
        ask_in_turn(base, passages, 50)
        took = ask_in_turn(base, passages, args.rounds)
    finally:
        server.terminate()
        server.wait()
    (table,) = args.work.glob("corpus.jsonl.documents-*")
    sys.stdout.write(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ")
    sys.stdout.write(f"ready in {ready_s:.1f} s, table {table.stat().st_size / 1e6:.2f} MB\n")
    base_ms = np.percentile(took["retrieve"], [50, 95])
    for endpoint, times in took.items():
        p50, p95 = np.percentile(times, [50, 95])
        ratio, ratio95 = p50 / base_ms[0], p95 / base_ms[1]
        line = f"/{endpoint}: {p50:.2f} ms, p95 {p95:.2f} ms; {ratio:.2f} and {ratio95:.2f} times"
        sys.stdout.write(f"{line} /retrieve\n")


if __name__ == "__main__":
    main()

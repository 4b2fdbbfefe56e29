"""The retrieval server under load: queries per second and latency by number of clients, batching on
and off.

    python scripts/bench/retrieval_load.py bm25 --corpus C.jsonl --queries Q.jsonl
    python scripts/bench/retrieval_load.py dense --model ENCODER --corpus C.jsonl --queries Q.jsonl

Every client keeps one connection and asks one query after the other, each query different, the
cache off. Q.jsonl has a `question` a line. Indexes are made in --work. Batching off is
`--max_batch_size 1`, in the same run.
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from search_r1.launch import free_port

ROOT = Path(__file__).resolve().parents[2]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine's servers, whatever proxy the environment names."""
CLIENTS = (1, 16, 64, 256, 1000)


@dataclass
class Load:
    """What the clients saw."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def quantile(self, q: float) -> float:
        """Milliseconds."""
        ordered = sorted(self.latencies)
        return (
            1000 * ordered[min(len(ordered) - 1, int(q * len(ordered)))]
            if ordered
            else float("nan")
        )


async def client(port: int, queries: Iterator[str], until: float, load: Load) -> None:
    """One connection, one request after the other. Written on sockets: a client library would be
    what is measured."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        body = json.dumps({"queries": [next(queries)], "topk": 3, "return_scores": True}).encode()
        began = time.perf_counter()
        writer.write(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-len")
        )
        answer = json.loads(await reader.readexactly(length))
        load.latencies.append(time.perf_counter() - began)
        status = head.split(b" ", 2)[1].decode()
        complete = status != "200" or len(answer["result"]) == 1
        load.statuses[status if complete else "wrong answer"] += 1
    writer.close()


async def run_clients(port: int, count: int, queries: Iterator[str], seconds: float) -> Load:
    load = Load(seconds)
    until = time.perf_counter() + seconds
    results = await asyncio.gather(
        *(client(port, queries, until, load) for _ in range(count)), return_exceptions=True
    )
    for result in results:
        if isinstance(result, BaseException):
            load.statuses[type(result).__name__] += 1
    return load


@contextmanager
def server(flags: list[str]) -> Iterator[int]:
    """Port of a server that is ready."""
    port = free_port()
    program = [sys.executable, str(ROOT / "search_r1" / "search" / "retrieval_server.py")]
    process = subprocess.Popen([*program, *flags, "--port", str(port), "--cache_size", "0"])
    try:
        while True:
            try:
                DIRECT.open(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit("the server ended")
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def prepare(args: argparse.Namespace) -> list[str]:
    """The server's flags for the engine, its index built if it is not there."""
    name = {"bm25": "bm25", "lucene": "lucene", "dense": "dense_Flat.index"}[args.engine]
    model = ["--device", "cpu"] if args.engine == "dense" else []
    build = [
        "--retrieval_method",
        args.engine,
        "--corpus_path",
        str(args.corpus),
        "--save_dir",
        str(args.work),
        *model,
    ]
    if args.engine == "dense":
        build += ["--model_path", args.model, "--batch_size", "64", "--max_length", "128"]
        model += ["--retriever_model", args.model, "--max_length", "64"]
    subprocess.run(
        [sys.executable, "-m", "search_r1.search.index_builder", *build], check=True, cwd=ROOT
    )
    index = ["--index_path", str(args.work / name), "--corpus_path", str(args.corpus)]
    return ["--retriever_name", args.engine, *index, *model]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=("bm25", "dense"))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--queries", type=Path, nargs="+", required=True)
    parser.add_argument("--model", help="dense: a sentence-transformers encoder")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/load"))
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--seconds", type=float, default=10.0, help="per row (default: 10)")
    args = parser.parse_args()
    texts = [
        json.loads(line)["question"]
        for path in args.queries
        for line in path.open(encoding="utf-8")
    ]
    flags = prepare(args)
    modes = {"on": [], "off": ["--max_batch_size", "1"]}
    sys.stdout.write(
        "| clients | batching | q/s | p50 ms | p95 ms | p99 ms | answers "
        "|\n|---|---|---|---|---|---|---|\n"
    )
    rates: dict[tuple[int, str], float] = {}
    for mode, extra in modes.items():
        with server([*flags, *extra]) as port:
            unique = (f"{text} {turn}" for turn in itertools.count() for text in texts)
            asyncio.run(run_clients(port, 4, unique, 2.0))  # warm-up
            for count in args.clients:
                load = asyncio.run(run_clients(port, count, unique, args.seconds))
                rates[count, mode] = load.statuses["200"] / load.seconds
                quantiles = " | ".join(f"{load.quantile(q):.1f}" for q in (0.5, 0.95, 0.99))
                answers = ", ".join(
                    f"{n} x {status}" for status, n in sorted(load.statuses.items())
                )
                sys.stdout.write(
                    f"| {count} | {mode} | {rates[count, mode]:.0f} | {quantiles} | {answers} |\n"
                )
                sys.stdout.flush()
    for count in args.clients:
        sys.stdout.write(
            f"{count} clients: batching brings {rates[count, 'on'] / rates[count, 'off']:.2f}x\n"
        )


if __name__ == "__main__":
    main()

"""Goodput of the retrieval server under overload: requests of 64 queries from more and more clients.

    python scripts/bench/retrieval_overload.py --corpus C.jsonl --queries Q.jsonl bm25

Every client keeps one connection and one request under way, each of new queries, the server's cache off. A client that
is refused (429) sends the same request again: after what Retry-After says, or at once with --impatient. The last column
is the throughput's share of the best row. `--server` gives the server further flags, for instance
`--server="--request_timeout_s 5"`, which makes it refuse what it could not answer in five seconds.
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from retrieval_load import prepare, server

CLIENTS = (1, 4, 16, 64, 256, 1000)
WARM_UP_S = 3.0


@dataclass
class Setting:
    """What all clients of a row share."""

    port: int
    bodies: Iterator[bytes]
    num_queries: int
    impatient: bool
    counting: bool = False
    """Whether the warm-up is over."""
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One connection, one request after the other.

    Written on transports, and answers are counted, not parsed: the clients share two cores with the server, and a
    client library would be what is measured.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.answer = bytearray()
        self.awaited = 0
        self.body = b""
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        """Sends the next request."""
        self.body = next(self.setting.bodies)
        self.began = time.perf_counter()
        self.send()

    def send(self) -> None:
        if self.transport.is_closing():
            return
        head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.transport.write(head % len(self.body) + self.body)

    def data_received(self, data: bytes) -> None:
        self.answer += data
        if not self.awaited:
            end = self.answer.find(b"\r\n\r\n")
            if end < 0:
                return
            self.headers = bytes(self.answer[:end]).lower()
            self.awaited = end + 4 + int(self.header(b"content-length"))
        if len(self.answer) >= self.awaited:
            self.answered()

    def header(self, name: bytes) -> bytes:
        """Value of a header of the answer; `0` where it is not there."""
        _, found, rest = self.headers.partition(b"\r\n" + name + b":")
        return rest.split(b"\r\n", 1)[0].strip() if found else b"0"

    def answered(self) -> None:
        """Counts an answer, then asks the next request, or the refused one again."""
        status = int(self.headers.split(b" ", 2)[1])
        setting = self.setting
        if status == 200 and self.answer.count(b'"score"') < setting.num_queries:
            status = -1
        if setting.counting:
            setting.statuses[status] += 1
            if status == 200:
                setting.latencies.append(time.perf_counter() - self.began)
        wait_s = float(self.header(b"retry-after"))
        self.answer.clear()
        self.awaited = 0
        if status == 200:
            self.ask()
        elif setting.impatient:
            self.send()
        else:
            self.loop.call_later(wait_s, self.send)

    def connection_lost(self, error: Exception | None) -> None:
        if self.setting.counting:
            self.setting.statuses[0] += 1


async def run_clients(setting: Setting, clients: int, seconds: float) -> float:
    """Runs them for `seconds` after the warm-up; the seconds it took."""
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Client(setting), "127.0.0.1", setting.port) for _ in range(clients)]
    await asyncio.sleep(WARM_UP_S)
    setting.counting, began = True, time.perf_counter()
    await asyncio.sleep(seconds)
    setting.counting, took = False, time.perf_counter() - began
    for transport, _ in made:
        transport.abort()
    return took


def bodies(texts: list[str], num_queries: int) -> Iterator[bytes]:
    """Requests, no query twice."""
    queries = (f"{text} {turn}" for turn in itertools.count() for text in texts)
    while True:
        asked = list(itertools.islice(queries, num_queries))
        yield json.dumps({"queries": asked, "topk": 3, "return_scores": True}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("bm25", "lucene", "dense"))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--queries", type=Path, nargs="+", required=True)
    parser.add_argument("--model", help="dense: a sentence-transformers encoder")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/load"))
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--queries_per_request", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15.0, help="per row (default: 15)")
    parser.add_argument("--impatient", action="store_true", help="clients do not heed Retry-After")
    parser.add_argument("--server", default="", help="further flags of the server")
    args = parser.parse_args()
    texts = [json.loads(line)["question"] for path in args.queries for line in path.open(encoding="utf-8")]
    requests = bodies(texts, args.queries_per_request)
    rows = []
    with server([*prepare(args), *args.server.split()]) as port:
        for count in args.clients:
            setting = Setting(port, requests, args.queries_per_request, args.impatient)
            took = uvloop.run(run_clients(setting, count, args.seconds))
            rows.append((count, setting.statuses[200] * args.queries_per_request / took, setting, took))
            time.sleep(2.0)  # the server drops what the last clients left
    best = max(rate for _, rate, _, _ in rows)
    table = ["| clients | queries/s | p50 s | p99 s | refused/s | other answers | of the best |", "|---" * 7 + "|"]
    for count, rate, setting, took in rows:
        ordered = sorted(setting.latencies) or [float("nan")]
        p50, p99 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99))
        refused = setting.statuses[429] / took
        other = {status: n for status, n in setting.statuses.items() if status not in (200, 429)} or "none"
        table.append(f"| {count} | {rate:.0f} | {p50:.2f} | {p99:.2f} | {refused:.0f} | {other} | {rate / best:.2f} |")
    sys.stdout.write("\n".join(table) + "\n")


if __name__ == "__main__":
    main()

"""Goodput of the retrieval server under overload: requests of 64 queries from more and more
clients.

    python scripts/bench/retrieval_overload.py bm25 --corpus C.jsonl --queries Q.jsonl

Every client keeps one connection and one request under way, each of new queries, the server's cache
off. A client that is refused (429) sends the same request again: after what Retry-After says, or at
once with --impatient. The last two columns are shares of the best row: of the queries per second,
and of the queries per second of the server's processor time, which other work on the machine does
not change. `--server` gives the server further flags, for instance `--server="--request_timeout_s
5"`, which makes it refuse what it could not answer in five seconds.
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

import psutil
import uvloop
from retrieval_load import prepare, server

CLIENTS = (1, 4, 16, 64, 256, 1000)
WARM_UP_S = 8.0


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
    reconnecting: Any = None


class Client(asyncio.Protocol):
    """One connection, one request after the other.

    Written on transports, and answers are counted, not parsed: the clients share two cores with the
    server, and a client library would be what is measured.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.answer = bytearray()
        self.awaited = 0
        self.body = b""
        self.waiting = False
        """For an answer."""
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self.body:
            self.send()
        else:
            self.ask()

    def ask(self) -> None:
        """Sends the next request."""
        self.body = next(self.setting.bodies)
        self.began = time.perf_counter()
        self.send()

    def send(self) -> None:
        """Sends the request, on a new connection where the server has closed the idle one."""
        if self.transport.is_closing():
            if self.setting.counting:
                connecting = self.loop.create_connection(
                    lambda: self, "127.0.0.1", self.setting.port
                )
                self.setting.reconnecting = asyncio.ensure_future(connecting)
            return
        self.waiting = True
        head = (
            b"POST /retrieve HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
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
        self.waiting = False
        if status == 200:
            self.ask()
        elif setting.impatient:
            self.send()
        else:
            self.loop.call_later(wait_s, self.send)

    def connection_lost(self, error: Exception | None) -> None:
        if self.setting.counting and self.waiting:
            self.setting.statuses[0] += 1


async def run_clients(setting: Setting, clients: int, seconds: float) -> tuple[float, float]:
    """Runs them for `seconds` after the warm-up; the seconds it took, and those of the server's
    processor time."""
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Client(setting), "127.0.0.1", setting.port)
        for _ in range(clients)
    ]
    await asyncio.sleep(WARM_UP_S)
    setting.counting = True
    began = time.perf_counter()
    before = server_cpu_s()
    await asyncio.sleep(seconds)
    setting.counting = False
    took = time.perf_counter() - began
    used = server_cpu_s() - before
    for transport, _ in made:
        transport.abort()
    return took, used


def server_cpu_s() -> float:
    """Processor time of the server so far, in seconds."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(t.user + t.system for t in times)


def bodies(texts: list[str], num_queries: int) -> Iterator[bytes]:
    """Requests, no query twice."""
    queries = (f"{text} {turn}" for turn in itertools.count() for text in texts)
    while True:
        asked = list(itertools.islice(queries, num_queries))
        yield json.dumps({"queries": asked, "topk": 3, "return_scores": True}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    texts = [
        json.loads(line)["question"]
        for path in args.queries
        for line in path.open(encoding="utf-8")
    ]
    requests = bodies(texts, args.queries_per_request)
    rows = []
    with server([*prepare(args), *args.server.split()]) as port:
        for count in args.clients:
            setting = Setting(port, requests, args.queries_per_request, args.impatient)
            took, used = uvloop.run(run_clients(setting, count, args.seconds))
            answered = setting.statuses[200] * args.queries_per_request
            rows.append(
                (count, answered / took, answered / used, setting.statuses[429] / took, setting)
            )
            time.sleep(2.0)  # the server drops what the last clients left
    sys.stdout.write(table(rows))


def table(rows: list[tuple[int, float, float, float, Setting]]) -> str:
    """Of (clients, queries/s, queries/s of processor time, refusals/s, what else was seen)."""
    best = max(row[1] for row in rows)
    best_of_cpu = max(row[2] for row in rows)
    heads = [
        "clients",
        "queries/s",
        "queries/CPU s",
        "p50 s",
        "p99 s",
        "refused/s",
        "other answers",
    ]
    heads += ["of the best", "of the best per CPU s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for clients, rate, rate_of_cpu, refused, setting in rows:
        ordered = sorted(setting.latencies) or [float("nan")]
        p50, p99 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99))
        other = {
            status: n for status, n in setting.statuses.items() if status not in (200, 429)
        } or "none"
        lines.append(
            f"| {clients} | {rate:.0f} | {rate_of_cpu:.0f} | {p50:.2f} | {p99:.2f} | {refused:.0f} "
            f"| {other} "
            f"| {rate / best:.2f} | {rate_of_cpu / best_of_cpu:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

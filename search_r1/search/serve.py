"""Running a retrieval server: flags that every one has, logs, worker processes."""

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from search_r1.search.app import ServerSettings, create_app
from search_r1.search.config import TOKEN
from search_r1.search.engine import EngineError
from search_r1.search.experiments import Latency
from search_r1.search.manifest import CorpusError
from search_r1.search.server_metrics import MULTIPROC_DIR

WORKER = "SEARCH_R1_WORKER"
HEALTH_S = 60
"""A worker that answers nothing for so long is replaced. Imports on a busy machine take many
seconds."""
KEEP_ALIVE_S = 60
"""Longer than clients keep an idle connection: one that the server closes may break a request that
is just coming."""
STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "color_message"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the HTTP side."""
    defaults = ServerSettings()
    http = parser.add_argument_group("serving")
    add = http.add_argument
    add(
        "--topk",
        type=positive,
        default=3,
        help="passages per query where a request names no number (default: 3)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for other hosts (default: 127.0.0.1)",
    )
    add("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    add(
        "--workers",
        type=positive,
        default=1,
        help="processes that share the mapped index (default: 1)",
    )
    add(
        "--log_level",
        choices=("info", "warning", "error"),
        default="info",
        help="what is logged (default: info)",
    )
    add(
        "--token",
        default=os.environ.get(TOKEN),
        help=f"bearer token clients must send (default: ${TOKEN}, else none)",
    )
    batching = parser.add_argument_group("batching and limits")
    add = batching.add_argument
    add(
        "--max_batch_size",
        type=positive,
        default=defaults.max_batch_size,
        help="queries per engine call",
    )
    add(
        "--batch_wait_ms",
        type=float,
        default=0.0,
        help="how long an idle engine waits for more queries (default: 0)",
    )
    add(
        "--max_queue",
        type=positive,
        default=defaults.max_queue,
        help="most queries that may wait; above: 429",
    )
    add(
        "--cache_size",
        type=int,
        default=defaults.cache_size,
        help="queries whose passages are kept; 0: none",
    )
    add(
        "--request_timeout_s",
        type=float,
        default=defaults.request_timeout_s,
        help=(
            "longest time of a request; then 504. One that would have to wait half of it is "
            "refused: 429"
        ),
    )
    add(
        "--max_body_bytes",
        type=positive,
        default=defaults.max_body_bytes,
        help="largest request; above: 413",
    )
    add(
        "--max_queries",
        type=positive,
        default=defaults.max_queries,
        help="queries per request; above: 422",
    )
    add(
        "--max_query_chars",
        type=positive,
        default=defaults.max_query_chars,
        help="characters per query; above: 422",
    )
    latency = parser.add_argument_group("experiments")
    latency.add_argument(
        "--inject_latency_ms",
        type=float,
        help="median of a log-normal delay added to every request",
    )
    latency.add_argument("--inject_latency_p99_ms", type=float, help="its 99 %% quantile")


def positive(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """The flags of `add_flags` as settings."""
    latency = (
        Latency(args.inject_latency_ms, args.inject_latency_p99_ms)
        if args.inject_latency_ms
        else None
    )
    same = (
        "topk",
        "max_batch_size",
        "max_queue",
        "cache_size",
        "request_timeout_s",
        "max_body_bytes",
        "max_queries",
        "max_query_chars",
        "token",
    )
    return ServerSettings(
        **{name: getattr(args, name) for name in same},
        batch_wait_s=args.batch_wait_ms / 1000,
        latency=latency,
    )


def serve(module: str, argv: Sequence[str] | None = None) -> int:
    """Runs the server of `module`, which offers `parse_arguments(argv)` and `load(args)`; the exit
    status.

    With several workers the engine is loaded here first: what cannot be loaded is an error, not an
    endless restart.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    server = importlib.import_module(module)
    args = server.parse_arguments(argv)
    if (args.inject_latency_ms is None) != (args.inject_latency_p99_ms is None):
        sys.exit("error: --inject_latency_ms and --inject_latency_p99_ms go together")
    if args.max_queue < args.max_queries:
        sys.exit(
            f"error: --max_queue {args.max_queue} has no room for a request of --max_queries "
            f"{args.max_queries}"
        )
    common: dict[str, Any] = {
        "host": args.host,
        "port": args.port,
        "log_config": None,
        "access_log": False,
        "timeout_graceful_shutdown": int(args.request_timeout_s) + 1,
        "timeout_keep_alive": KEEP_ALIVE_S,
    }
    if args.workers == 1:
        set_up_logging(args.log_level)
        app = create_app(partial(server.load, args), settings_of(args))
        http = uvicorn.Server(uvicorn.Config(app, **common))
        app.state.service.stop = partial(setattr, http, "should_exit", True)
        http.run()
        return int(app.state.service.failed)
    try:
        server.load(args)
    except (CorpusError, EngineError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {WORKER: json.dumps([module, argv]), MULTIPROC_DIR: folder}
        workers = {"workers": args.workers, "timeout_worker_healthcheck": HEALTH_S}
        uvicorn.run(f"{__name__}:worker", factory=True, **workers, **common)
    return 0


def worker() -> FastAPI:
    """The application of one of several processes, which find what to serve in the environment."""
    module, argv = json.loads(os.environ[WORKER])
    server = importlib.import_module(module)
    args = server.parse_arguments(argv)
    set_up_logging(args.log_level)
    return create_app(partial(server.load, args), settings_of(args))


class JsonLines(logging.Formatter):
    """A JSON object a line, with the fields given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {k: v for k, v in record.__dict__.items() if k not in STANDARD_FIELDS}
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + "Z"
        line = {
            "time": when,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **extra,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Quiet(logging.Filter):
    """Lets a message through at most once in ten seconds, with the number of those held back."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, float] = {}
        self.held: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self.last.get(record.msg, -10.0) < 10.0:
            self.held[record.msg] = self.held.get(record.msg, 0) + 1
            return False
        self.last[record.msg] = now
        if held := self.held.pop(record.msg, 0):
            record.repeated = held
        return True


def set_up_logging(level: str) -> None:
    """JSON lines on stderr: what the server does, not what it is asked."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    handler.addFilter(Quiet())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("search_r1").setLevel(level.upper())

"""Runs a retrieval server: the flags that all servers have, and the worker processes."""

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import uvicorn
from fastapi import FastAPI

from search_r1.search.engine import Retriever
from search_r1.search.schema import TOKEN
from search_r1.search.server.app import create_app
from search_r1.search.server.latency import Latency
from search_r1.search.server.logs import set_up_logging
from search_r1.search.server.metrics import MULTIPROC_DIR
from search_r1.search.server.service import CANNOT_LOAD, ServerSettings
from search_r1.search.store import Store, StoreLimits

WORKER = "SEARCH_R1_WORKER"
"""Environment variable that tells worker processes what to serve."""
HEALTH_S = 60
"""A worker that does not answer for this time is replaced. It is long, because the imports of a
worker alone take many seconds on a busy machine."""
KEEP_ALIVE_S = 60
"""How long idle connections are kept. It is longer than clients keep them, because closing one here
can break a request that is just arriving."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that every server has."""
    add_serving_flags(parser)
    add_limit_flags(parser)
    add_latency_flags(parser)


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where, how widely and to whom is served."""
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


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the queue and of what a request may hold."""
    defaults = ServerSettings()
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


def add_latency_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of delays."""
    latency = parser.add_argument_group("experiments")
    latency.add_argument(
        "--inject_latency_ms",
        type=float,
        help="median of a log-normal delay added to every request",
    )
    latency.add_argument("--inject_latency_p99_ms", type=float, help="its 99 %% quantile")


def add_document_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `/open` and `/find`."""
    defaults = StoreLimits()
    add = parser.add_argument_group("documents").add_argument
    add(
        "--documents",
        metavar="FIELD",
        help=(
            "serve /open and /find too; the passages of a document are those that say the same in "
            "FIELD: id (each is its own), title, or any other field of the corpus (default: not "
            "served)"
        ),
    )
    add(
        "--page_chars",
        type=positive,
        default=defaults.page_chars,
        help=f"characters of a page (default: {defaults.page_chars})",
    )
    add(
        "--max_matches",
        type=positive,
        default=defaults.max_matches,
        help=f"sentences that /find gives (default: {defaults.max_matches})",
    )
    add(
        "--max_document_chars",
        type=positive,
        default=defaults.max_document_chars,
        help=f"characters of a document that are read (default: {defaults.max_document_chars})",
    )


def positive(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def refuse_unread(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    readers: Mapping[str, tuple[bool, str]],
) -> None:
    """Ends the command for a flag that differs from its default and that nothing would read.

    `readers`: for each flag whether it is read, and the flag that would make it be read.
    """
    for flag, (is_read, reader) in readers.items():
        if not is_read and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} has no effect without {reader}")


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("is a share, from 0 to 1")
    return value


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """The flags of `add_flags` as settings."""
    latency = None
    if args.inject_latency_ms:
        latency = Latency(args.inject_latency_ms, args.inject_latency_p99_ms)
    return ServerSettings(
        topk=args.topk,
        max_batch_size=args.max_batch_size,
        batch_wait_s=args.batch_wait_ms / 1000,
        max_queue=args.max_queue,
        cache_size=args.cache_size,
        request_timeout_s=args.request_timeout_s,
        max_body_bytes=args.max_body_bytes,
        max_queries=args.max_queries,
        max_query_chars=args.max_query_chars,
        token=args.token,
        latency=latency,
    )


def check_flags(args: argparse.Namespace) -> None:
    """Exits with a message when flags do not go together."""
    if (args.inject_latency_ms is None) != (args.inject_latency_p99_ms is None):
        sys.exit("error: --inject_latency_ms and --inject_latency_p99_ms go together")
    if args.max_queue < args.max_queries:
        sys.exit(
            f"error: --max_queue {args.max_queue} has no room for a request of --max_queries "
            f"{args.max_queries}"
        )


def serve(module: str, argv: Sequence[str] | None = None) -> int:
    """Runs a server until it is told to stop; returns the exit status.

    `module` is the name of a module with `parse_arguments(argv)` and `load(args)`; with
    `load_documents(args)` too, where it has the flags of `add_document_flags`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    server = importlib.import_module(module)
    args = server.parse_arguments(argv)
    check_flags(args)
    http: dict[str, Any] = {
        "host": args.host,
        "port": args.port,
        "log_config": None,
        "access_log": False,
        "timeout_graceful_shutdown": int(args.request_timeout_s) + 1,
        "timeout_keep_alive": KEEP_ALIVE_S,
    }
    if args.workers == 1:
        set_up_logging(args.log_level)
        return serve_here(app_of(server, args), http)
    load, load_documents = loaders(server, args)
    loads = [load] if load_documents is None else [load, load_documents]
    serve_by_workers(loads, [module, argv], args.workers, http)
    return 0


def loaders(
    server: ModuleType, args: argparse.Namespace
) -> tuple[Callable[[], Retriever], Callable[[], Store] | None]:
    """What makes the engine and, where the flags ask for documents, their store."""
    documents = getattr(args, "documents", None)
    load_documents = partial(server.load_documents, args) if documents else None
    return partial(server.load, args), load_documents


def app_of(server: ModuleType, args: argparse.Namespace) -> FastAPI:
    """The application of a server module and its flags."""
    load, load_documents = loaders(server, args)
    return create_app(load, settings_of(args), load_documents)


def serve_here(app: FastAPI, http: dict[str, Any]) -> int:
    """Serves the application in this process; returns 1 when its engine failed."""
    server = uvicorn.Server(uvicorn.Config(app, **http))
    app.state.service.stop = partial(setattr, server, "should_exit", True)
    server.run()
    return int(app.state.service.failed)


def serve_by_workers(
    loads: Sequence[Callable[[], object]], server: list[Any], workers: int, http: dict[str, Any]
) -> None:
    """Serves with several processes; `server` holds the module and its flags.

    Engine and documents are loaded here first, so that what cannot be loaded ends the process with
    a message, instead of workers that are started again and again.
    """
    try:
        for load in loads:
            load()
    except CANNOT_LOAD as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[WORKER] = json.dumps(server)
        os.environ[MULTIPROC_DIR] = folder
        uvicorn.run(
            f"{__name__}:worker",
            factory=True,
            workers=workers,
            timeout_worker_healthcheck=HEALTH_S,
            **http,
        )


def worker() -> FastAPI:
    """Makes the application of a worker process, which reads from the environment what to serve."""
    module, argv = json.loads(os.environ[WORKER])
    server = importlib.import_module(module)
    args = server.parse_arguments(argv)
    set_up_logging(args.log_level)
    return app_of(server, args)

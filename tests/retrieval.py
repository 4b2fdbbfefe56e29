"""Real retrieval servers over a few passages."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from search_r1.launch import free_port
from search_r1.search.engines import bm25

SERVER = Path(__file__).resolve().parents[1] / "search_r1" / "search" / "retrieval_server.py"


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_corpus(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes corpus.jsonl and its BM25 index to `folder`; returns the corpus."""
    path = write_lines(folder / "corpus.jsonl", rows)
    bm25.build(path, folder / "bm25")
    return path


@contextmanager
def retrieval_server(
    folder: Path, *flags: str, port: int | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Starts a server over what `write_corpus` wrote; yields its URL and process.

    It is started by its path, and ended on the way out.
    """
    index = ["--index_path", str(folder / "bm25"), "--corpus_path", str(folder / "corpus.jsonl")]
    with server_process([sys.executable, str(SERVER), *index, *flags], port) as running:
        yield running


@contextmanager
def server_process(
    command: list[str], port: int | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Starts a server and waits until it is ready; yields its URL and process, then ends it."""
    port = port or free_port()
    server = subprocess.Popen([*command, "--port", str(port)])
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/retrieve", server
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(url: str, server: "subprocess.Popen[bytes] | None" = None) -> None:
    """Returns when the engine is loaded."""
    for _ in range(1200):
        try:
            if httpx.get(url, timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            assert server is None or server.poll() is None, "the server ended"
        time.sleep(0.05)
    raise AssertionError(f"{url} is not ready")


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Address of an application that a thread of this process serves over real HTTP."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()

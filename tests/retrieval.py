"""A real retrieval server over a few passages."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from search_r1.search import bm25

SERVER = Path(__file__).resolve().parents[1] / "search_r1" / "search" / "retrieval_server.py"


def write_corpus(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes corpus.jsonl and its BM25 index to `folder`; returns the corpus."""
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bm25.build(path, folder / "bm25")
    return path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def retrieval_server(
    folder: Path, *flags: str, port: int | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """(URL, process) of a server over what `write_corpus` wrote, started by its path, ended on the way out."""
    port = port or free_port()
    command = [sys.executable, str(SERVER), "--index_path", str(folder / "bm25"), "--port", str(port), *flags]
    server = subprocess.Popen([*command, "--corpus_path", str(folder / "corpus.jsonl")])
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).raise_for_status()
                break
            except httpx.TransportError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/retrieve", server
    finally:
        server.kill()
        server.wait()

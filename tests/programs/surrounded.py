"""Runs the program beside this file with a retrieval server: `surrounded.py BEHAVIOUR FOLDER`."""

import logging
import sys
from pathlib import Path

from search_r1.launch import RetrievalServer, run

PROGRAM = Path(__file__).with_name("searches.py")


def main(behaviour: str, folder: Path) -> int:
    """Serves the index of `folder` while the program runs, and returns its exit status."""
    logging.basicConfig(format="%(message)s")
    with RetrievalServer(folder / "bm25", str(folder / "corpus.jsonl"), 1) as server:
        (folder / "server").write_text(f"{server.port} {server.process.pid}")
        command = [sys.executable, str(PROGRAM), behaviour, server.url, str(folder)]
        return run(command, server)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))

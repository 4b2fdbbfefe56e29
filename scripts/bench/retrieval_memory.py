"""Memory and time of building and serving BM25 indexes, by number of passages.

    python scripts/bench/retrieval_memory.py --source C.jsonl --passages 100000 1000000

Passages beyond those of C.jsonl are mixed from two of them each, so that lengths and words stay
those of real text. Prints, per size: time, processor time and peak memory of the builder, size of
the index, time until the server is ready, and the server's anonymous memory (what it holds beside
the mapped files) after 1,000 queries.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from retrieval_load import ROOT, server

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine's servers, whatever proxy the environment names."""


def write_corpus(source: Path, path: Path, count: int) -> Path:
    """A corpus of `count` passages."""
    if path.exists():
        return path
    rows = [json.loads(line)["contents"].partition("\n") for line in source.open(encoding="utf-8")]
    rng = random.Random(0)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for i in range(count):
            title, _, text = rows[i % len(rows)]
            if i >= len(rows):
                words = text.split()
                others = rng.choice(rows)[2].split()
                half = len(words) // 2
                text = " ".join([*words[:half], *others[half:][: len(words) - half]])
                title = f"{title} ({i // len(rows)})"
            file.write(
                json.dumps({"id": str(i), "contents": f"{title}\n{text}"}, ensure_ascii=False)
                + "\n"
            )
    partial.rename(path)
    return path


def build(corpus: Path, folder: Path) -> tuple[float, float, float]:
    """(seconds, seconds of processor time, peak MB) of a builder process."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    command = [sys.executable, "-m", "search_r1.search.index_builder", "--corpus_path", str(corpus)]
    process = subprocess.Popen(
        [*command, "--save_dir", str(folder)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def serve(corpus: Path, folder: Path) -> tuple[float, float, float]:
    """(seconds until ready, anonymous MB, mapped MB) of a server that has answered 1,000
    queries."""
    began = time.perf_counter()
    with server(
        [
            "--retriever_name",
            "bm25",
            "--index_path",
            str(folder / "bm25"),
            "--corpus_path",
            str(corpus),
        ]
    ) as port:
        ready = time.perf_counter() - began
        texts = [
            json.loads(line)["contents"].split("\n")[0]
            for line, _ in zip(corpus.open(), range(1000), strict=False)
        ]
        for start in range(0, 1000, 50):
            body = json.dumps({"queries": texts[start : start + 50]}).encode()
            headers = {"Content-Type": "application/json"}
            DIRECT.open(
                urllib.request.Request(f"http://127.0.0.1:{port}/retrieve", body, headers)
            ).read()
        pid = subprocess.check_output(
            ["pgrep", "-f", f"retrieval_server.py.*--port {port}"], text=True
        ).split()[0]
        status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = {
        line.split(":")[0]: int(line.split()[1])
        for line in status.splitlines()
        if line.startswith("Rss")
    }
    return ready, kilobytes["RssAnon"] / 1024, kilobytes["RssFile"] / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--passages", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--work", type=Path, default=Path("runs/bench/memory"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(
        "| passages | build s | build CPU s | build peak MB | index MB | ready s | server "
        "anonymous MB "
        "| server mapped MB |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    for count in args.passages:
        corpus = write_corpus(args.source, args.work / f"{count}.jsonl", count)
        folder = args.work / f"index-{count}"
        seconds, processor_s, peak = build(corpus, folder)
        size = sum(path.stat().st_size for path in (folder / "bm25").iterdir()) / 1e6
        ready, anonymous, mapped = serve(corpus, folder)
        cells = [
            count,
            *(f"{figure:.0f}" for figure in (seconds, processor_s, peak, size)),
            f"{ready:.1f}",
        ]
        cells += [f"{anonymous:.0f}", f"{mapped:.0f}"]
        sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

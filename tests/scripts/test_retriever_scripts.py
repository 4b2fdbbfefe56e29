"""The launch scripts: every flag they pass is one of the server's; one is started for real."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from search_r1.search import retrieval_server, serp_search_server
from tests.retrieval import server_process, write_corpus

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts" / "retriever").glob("*.sh"))
ROWS = [{"id": "0", "contents": '"Torvel"\nTorvel lies in Marna.'}]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_are_the_servers(script, tmp_path):
    """`python` is replaced by a program that prints its arguments."""
    echo = tmp_path / "echo.sh"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    names = ("CORPUS", "INDEX", "BM25_INDEX", "E5_INDEX", "MODEL", "URL")
    env = {**os.environ, "PYTHON": str(echo), **{name: f"/{name.lower()}" for name in names}}
    done = subprocess.run(
        ["bash", str(script), "--topk", "5"], env=env, capture_output=True, text=True, check=True
    )
    given = done.stdout.split("\n")[:-1]
    if given[:4] == ["-P", "-m", "search_r1.cli", "serve"]:
        args = retrieval_server.parse_arguments(given[4:])
    else:
        assert Path(given[0]).name == "serp_search_server.py"
        args = serp_search_server.parse_arguments(given[1:])
    assert args.topk == 5
    assert len(script.read_text().splitlines()) <= 25 and re.match(
        r"#!/usr/bin/env bash\n# ", script.read_text()
    )


def test_a_missing_variable_is_named():
    env = {key: value for key, value in os.environ.items() if key != "CORPUS"}
    done = subprocess.run(["bash", str(SCRIPTS[0])], env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "CORPUS" in done.stderr


def test_bm25_starts_and_answers(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path, ROWS)
    for name, value in {
        "PYTHON": sys.executable,
        "CORPUS": corpus,
        "INDEX": tmp_path / "bm25",
    }.items():
        monkeypatch.setenv(name, str(value))
    script = next(path for path in SCRIPTS if path.name == "bm25.sh")
    with server_process(["bash", str(script)]) as (url, _):
        assert httpx.post(url, json={"queries": ["Torvel"]}).json()["result"] == [ROWS]


PUBLISHED = [
    "--index_path /p/bm25 --corpus_path /p/wiki-18.jsonl --topk 3 --retriever_name bm25",
    "--index_path /p/e5_Flat.index --corpus_path /p/wiki-18.jsonl --topk 3 --retriever_name e5 "
    "--retriever_model intfloat/e5-base-v2 --faiss_gpu",
]


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_command_lines_are_understood(line):
    args = retrieval_server.parse_arguments(line.split())
    assert args.topk == 3 and args.index_path[0].parent == Path("/p") and args.host == "127.0.0.1"

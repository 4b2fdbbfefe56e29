"""The engine of docs/retriever.md, as printed there."""

import re
import sys
import time
from pathlib import Path

import httpx

from tests.retrieval import server_process

ROOT = Path(__file__).parents[3]


def test_the_engine_of_the_documentation_serves(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "retriever.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    script = tmp_path / "my_server.py"
    script.write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    for workers in ("1", "2"):
        with server_process([sys.executable, str(script), "--topk", "1", "--workers", workers]) as (
            url,
            _,
        ):
            while (
                answer := httpx.post(url, json={"queries": ["Is Mars red?", "venus"]})
            ).status_code == 503:
                time.sleep(0.1)  # the other worker is still loading
            assert answer.json()["result"] == [
                [{"id": "mars", "contents": '"Mars"\nMars is red.'}],
                [],
            ]

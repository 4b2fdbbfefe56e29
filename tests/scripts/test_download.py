"""scripts/download.py against a local server that speaks the hub's protocol."""

import gzip
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI, Request, Response

from tests.processes import PATIENCE_S
from tests.retrieval import serving

pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
SCRIPT = Path(__file__).parents[2] / "scripts" / "download.py"
COMMIT = "a" * 40


class Hub:
    """Data sets as {repository: {file: bytes}}.

    `cut` says how many more file bodies break off half-way.
    """

    def __init__(self, files):
        self.files = files
        self.cut = 0
        self.sent = []
        self.app = FastAPI()
        self.app.add_api_route("/api/datasets/{owner}/{name}", self.info)
        self.app.add_api_route("/api/datasets/{owner}/{name}/revision/{revision}", self.info)
        self.app.add_api_route("/api/datasets/{owner}/{name}/tree/{revision}", self.tree)
        self.app.add_api_route(
            "/datasets/{owner}/{name}/resolve/{revision}/{path:path}",
            self.file,
            methods=["GET", "HEAD"],
        )

    def info(self, owner: str, name: str):
        siblings = [self.entry(path, data) for path, data in self.files[f"{owner}/{name}"].items()]
        return {
            "id": f"{owner}/{name}",
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }

    def tree(self, owner: str, name: str):
        files = self.files[f"{owner}/{name}"].items()
        return [
            {"type": "file", "oid": "0" * 40, "path": path, "size": len(data)}
            for path, data in files
        ]

    def entry(self, path, data):
        digest = hashlib.sha256(data).hexdigest()
        lfs = {"sha256": digest, "size": len(data), "pointerSize": 130}
        return {"rfilename": path, "size": len(data), "blobId": "0" * 40, "lfs": lfs}

    def file(self, owner: str, name: str, revision: str, path: str, request: Request):
        data = self.files[f"{owner}/{name}"][path]
        start = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return Response(status_code=200, headers={**headers, "Content-Length": str(len(data))})
        body = data[start:]
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.cut > 0:
            self.cut -= 1
            body = b"\0" * len(body)
        self.sent.append((path, start))
        return Response(body, status_code=206 if start else 200, headers=headers)


LINES = "".join(
    json.dumps({"id": str(i), "contents": f'"T{i}"\nx'}) + "\n" for i in range(1000)
).encode()
INDEX = bytes(range(256)) * 1000


@pytest.fixture
def hub():
    fake = Hub(
        {
            "PeterJinGo/wiki-18-corpus": {
                "wiki-18.jsonl.gz": gzip.compress(LINES),
                "README.md": b"x",
            },
            "PeterJinGo/wiki-18-e5-index": {"part_aa": INDEX[:100000], "part_ab": INDEX[100000:]},
            "PeterJinGo/wiki-18-bm25-index": {"bm25/segments_1": b"s", "bm25/_0.cfs": b"cfs"},
        }
    )
    with serving(fake.app) as base:
        fake.base = base
        yield fake


def download(hub, folder, *flags):
    env = {
        "HF_ENDPOINT": hub.base,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, str(SCRIPT), "--save_path", str(folder / "data"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE_S)


def test_everything_is_joined_unpacked_and_there_once(hub, tmp_path):
    done = download(hub, tmp_path, "--what", "corpus", "e5", "bm25")
    assert done.returncode == 0, done.stderr
    data = tmp_path / "data"
    assert (data / "wiki-18.jsonl").read_bytes() == LINES
    assert (data / "e5_Flat.index").read_bytes() == INDEX
    assert (data / "bm25" / "segments_1").read_bytes() == b"s" and (
        data / "bm25" / "_0.cfs"
    ).read_bytes() == b"cfs"
    assert not list(data.glob("*.tmp")) and not list(data.glob(".*.parts"))
    count = len(hub.sent)
    again = download(hub, tmp_path, "--what", "corpus", "e5", "bm25")
    assert (
        again.returncode == 0 and again.stdout.count("already here") == 3 and len(hub.sent) == count
    )


def test_a_damaged_part_is_found_removed_and_fetched_again(hub, tmp_path):
    hub.cut = 1
    first = download(hub, tmp_path, "--what", "e5")
    assert (
        first.returncode == 1
        and "wrong hash" in first.stderr
        and "run the same command again" in first.stderr
    )
    assert "Traceback" not in first.stderr and not (tmp_path / "data" / "e5_Flat.index").exists()
    second = download(hub, tmp_path, "--what", "e5")
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "data" / "e5_Flat.index").read_bytes() == INDEX
    assert len(hub.sent) == 3  # the good part was not fetched twice


def test_an_unreachable_hub_is_an_error_that_names_the_repository(hub, tmp_path):
    hub.base = "http://127.0.0.1:9"
    done = download(hub, tmp_path)
    assert (
        done.returncode == 1
        and "PeterJinGo/wiki-18-corpus" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_too_little_room_is_said_before_the_download(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("download", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(module.DownloadError, match=r"needs 2000000.0 GB"):
        module.need_room(tmp_path, 10**15, module.ITEMS["e5"])

"""Fetches the published wiki-18 corpus and indexes from the Hugging Face hub, ready to be served.

    python scripts/download.py --save_path DIR                    # corpus and exact E5 index
    python scripts/download.py --save_path DIR --what corpus bm25 # corpus and Lucene's BM25 index

An interrupted download continues where it stopped. Every file is checked by size and hash. Parts
are joined, and archives unpacked, whole or not at all. HF_ENDPOINT names a mirror, HF_TOKEN holds a
token.
"""

import argparse
import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2  # the HTTP client of huggingface_hub 2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

BLOCK = 1 << 24


@dataclass(frozen=True)
class Item:
    """A data set of the hub, whose files are joined or unpacked to `target`.

    A folder is kept as it is.
    """

    repo: str
    target: str
    patterns: tuple[str, ...]
    size: str


ITEMS = {
    "corpus": Item("PeterJinGo/wiki-18-corpus", "wiki-18.jsonl", ("wiki-18.jsonl.gz",), "14 GB"),
    "e5": Item("PeterJinGo/wiki-18-e5-index", "e5_Flat.index", ("part_*",), "65 GB"),
    "hnsw": Item("PeterJinGo/wiki-18-e5-index-HNSW64", "e5_HNSW64.index", ("part_*",), "75 GB"),
    "bm25": Item("PeterJinGo/wiki-18-bm25-index", "bm25", ("bm25/*",), "2 GB"),
}


class DownloadError(Exception):
    """The download failed; the message says why, and what to do."""


def fetch(item: Item, save_path: Path, keep: bool) -> Path:
    """Downloads `item` and makes its target in `save_path`, which is returned.

    Raises DownloadError for a damaged file or too little room.
    """
    target = save_path / item.target
    mark = save_path / f".{item.target}.download.json"
    if mark.is_file() and target.exists():
        sys.stdout.write(f"{target}: already here\n")
        return target
    info = HfApi().dataset_info(item.repo, files_metadata=True)
    wanted = [
        f for f in info.siblings or [] if any(Path(f.rfilename).match(p) for p in item.patterns)
    ]
    if not wanted:
        raise DownloadError(f"{item.repo} has no {' or '.join(item.patterns)}")
    need_room(save_path, sum(f.size or 0 for f in wanted), item)
    folder = save_path / f".{item.target}.parts"
    snapshot_download(
        item.repo,
        repo_type="dataset",
        revision=info.sha,
        local_dir=folder,
        allow_patterns=list(item.patterns),
    )
    for file in wanted:
        check(folder / file.rfilename, file.size, file.lfs.sha256 if file.lfs else None)
    parts = sorted(folder / file.rfilename for file in wanted)
    assemble(item, parts, folder, target)
    mark.write_text(json.dumps({"repo": item.repo, "revision": info.sha}) + "\n")
    if not keep:
        shutil.rmtree(folder)
    return target


def need_room(save_path: Path, size: int, item: Item) -> None:
    """Raises DownloadError unless there is room for the files and what is made of them."""
    save_path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(save_path).free
    if free < 2 * size:
        raise DownloadError(
            f"{item.target} needs {2 * size / 1e9:.1f} GB in {save_path}, {free / 1e9:.1f} GB are "
            "free"
        )


def check(path: Path, size: int | None, sha256: str | None) -> None:
    """Raises DownloadError unless the file is the one that the hub describes; removes a wrong
    one."""
    problem = None
    if size is not None and path.stat().st_size != size:
        problem = f"has {path.stat().st_size} bytes instead of {size}"
    elif sha256 is not None and sha256_of(path) != sha256:
        problem = "is not what the hub holds (wrong hash)"
    if problem:
        path.unlink()
        raise DownloadError(f"{path.name} {problem}: it was removed, run the same command again")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, bar(path.stat().st_size, f"checking {path.name}") as progress:
        while block := file.read(BLOCK):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()


def assemble(item: Item, parts: Sequence[Path], folder: Path, target: Path) -> None:
    """Makes the target: unpacks an archive, joins parts, or moves a folder."""
    if item.patterns[0].endswith("/*"):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / item.target, target)
        return
    pending = target.with_name(target.name + ".tmp")
    with (
        pending.open("wb") as out,
        bar(sum(p.stat().st_size for p in parts), f"writing {target.name}") as progress,
    ):
        for part in parts:
            start = progress.n
            with part.open("rb") as raw:
                source = gzip.GzipFile(fileobj=raw) if part.suffix == ".gz" else raw
                while block := source.read(BLOCK):
                    out.write(block)
                    progress.update(start + raw.tell() - progress.n)
    pending.rename(target)


def bar(total: int, text: str) -> "tqdm[None]":
    return tqdm(total=total, unit="B", unit_scale=True, desc=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches what the command line names and is not there yet; returns the exit status."""
    sizes = ", ".join(f"{name} {item.size}" for name, item in ITEMS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save_path", type=Path, required=True, help="folder to fill")
    parser.add_argument(
        "--what",
        nargs="+",
        choices=ITEMS,
        default=["corpus", "e5"],
        help=f"(default: corpus e5). About: {sizes}",
    )
    parser.add_argument(
        "--keep_parts",
        action="store_true",
        help="also keep the downloaded files from which the corpus and the indexes are made",
    )
    args = parser.parse_args(argv)
    for name in args.what:
        try:
            sys.stdout.write(f"{fetch(ITEMS[name], args.save_path, args.keep_parts)}\n")
        except (DownloadError, HfHubHTTPError, httpx2.TransportError, OSError) as error:
            sys.exit(f"error: {ITEMS[name].repo}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

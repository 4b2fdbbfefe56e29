"""Makes a page on which the trajectories of a run or of a result can be read.

    python -m search_r1.pages.viewer RUN_OR_FILE [--out viewer.html]

The page is one file without requests to anywhere. Trajectories are in it compressed, a chunk at a
time, behind an index that the list and its filters read. What would make a page too large is on
further pages beside it.
"""

import argparse
import sys
import webbrowser
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r1.pages.html import TRAJECTORY_MODULES, json_text, packed, page_html
from search_r1.pages.records import Entry, read_entries, shown
from search_r1.program import program_name
from verl.utils.errors import DataError

CHUNK = 256 * 1024
"""Characters of JSON after which a chunk is complete; opening a trajectory unpacks its chunk."""
PAGE = 48 * 1024 * 1024
"""Bytes of packed trajectories after which another page begins."""
MODULES = (
    *TRAJECTORY_MODULES,
    "filters.js",
    "list.js",
    "compare.js",
    "viewer.js",
)
"""In the order in which they need each other."""
STYLES = ("base.css", "trajectory.css", "viewer.css")


@dataclass
class Page:
    """What is on one page."""

    index: list[dict[str, Any]] = field(default_factory=list)
    """The summary of each entry, with its chunk."""
    chunks: list[str] = field(default_factory=list)
    """Packed lines of JSON, one for each entry."""
    waiting: list[str] = field(default_factory=list)
    """Lines of the chunk that is not complete yet."""

    @property
    def size(self) -> int:
        """Bytes of the packed trajectories."""
        return sum(map(len, self.chunks))

    def add(self, entry: Entry) -> None:
        """Adds an entry to the page."""
        summary, content = shown(entry)
        self.index.append({**summary, "chunk": len(self.chunks), "at": len(self.waiting)})
        self.waiting.append(json_text(content))
        if sum(map(len, self.waiting)) >= CHUNK:
            self.complete()

    def complete(self) -> None:
        """Packs the chunk that is not complete yet, if there is one."""
        if self.waiting:
            self.chunks.append(packed("\n".join(self.waiting)))
            self.waiting = []


def pages_of(entries: Iterable[Entry], size: int = PAGE) -> Iterator[Page]:
    """Yields pages whose trajectories take about `size` bytes; always at least one page."""
    page = Page()
    for entry in entries:
        if page.size >= size:
            page.complete()
            yield page
            page = Page()
        page.add(entry)
    page.complete()
    yield page


def page_paths(out: Path, number: int) -> list[Path]:
    """The files of `number` pages: viewer.html, viewer-2.html and so on."""
    more = [out.with_stem(f"{out.stem}-{n}") for n in range(2, number + 1)]
    return [out, *more]


def write_pages(pages: Sequence[Page], out: Path, title: str) -> list[Path]:
    """Writes the pages, which link to each other, and returns their files."""
    paths = page_paths(out, len(pages))
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, (page, path) in enumerate(zip(pages, paths, strict=True), 1):
        about = {"title": title, "page": number, "pages": [p.name for p in paths]}
        blocks = {"about": packed(json_text(about)), "index": packed(json_text(page.index))}
        blocks |= {f"chunk-{n}": chunk for n, chunk in enumerate(page.chunks)}
        html = page_html(title, MODULES, STYLES, blocks)
        path.write_text(html, encoding="utf-8")
    return paths


def build(
    place: Path,
    out: Path,
    *,
    steps: Sequence[int] | None = None,
    limit: int | None = None,
    size: int = PAGE,
) -> list[Path]:
    """Writes the pages of a run folder, a result or a file, and returns their files.

    Raises DataError where there is no record to show.
    """
    pages = list(pages_of(read_entries(place, steps, limit), size))
    if not pages[0].index:
        raise DataError(f"{place}: no trajectory records (of these steps)")
    return write_pages(pages, out, place.resolve().name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("search_r1.pages.viewer"),
        description="Makes a page on which the trajectories of a run or a result can be read.",
    )
    parser.add_argument("place", type=Path, help="run folder, folder of results, or a .jsonl file")
    parser.add_argument("--out", type=Path, help="the page to write (default: beside that)")
    parser.add_argument("--step", type=int, nargs="+", help="only records of these steps")
    parser.add_argument("--limit", type=int, help="only the first so many records of each file")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    args = parser.parse_args(argv)
    beside = args.place / "viewer.html" if args.place.is_dir() else args.place.with_suffix(".html")
    out = args.out or beside
    try:
        paths = build(args.place, out, steps=args.step, limit=args.limit)
    except (DataError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for path in paths:
        sys.stdout.write(f"{path} ({path.stat().st_size / 1e6:.1f} MB)\n")
    if args.open:
        webbrowser.open(paths[0].resolve().as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())

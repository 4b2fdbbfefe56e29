"""Turns a folder of text, Markdown and HTML files into a corpus of titled 100-word passages.

python -m search_r1.search.make_corpus --input FOLDER --out corpus.jsonl
"""

import argparse
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from search_r1.program import command_parser
from search_r1.search.errors import CorpusError, RetrieverError
from search_r1.search.extras import require
from search_r1.search.index.documents import contents
from search_r1.search.index.files import replacing

TEXT = (".txt", ".text")
MARKDOWN = (".md", ".markdown")
HTML = (".html", ".htm", ".xhtml")
KINDS = (*TEXT, *MARKDOWN, *HTML)
LEFT_OUT = ("unreadable", "of another kind")
MIN_WORDS = 20
"""A last passage of fewer words than this is appended to the one before it."""


def read(path: Path) -> tuple[str, str]:
    """Reads the title and the text of a file.

    The title is that of the page, or else the first heading, or else the name of the file. Raises
    CorpusError when the file is not UTF-8, RetrieverError when the package that reads files of its
    kind is missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    title = ""
    kind = path.suffix.lower()
    if kind in (*MARKDOWN, *HTML):
        require("web", f"{path}: reading Markdown and HTML")
        title, text = read_html(to_html(text) if kind in MARKDOWN else text)
    return title or path.stem.replace("_", " ").replace("-", " "), text


def to_html(markdown: str) -> str:
    """Converts Markdown to HTML, without its front matter."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable("table").render(without_front_matter(markdown))


def read_html(html: str) -> tuple[str, str]:
    """The title of a page, or else its first heading, and its text."""
    from search_r1.search.index.html import title_and_text

    title, text = title_and_text(html)
    if not title and (heading := re.search(r"<h1[^>]*>(.*?)</h1>", html, re.S | re.I)):
        title = " ".join(title_and_text(heading[1])[1].split())
    return title, text


def without_front_matter(markdown: str) -> str:
    """Markdown without the YAML block (front matter) with which many generators begin a file."""
    return re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.S)


def passages(text: str, words: int) -> Iterator[str]:
    """Cuts a text into passages of `words` words, like wiki-18; a short rest joins the last one."""
    tokens = text.split()
    starts = list(range(0, len(tokens), words))
    if len(starts) > 1 and len(tokens) - starts[-1] < MIN_WORDS:
        starts.pop()
    for start, end in itertools.pairwise([*starts, len(tokens)]):
        yield " ".join(tokens[start:end])


def make(folder: Path, out: Path, words: int, skip_bad: bool) -> Counter[str]:
    """Writes the corpus, whole or not at all; returns counts of files, passages and skipped files.

    Raises CorpusError when there is nothing to read, or, unless bad files are skipped, when a file
    cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    counts: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as pending:
        with pending.open("w", encoding="utf-8") as file:
            for path in tqdm(files, desc="files", unit="files"):
                for document in documents(path, folder, words, skip_bad, counts):
                    file.write(json.dumps(document, ensure_ascii=False) + "\n")
        if not counts["passages"]:
            raise CorpusError(f"{folder}: no text in {', '.join(KINDS)} files")
    return counts


def documents(
    path: Path, folder: Path, words: int, skip_bad: bool, counts: Counter[str]
) -> Iterator[dict[str, str]]:
    """Yields the passages of one file as documents, and counts them."""
    if path.suffix.lower() not in KINDS:
        counts["of another kind"] += 1
        return
    try:
        title, text = read(path)
    except RetrieverError:
        if not skip_bad:
            raise
        counts["unreadable"] += 1
        return
    counts["files"] += 1
    name = path.relative_to(folder).as_posix()
    for number, passage in enumerate(passages(text, words)):
        counts["passages"] += 1
        yield {"id": f"{name}#{number}", "contents": contents(title, passage)}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = command_parser("search_r1.search.make_corpus", __doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, help="folder, searched with all its folders")
    add("--out", type=Path, required=True, help="corpus to write (.jsonl)")
    add("--words", type=int, default=100, help="words per passage (default: 100)")
    add("--skip-bad", action="store_true", help="leave unreadable files out and count them")
    args = parser.parse_args(argv)
    if not args.input.is_dir():
        parser.error(f"--input {args.input}: no such folder")
    if args.words < MIN_WORDS:
        parser.error(f"--words must be at least {MIN_WORDS}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the corpus, says what went into it, and returns the exit status."""
    args = parse_arguments(argv)
    try:
        counts = make(args.input, args.out, args.words, args.skip_bad)
    except RetrieverError as error:
        sys.exit(f"error: {error}")
    left_out = [f"{counts[kind]} {kind}" for kind in LEFT_OUT if counts[kind]]
    sys.stdout.write(f"{args.out}: {counts['passages']} passages of {counts['files']} files")
    sys.stdout.write(f"; left out: {', '.join(left_out)}\n" if left_out else "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

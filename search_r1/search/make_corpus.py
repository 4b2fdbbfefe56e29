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

from search_r1.search.corpus import contents
from search_r1.search.extras import require
from search_r1.search.manifest import CorpusError

TEXT = (".txt", ".text")
MARKDOWN = (".md", ".markdown")
HTML = (".html", ".htm", ".xhtml")
MIN_WORDS = 20
"""A shorter rest at the end of a document joins the passage before it."""


def read(path: Path) -> tuple[str, str]:
    """Title and text of a file; a title is the page's or the first heading, else the file's name.

    Raises CorpusError when it is not UTF-8.
    """
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    title = ""
    text = raw
    if path.suffix.lower() in (*MARKDOWN, *HTML):
        require("web", f"{path}: reading Markdown and HTML")
        from search_r1.search.html import title_and_text

        html = raw
        if path.suffix.lower() in MARKDOWN:
            from markdown_it import MarkdownIt

            html = MarkdownIt("commonmark").enable("table").render(without_front_matter(raw))
        title, text = title_and_text(html)
        if not title and (heading := re.search(r"<h1[^>]*>(.*?)</h1>", html, re.S | re.I)):
            title = " ".join(title_and_text(heading[1])[1].split())
    return title or path.stem.replace("_", " ").replace("-", " "), text


def without_front_matter(markdown: str) -> str:
    """Markdown without the YAML block that many generators put first."""
    return re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.S)


def passages(text: str, words: int) -> Iterator[str]:
    """Pieces of `words` words, as wiki-18 was cut; a short rest stays with the last one."""
    tokens = text.split()
    starts = list(range(0, len(tokens), words))
    if len(starts) > 1 and len(tokens) - starts[-1] < MIN_WORDS:
        starts.pop()
    for start, end in itertools.pairwise([*starts, len(tokens)]):
        yield " ".join(tokens[start:end])


def make(folder: Path, out: Path, words: int, skip_bad: bool) -> Counter[str]:
    """Writes the corpus, whole or not at all; counts of files, passages, and files left out.

    Raises CorpusError when there is nothing to read, or a file cannot be read and bad ones are not
    skipped.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    counts: Counter[str] = Counter()
    pending = out.with_name(out.name + ".tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    with pending.open("w", encoding="utf-8") as file:
        for path in tqdm(files, desc="files", unit="files"):
            if path.suffix.lower() not in (*TEXT, *MARKDOWN, *HTML):
                counts["of another kind"] += 1
                continue
            try:
                title, text = read(path)
            except CorpusError:
                if not skip_bad:
                    pending.unlink()
                    raise
                counts["unreadable"] += 1
                continue
            counts["files"] += 1
            for number, passage in enumerate(passages(text, words)):
                id = f"{path.relative_to(folder).as_posix()}#{number}"
                file.write(
                    json.dumps({"id": id, "contents": contents(title, passage)}, ensure_ascii=False)
                    + "\n"
                )
                counts["passages"] += 1
    if not counts["passages"]:
        pending.unlink()
        raise CorpusError(f"{folder}: no text in {', '.join((*TEXT, *MARKDOWN, *HTML))} files")
    pending.rename(out)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.search.make_corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", type=Path, required=True, help="folder, searched with all its folders"
    )
    parser.add_argument("--out", type=Path, required=True, help="corpus to write (.jsonl)")
    parser.add_argument("--words", type=int, default=100, help="words per passage (default: 100)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave unreadable files out and count them"
    )
    args = parser.parse_args(argv)
    if not args.input.is_dir():
        parser.error(f"--input {args.input}: no such folder")
    if args.words < MIN_WORDS:
        parser.error(f"--words must be at least {MIN_WORDS}")
    try:
        counts = make(args.input, args.out, args.words, args.skip_bad)
    except CorpusError as error:
        sys.exit(f"error: {error}")
    left_out = ", ".join(
        f"{counts[kind]} {kind}" for kind in ("unreadable", "of another kind") if counts[kind]
    )
    sys.stdout.write(f"{args.out}: {counts['passages']} passages of {counts['files']} files")
    sys.stdout.write(f"; left out: {left_out}\n" if left_out else "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which passages of a corpus make a document: a table of names and lines, mapped into memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from search_r1.search.index.corpus import Corpus, save_whole
from search_r1.search.index.manifest import SAMPLES
from search_r1.search.index.reader import hash_of

TITLE = "title"
"""The field that stands in the first line of `contents`."""


def document_name(passage: dict[str, Any], field: str) -> str:
    """The name of the document that a passage belongs to: what its `field` says.

    A passage that says nothing there is a document of its own, named by its id.

    >>> passage = {"id": 7, "contents": '"Ada Marin"\\nBorn in Torvel.', "page_url": None}
    >>> [document_name(passage, field) for field in ("id", "title", "page_url")]
    ['7', 'Ada Marin', '7']
    """
    is_title = field == TITLE
    value = title_and_text(passage["contents"])[0] if is_title else passage.get(field)
    said = clean(str(value), field) if isinstance(value, str | int) else ""
    return said or clean(str(passage["id"]), field)


def title_and_text(contents: str) -> tuple[str, str]:
    """The first line of `contents`, and what is behind it; a single line is no title.

    >>> title_and_text('"Ada"\\nBorn at sea.'), title_and_text("Born at sea.")
    (('"Ada"', 'Born at sea.'), ('', 'Born at sea.'))
    """
    title, line_break, text = contents.partition("\n")
    return (title, text) if line_break else ("", contents)


def clean(name: str, field: str) -> str:
    """A name without white space around it, and a title without the quotes that corpora give it."""
    name = name.strip()
    return name.strip('"').strip() if field == TITLE else name


class Groups:
    """The lines of each document, by 64 bits of its name: 16 bytes a line, sorted and mapped.

    Names that differ may share these bits, so whoever reads the lines compares the names.
    """

    def __init__(self, table: np.ndarray) -> None:
        """Takes uint64 [2, lines]: the names' bits in ascending order, and their lines."""
        self.names, self.lines = table

    @classmethod
    def of_corpus(cls, corpus: Corpus, field: str) -> "Groups":
        """The groups by `field`: kept in a file beside the corpus, where it is made once.

        Raises CorpusError for a line that is no passage.
        """
        kept = corpus.path.with_name(f"{corpus.path.name}.documents-{quote(field, safe='')}.npy")
        if not is_table_of(corpus, field, kept):
            table = table_of(corpus, field)
            try:
                save_whole(kept, table)
            except OSError:  # a read-only folder: it is made again next time
                return cls(table)
        return cls(np.load(kept, mmap_mode="r"))

    def lines_of(self, name: str) -> Iterator[int]:
        """The lines of a document in the order of the corpus; seldom those of another one too."""
        bits = np.uint64(hash_of(name))
        first, after = (np.searchsorted(self.names, bits, side) for side in ("left", "right"))
        return (int(line) for line in self.lines[first:after])


def table_of(corpus: Corpus, field: str) -> np.ndarray:
    """Reads the whole corpus once, with a progress bar; 32 bytes of memory a line."""
    lines = tqdm(range(len(corpus)), unit="passages", unit_scale=True, desc="documents")
    bits = (hash_of(document_name(corpus[line], field)) for line in lines)
    names = np.fromiter(bits, dtype=np.uint64, count=len(corpus))
    order = np.argsort(names, kind="stable")
    table = np.empty((2, len(corpus)), dtype=np.uint64)
    np.take(names, order, out=table[0], mode="clip")  # the other modes would make a copy first
    table[1] = order
    return table


def is_table_of(corpus: Corpus, field: str, kept: Path) -> bool:
    """Whether a file holds the table of this corpus, as far as its time and 64 entries tell."""
    if not kept.exists() or kept.stat().st_mtime < corpus.path.stat().st_mtime:
        return False
    try:
        table = np.load(kept, mmap_mode="r")
    except ValueError:  # damaged
        return False
    if table.shape != (2, len(corpus)) or table.dtype != np.uint64:
        return False
    sample = np.unique(np.linspace(0, len(corpus) - 1, SAMPLES).astype(np.int64))
    return all(
        line < len(corpus) and hash_of(document_name(corpus[line], field)) == bits
        for bits, line in table[:, sample].T.tolist()
    )

"""Documents that are opened a page at a time, and searched for a text.

Those of a corpus are made of its passages. Nothing is kept in memory: the passages of a document
are read from the mapped corpus whenever it is asked for. Those of the web are pages
(engines/web_pages.py).
"""

import argparse
import re
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from search_r1.search.errors import RetrieverError
from search_r1.search.index.corpus import Corpus
from search_r1.search.index.groups import Groups, clean, document_name, title_and_text
from search_r1.search.index.manifest import MANIFEST, read_manifest
from search_r1.search.index.reader import OFFSETS
from search_r1.search.schema import FindResponse, Match, OpenResponse, ShownPassage

CONTEXT_CHARS = 150
"""A match is shown with the rest of its sentence, but no more than this on either side."""
TITLE_CHARS = 300
"""A longer title is cut."""
SENTENCE_ENDS = (". ", "? ", "! ", "\n")


@dataclass(frozen=True)
class StoreLimits:
    """What bounds an answer, and the work for it. Lengths are in characters."""

    page_chars: int = 2000
    max_matches: int = 5
    max_document_chars: int = 16 << 20


class Unreadable(Exception):
    """A document is there, and cannot be read."""


@dataclass(frozen=True)
class Text:
    """A document that has been read."""

    name: str
    title: str
    text: str
    """The texts of its passages, each with a line break behind it."""
    ids: list[str]
    """Of its passages."""
    starts: list[int]
    """Where in `text` each passage begins."""
    cut: bool
    """Whether it goes on, but is longer than what is read."""

    def passages(self, start: int, end: int) -> list[ShownPassage]:
        """The passages of which something stands between two places, counted from `start`."""
        first, after = bisect_right(self.starts, start) - 1, bisect_left(self.starts, end)
        bounds = [start, *self.starts[first + 1 : after], end]
        return [
            ShownPassage(id=id, start=low - start, end=high - start)
            for id, (low, high) in zip(self.ids[first:after], pairwise(bounds), strict=True)
        ]


class Store(ABC):
    """Documents that can be read whole, under their names."""

    num_threads = 1
    """Documents that are read at the same time: more where reading is waiting."""

    def __init__(self, field: str, limits: StoreLimits | None = None) -> None:
        self.field = field
        self.limits = limits or StoreLimits()

    def name_of(self, passage: dict[str, Any]) -> str:
        """The name by which `open` and `find` know the document of a passage."""
        return document_name(passage, self.field)

    @abstractmethod
    def read(self, document: str) -> Text | None:
        """Reads a document up to `max_document_chars`; None where there is no such document.

        Raises Unreadable for one that is there and cannot be read.
        """

    def open(self, document: str, page: int) -> OpenResponse:
        """A page of a document, or what is wrong with the question."""
        try:
            read = self.read(document)
        except Unreadable:
            return OpenResponse(document=document, page=page, error="unreadable")
        if read is None:
            return OpenResponse(document=document, page=page, error="unknown_document")
        starts = page_starts(read.text, self.limits.page_chars)
        answer = OpenResponse(
            document=read.name, title=read.title, page=page, pages=len(starts), cut=read.cut
        )
        if page > len(starts):
            answer.error = "no_such_page"
            return answer
        start, end = [*starts, len(read.text)][page - 1 : page + 1]
        answer.text = read.text[start:end]
        answer.passages = read.passages(start, end)
        return answer

    def find(self, document: str, text: str) -> FindResponse:
        """The sentences of a document that hold a text, or what is wrong with the question.

        Upper and lower case are the same, and so is all white space.
        """
        try:
            read = self.read(document)
        except Unreadable:
            return FindResponse(document=document, error="unreadable")
        if read is None:
            return FindResponse(document=document, error="unknown_document")
        starts = page_starts(read.text, self.limits.page_chars)
        found = FindResponse(document=read.name, title=read.title, pages=len(starts), cut=read.cut)
        places = sentences_with(text, read.text, self.limits.max_matches + 1)
        found.more = len(places) > self.limits.max_matches
        for at, sentence in places[: self.limits.max_matches]:
            id = read.ids[bisect_right(read.starts, at) - 1]
            found.matches.append(Match(page=bisect_right(starts, at), id=id, text=sentence))
        if not found.matches:
            found.error = "no_match"
        return found


class DocumentStore(Store):
    """The documents of a corpus, grouped by a field of its passages."""

    def __init__(self, corpus: Corpus, field: str, limits: StoreLimits | None = None) -> None:
        """Makes the table of names if there is none yet. Raises CorpusError for a bad passage."""
        super().__init__(field, limits)
        self.corpus = corpus
        self.groups = Groups.of_corpus(corpus, field)

    def read(self, document: str) -> Text | None:
        """Reads the passages of a document in the order of the corpus."""
        name = clean(document, self.field)
        title = ""
        texts, ids, starts = list[str](), list[str](), list[int]()
        length = 0
        cut = False
        for line in self.groups.lines_of(name):
            passage = self.corpus[line]
            if document_name(passage, self.field) != name:
                continue
            heading, text = title_and_text(passage["contents"])
            room = self.limits.max_document_chars - length
            if room <= 0:
                cut = True
                break
            text = f"{text}\n"
            cut = len(text) > room
            title = title or heading[:TITLE_CHARS]
            ids.append(str(passage["id"]))
            starts.append(length)
            texts.append(text[:room])
            length += len(texts[-1])
        return Text(name, title, "".join(texts), ids, starts, cut) if ids else None


def page_starts(text: str, page_chars: int) -> list[int]:
    """Where the pages of a text begin; it has one page at least.

    A page is as long as it may be, but ends behind white space where its second half has some.

    >>> page_starts("one two three", 8), page_starts("", 8), page_starts("x" * 20, 8)
    ([0, 8], [0], [0, 8, 16])
    """
    starts = [0]
    while len(text) - starts[-1] > page_chars:
        end = starts[-1] + page_chars
        half = starts[-1] + page_chars // 2
        gap = max(text.rfind(" ", half, end), text.rfind("\n", half, end))
        starts.append(gap + 1 if gap >= 0 else end)
    return starts


def folded(text: str) -> str:
    """The text as texts are compared: in lower case, and of the same length."""
    # the lower case of this one letter is two characters
    return text.replace("\u0130", "i").lower()


def sentences_with(wanted: str, text: str, most: int) -> list[tuple[int, str]]:
    """Up to `most` different sentences that hold a text, each with the place of its match."""
    words = folded(wanted).split()
    pattern = re.compile(r"\s+".join(map(re.escape, words)))
    haystack = folded(text)
    found = list[tuple[int, str]]()
    match = pattern.search(haystack) if words else None
    while match and len(found) < most:
        start, end = sentence_around(text, match.start(), match.end())
        found.append((match.start(), " ".join(text[start:end].split())))
        match = pattern.search(haystack, end)
    return found


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the sentence around a match begins and ends, within `CONTEXT_CHARS` on either side."""
    low, high = max(0, start - CONTEXT_CHARS), min(len(text), end + CONTEXT_CHARS)
    befores = [at + len(e) for e in SENTENCE_ENDS if (at := text.rfind(e, low, start)) >= 0]
    # the match may hold the full stop itself
    last = max(start, end - 1)
    afters = [at + len(e) for e in SENTENCE_ENDS if (at := text.find(e, last, high)) >= 0]
    return max(befores, default=low), min(afters, default=high)


def load_documents(args: argparse.Namespace) -> DocumentStore:
    """The store that the flags of a server describe. Raises RetrieverError without a corpus."""
    limits = StoreLimits(args.page_chars, args.max_matches, args.max_document_chars)
    return DocumentStore(corpus_of(args.index_path, args.corpus_path), args.documents, limits)


def corpus_of(indexes: list[Path], corpus: Path | None) -> Corpus:
    """The corpus of the first index that knows its passages' places, else that of the flag."""
    for index in indexes:
        if (index / MANIFEST).is_file() and (index / OFFSETS).is_file():
            return Corpus.of_index(index, read_manifest(index), corpus)
    if corpus is None:
        raise RetrieverError("--documents needs the corpus: name its file with --corpus_path")
    return Corpus.of_lines(corpus)

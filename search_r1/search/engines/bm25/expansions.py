"""Document expansion: words that are added to documents when their index is built.

A model, or the statistics of the corpus, say which words a document lacks by which it could be
searched (SIRA, arXiv 2605.06647, enriches documents so). An added word is worth less than one of
the document's own. Text and added words are two fields of BM25 (Robertson, Zaragoza and Taylor,
"Simple BM25 Extension to Multiple Weighted Fields", CIKM 2004), with weights 1 and 1 / m:

    occurrences = occurrences in the text + occurrences among the added words / m
    length      = words of the text + added words / m

and the formula of BM25 follows. The document frequency of a word counts the documents that have it
in their text, because being added makes no word less telling; of a word that no text has, those it
was added to. m is `own_weight`, a whole number, so that the index holds whole numbers.
"""

import json
from pathlib import Path
from typing import Any

from search_r1.search.errors import CorpusError
from search_r1.search.index.manifest import fingerprint
from search_r1.search.index.reader import hash_of

OWN_WEIGHT = 4
"""The default of `own_weight`."""


class Expansions:
    """The added words of documents, in a file of JSON lines, which is not held in memory.

    A line is `{"id": ..., "terms": ["...", ...]}` or `{"id": ..., "text": "..."}`. A document
    without a line is not expanded.
    """

    def __init__(self, path: Path, own_weight: int = OWN_WEIGHT) -> None:
        """Reads the whole file once.

        Raises CorpusError that names the line when one is malformed or repeats an id.
        """
        if not path.is_file():
            raise CorpusError(f"{path}: no such file of expansions")
        self.path = path
        self.own_weight = own_weight
        self.file = path.open("rb")
        self.places: dict[int, tuple[int, int]] = {}
        """(number, offset) of the line of each document that was not asked for yet, by the hash of
        its id."""
        offset = 0
        for number, line in enumerate(self.file, 1):
            if line.strip():
                self._note(line, number, offset)
            offset += len(line)
        self.description: dict[str, Any] = {
            "file": path.name,
            **fingerprint(path),
            "documents": len(self.places),
            "own_weight": own_weight,
        }
        """What the manifest of the index keeps."""

    def _note(self, line: bytes, number: int, offset: int) -> None:
        location = f"{self.path}, line {number}"
        id, _ = read_expansion(line, location)
        if hash_of(id) in self.places:
            raise CorpusError(f"{location}: id {id!r} occurs a second time")
        self.places[hash_of(id)] = (number, offset)

    def take(self, id: object) -> str:
        """The added words of a document as a text, empty for one without a line.

        A document is asked for once.
        """
        place = self.places.pop(hash_of(id), None)
        if place is None:
            return ""
        number, offset = place
        self.file.seek(offset)
        return read_expansion(self.file.readline(), f"{self.path}, line {number}")[1]

    def check_all_taken(self, corpus: str) -> None:
        """Raises CorpusError with the first line whose document was never asked for."""
        if not self.places:
            return
        number, offset = min(self.places.values())
        self.file.seek(offset)
        id, _ = read_expansion(self.file.readline(), f"{self.path}, line {number}")
        raise CorpusError(
            f"{self.path}, line {number}: {corpus} has no document {id!r} ({len(self.places)} such "
            "lines): make the expansions of this corpus, or leave these lines out"
        )


def read_expansion(line: bytes, location: str) -> tuple[str, str]:
    """The id and the added words of a line. Raises CorpusError naming `location` for another."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{location}: not JSON ({error})") from error
    if isinstance(row, dict) and isinstance(row.get("id"), str | int):
        id = str(row["id"])
        if is_list_of_texts(row.get("terms")) and "text" not in row:
            return id, "\n".join(row["terms"])
        if isinstance(row.get("text"), str) and "terms" not in row:
            return id, row["text"]
    raise CorpusError(
        f'{location}: expected an object with "id" and either "terms" (a list of strings) or '
        '"text" (a string)'
    )


def is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

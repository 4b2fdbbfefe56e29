"""Finds words that a document lacks in the documents most like it.

A document's most telling words are searched for, and the relevance model of what they find, other
documents only, says which words it could have had (Tao et al., "Language Model Information
Retrieval with Document Expansion", NAACL 2006, and Efron et al., "Improving Retrieval of Short
Texts through Document Expansion", SIGIR 2012, expand documents by their neighbours). Words that the
document has, and those that are too common, are left out. Nothing is drawn: the same index gives
the same words.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from pydantic import PositiveInt

from search_r1.search.engines.bm25.analysis import words
from search_r1.search.engines.bm25.feedback import Relevance, Weights, relevance_model
from search_r1.search.engines.bm25.retriever import BM25Retriever, Ranking

DOCUMENTS_A_BATCH = 256


class Neighbourhood(Relevance):
    """How many neighbours a document has, and how many of their words it gets."""

    terms: PositiveInt = 20
    """The number of words that a document gets."""
    query_words: PositiveInt = 20
    """The number of a document's words that are searched for, those of the highest occurrences
    times inverse document frequency. It bounds the time of long documents."""


class Neighbours:
    """Finds the missing words of the documents of an index."""

    def __init__(self, bm25: BM25Retriever, settings: Neighbourhood) -> None:
        self.bm25 = bm25
        self.settings = settings
        self.spellings: dict[int, str] = {}
        """A word as it was first read, for the number of its stem."""

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        """Yields the id of every document with its missing words, the most probable first."""
        for start in range(0, len(self.bm25), DOCUMENTS_A_BATCH):
            positions = range(start, min(start + DOCUMENTS_A_BATCH, len(self.bm25)))
            queries = [self.query_of(self.bm25.words_at(position)) for position in positions]
            rankings = self.bm25.scorer.rank_words(queries, self.settings.documents + 1)
            for position, ranking in zip(positions, rankings, strict=True):
                missing = self.missing(position, ranking)
                id = str(self.bm25.corpus[position]["id"])
                yield id, [self.spellings[word] for word in missing]

    def query_of(self, document: Sequence[int]) -> Weights:
        """The most telling words of a document with their occurrences."""
        occurrences = Counter(document)
        idf = self.bm25.scorer.idf
        weights = {word: float(count * idf[word]) for word, count in occurrences.items()}
        best = sorted(weights, key=lambda word: (-weights[word], word))
        return {word: float(occurrences[word]) for word in best[: self.settings.query_words]}

    def missing(self, position: int, found: Ranking) -> Weights:
        """P(w | R) of the words that the document at `position` gets from what its words found."""
        others = [(other, score) for other, score in found if other != position]
        neighbours = [
            (self.read(other), score) for other, score in others[: self.settings.documents]
        ]
        own = set(self.bm25.words_at(position))
        return relevance_model(
            neighbours,
            lambda word: word not in own and self.bm25.is_rare(word, self.settings.max_df),
            self.settings.terms,
        )

    def read(self, position: int) -> list[int]:
        """The numbers of a document's words, whose spellings are kept."""
        found = list[int]()
        for word in words(self.bm25.corpus[position]["contents"]):
            stem = self.bm25.analyze[word]
            if stem is not None:
                number = self.bm25.scorer.vocabulary[stem]
                self.spellings.setdefault(number, word.lower())
                found.append(number)
        return found

"""Query expansion by pseudo-relevance feedback: the relevance model RM3 over BM25.

The best documents of a query are taken for relevant, and their words for those that the query
lacks. A first search finds the documents, a second one ranks by the query with the words:

    P(w | R) = sum over the found documents d of P(w | d) s(d) / sum of the scores s
    P(w | d) = occurrences of w in d / words of d
    weight of w = a P(w | Q) + (1 - a) P(w | R)

The first line is the relevance model of Lavrenko and Croft ("Relevance-Based Language Models",
SIGIR 2001, equation 6), with BM25's score in the place of the likelihood of the query, as Anserini
has it; the last one is RM3 (Abdul-Jaleel et al., "UMass at TREC 2004", section 2.1). P(w | R) is
cut to its highest words and scaled to a sum of 1.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from search_r1.search.engine import Hits
from search_r1.search.engines.bm25.retriever import BM25Retriever, Ranking

RM3 = "rm3"
Weights = dict[int, float]
"""The weight of each word, by its number in the index."""


class Relevance(BaseModel):
    """What a relevance model is made of. The defaults are Anserini's of RM3."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: PositiveInt = 10
    """The number of found documents that are taken for relevant."""
    terms: PositiveInt = 10
    """The number of words that are taken from them."""
    max_df: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Words that a larger share of the corpus has are too common to tell documents apart, and are
    not taken."""


class Feedback(Relevance):
    """The parameters of RM3. The defaults are Anserini's."""

    original_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The share `a` of the query's own words."""


class Rm3Retriever:
    """BM25 whose queries are expanded by RM3."""

    def __init__(self, bm25: BM25Retriever, feedback: Feedback) -> None:
        self.bm25 = bm25
        self.feedback = feedback
        self.name = f"{bm25.name}+{RM3}"
        expansion = {"method": RM3, **feedback.model_dump()}
        self.settings = {**bm25.settings, "query_expansion": expansion}

    def __len__(self) -> int:
        return len(self.bm25)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """The best `topk` documents of each expanded query.

        A score is the sum of the words' weights times their BM25 scores, so that it cannot be
        compared with a score of BM25. A query that finds nothing is not expanded, and finds
        nothing.
        """
        scorer = self.bm25.scorer
        words = [scorer.words_of(self.bm25.analyze(query)) for query in queries]
        first = scorer.rank_words(words, self.feedback.documents)
        expanded = [self.expand(*pair) for pair in zip(words, first, strict=True)]
        rankings = scorer.rank_words(expanded, topk)
        return [self.bm25.to_hits(ranking) for ranking in rankings]

    def expand(self, query: Mapping[int, float], found: Ranking) -> Weights:
        """The words of a query with those of the documents that it found."""
        documents = [(self.bm25.words_at(position), score) for position, score in found]
        model = relevance_model(
            documents,
            lambda word: self.bm25.is_rare(word, self.feedback.max_df),
            self.feedback.terms,
        )
        return interpolated(query, model, self.feedback.original_weight)


def relevance_model(
    documents: Iterable[tuple[Sequence[int], float]], keep: Callable[[int], bool], terms: int
) -> Weights:
    """P(w | R) of the most probable `terms` words that may be kept, highest first, scaled to 1.

    `documents` are the words of the feedback documents, each with its score. Words of equal
    probability are taken in the order of their numbers. Empty where there is no such word.
    """
    probability = Weights()
    for words, score in documents:
        for word, occurrences in Counter(words).items():
            gained = score * occurrences / len(words)
            probability[word] = probability.get(word, 0.0) + gained
    ranked = sorted(probability, key=lambda word: (-probability[word], word))
    best = list(islice(filter(keep, ranked), terms))
    total = sum(probability[word] for word in best)
    return {word: probability[word] / total for word in best}


def interpolated(query: Mapping[int, float], model: Weights, original_weight: float) -> Weights:
    """a P(w | Q) + (1 - a) P(w | R) for every word; `query` holds occurrences.

    Without a model it is P(w | Q), which ranks as the query does.
    """
    share = original_weight if model else 1.0
    length = sum(query.values())
    weights = {word: share * occurrences / length for word, occurrences in query.items()}
    for word, probability in model.items():
        weights[word] = weights.get(word, 0.0) + (1 - share) * probability
    return weights

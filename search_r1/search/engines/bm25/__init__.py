"""BM25 without a JVM, as Lucene and Anserini compute it.

`analysis` turns text into terms, `postings` and `index` write and read the files, `score` ranks
without scoring every document, `retriever` is the engine.
"""

from search_r1.search.engines.bm25.retriever import NAME, PARAMETERS, BM25Retriever, build

__all__ = ["NAME", "PARAMETERS", "BM25Retriever", "build"]

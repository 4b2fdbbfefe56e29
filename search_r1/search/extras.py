"""Optional dependencies: what is missing is said with its cure, before anything is loaded."""

from importlib.util import find_spec

from search_r1.search.manifest import CorpusError

EXTRAS = {
    "dense": ("faiss", "sentence_transformers"),
    "lucene": ("pyserini", "jnius"),
    "web": ("bs4", "markdown_it"),
    "hub": ("datasets",),
}


def require(extra: str, what: str) -> None:
    """Raises CorpusError unless the packages of `extra` are installed."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise CorpusError(
            f"{what} needs {' and '.join(missing)}: pip install -e '.[{extra}]' in the project's "
            "folder"
        )

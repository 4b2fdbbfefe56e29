"""Checks optional dependencies, before anything is loaded, and says how to install missing ones."""

from importlib.util import find_spec

from search_r1.search.errors import RetrieverError

EXTRAS = {
    "dense": ("faiss", "sentence_transformers"),
    "lucene": ("pyserini", "jnius"),
    "web": ("bs4", "markdown_it"),
    "hub": ("datasets",),
}
"""The packages of each extra of pyproject.toml, by their import names."""


def require(extra: str, what: str) -> None:
    """Raises RetrieverError unless the packages of `extra` are installed."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise RetrieverError(
            f"{what} needs {' and '.join(missing)}: pip install -e '.[{extra}]' in the project's "
            "folder"
        )

"""A missing optional package is named with its cure."""

import pytest

from search_r1.search import extras
from search_r1.search.engines.load import load
from search_r1.search.errors import RetrieverError
from search_r1.search.retrieval_server import parse_arguments


@pytest.mark.parametrize(
    ("flags", "extra"),
    [
        (["--retriever_name", "e5"], "dense"),
        (["--retriever_name", "empty", "--reranker", "x"], "dense"),
    ],
)
def test_the_extra_is_named(flags, extra, monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(RetrieverError, match=rf"pip install -e '\.\[{extra}\]'"):
        load(parse_arguments([*flags, "--index_path", str(tmp_path)]))
